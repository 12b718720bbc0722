"""CLIP score: the cosine between the picture's and the prompt's embedding, by a CLIP of transformers.

Not multiplied and not clamped; other papers print it times 100. Values of two models do not compare.
"""

import argparse
from pathlib import Path

from ...cli.parsing import UsageError

MODEL = "openai/clip-vit-large-patch14"


class Scorer:
    name = "clip"
    batch = 32

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        text = f"folder with config, processor and model.safetensors, or name on the hub (default: {MODEL})"
        parser.add_argument("--clip-model", default=MODEL, metavar="NAME", help=text)

    def __init__(self, args: argparse.Namespace):
        """Raises UsageError where the model cannot be had."""
        import transformers

        from ...cli.hub import identity, open_model
        from ...cli.setup import default_device

        device = args.device or default_device()
        try:
            self.model, self.processor = open_model(args.clip_model, ("clip",), transformers.CLIPModel, device)
        except ValueError as e:
            raise UsageError(f"--clip-model {e}") from e
        self.settings = identity(args.clip_model) | {
            "transformers": transformers.__version__,
            "image processor": type(self.processor.image_processor).__name__,  # with torchvision another one, see docs
        }

    def score(self, paths: list[Path], rows: list[dict]) -> list[dict]:
        """{"clip": cosine in [-1, 1], "cut": whether the prompt was longer than the model's text} per picture."""
        import torch

        from ...cli.pictures import opened

        pictures, texts = [opened(path) for path in paths], [row["prompt"] for row in rows]
        most = self.model.config.text_config.max_position_embeddings
        told = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        inputs = self.processor(text=texts, images=pictures, **told).to(self.model.device)
        with torch.no_grad():
            out = self.model(**inputs)  # both embeddings (b, projection), of length 1
        cosines = (out.image_embeds * out.text_embeds).sum(-1)  # (b,)
        lengths = [len(ids) for ids in self.processor.tokenizer(texts).input_ids]
        return [{"clip": c, "cut": length > most} for c, length in zip(cosines.tolist(), lengths, strict=True)]
