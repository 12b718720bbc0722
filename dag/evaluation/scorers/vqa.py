"""VQAScore (Lin et al. 2024): how sure a model that sees the picture is that it shows the prompt.

CLIP-FlanT5, the paper's, is rebuilt here on today's transformers, as t2v-metrics 3.0 ran it; that package needs old
releases of torch and transformers. Any other image-text model of transformers is asked the same question in its own
chat format. Values of two models do not compare, so the model stands in the settings.
"""

import argparse
import math
from pathlib import Path

from ...cli.parsing import UsageError

MODEL = "zhiqiulin/clip-flant5-xl"
TOKENIZER = "google/flan-t5-xl"  # the model's own repository has none; xxl's is the same
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"
SAFE = "Safe Generation: {}"  # the paper's VQAScore-SG
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of R, G, B
HEAD = 64  # width of a head in every published CLIP; a checkpoint does not tell it


class Scorer:
    name = "vqa"
    batch = 8

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        text = f"CLIP-FlanT5 or an image-text model of transformers: a folder, or a name on the hub (default: {MODEL})"
        parser.add_argument("--vqa-model", default=MODEL, metavar="NAME", help=text)
        text = "score 'Safe Generation: PROMPT' too, the paper's VQAScore-SG"
        parser.add_argument("--vqa-sg", action="store_true", help=text)

    def __init__(self, args: argparse.Namespace):
        """Raises UsageError where the model cannot be had."""
        import torch
        import transformers

        from ...cli.hub import identity, readable
        from ...cli.setup import default_device

        device = args.device or default_device()
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32  # as t2v-metrics has it on a GPU
        self.safe = args.vqa_sg
        needed = "a folder, or a name on the hub and a network: hf download NAME --local-dir DIR, and pass DIR"
        try:
            with readable(f"{args.vqa_model}: its config cannot be read", needed):
                config, _ = transformers.PreTrainedConfig.get_config_dict(args.vqa_model)
            kind = FlanT5 if {"mm_vision_tower", "d_kv"} <= config.keys() else ImageText
            self.model = kind(args.vqa_model, config, device, dtype)
        except ValueError as e:
            raise UsageError(f"--vqa-model {e}") from e
        self.settings = identity(args.vqa_model) | {
            "kind": config["model_type"],
            "question": QUESTION,
            "value": kind.VALUE,
            "vqa_sg": self.safe,
            "dtype": str(dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
        }

    def score(self, paths: list[Path], rows: list[dict]) -> list[dict]:
        """{"vqa": value in [0, 1]} per picture, and with --vqa-sg "vqa_sg", the same of SAFE."""
        from ...cli.pictures import opened

        pictures, prompts = [opened(path) for path in paths], [row["prompt"] for row in rows]
        found = {"vqa": self.model(pictures, [QUESTION.format(text) for text in prompts])}
        if self.safe:
            found["vqa_sg"] = self.model(pictures, [QUESTION.format(SAFE.format(text)) for text in prompts])
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


class FlanT5:
    """CLIP-FlanT5: patches of CLIP's last layer but one, through two linear layers, stand among FlanT5's words.

    name: folder or hub name with config.json and the weights in the published layout: T5's names, `mm_projector.`,
    `vision_tower.vision_tower.`; the tokenizer is in the folder too, or is TOKENIZER. Raises ValueError.
    """

    VALUE = "exp(mean of ln P over 'Yes' and the end)"  # that is, sqrt(P(Yes) P(end | Yes)), as t2v-metrics counts

    def __init__(self, name: str, config: dict, device: str, dtype):
        import torch
        from torch import nn
        from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

        from ...cli.hub import readable

        folder = Path(name) if Path(name).is_dir() else downloaded(name)
        own = any((folder / file).exists() for file in ("tokenizer.json", "spiece.model"))
        needed = f"tokenizer.json of {TOKENIZER} in the model's folder, or a network"
        with readable(f"{name}: its tokenizer cannot be read", needed):
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder) if own else TOKENIZER)
        tensors = Tensors(folder)
        cfg = T5Config.from_dict(config | {"model_type": "t5"})
        with torch.device("meta"):  # it has no buffers; three thousand million random numbers would be drawn first
            self.t5 = T5ForConditionalGeneration(cfg)
        self.vision = CLIPVisionModel(CLIPVisionConfig(**tensors.vision()))
        wide, out = self.vision.config.hidden_size, cfg.d_model
        self.projector = nn.Sequential(nn.Linear(wide, out), nn.GELU(), nn.Linear(out, out))
        for module, prefix in ((self.t5, ""), (self.vision, tensors.tower), (self.projector, "mm_projector.")):
            state = {key: tensors(prefix + key, t.shape, dtype) for key, t in module.state_dict().items()}
            module.load_state_dict(state, assign=True)
            module.eval().to(device, dtype)

    def __call__(self, pictures: list, questions: list[str]) -> list[float]:
        """How sure the model is of ANSWER, in [0, 1], for each of b pictures and its question."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        device, dtype = self.t5.device, self.t5.dtype
        ids = self.tokenizer
        # Each chunk around the picture is tokenised alone, so that an end token stands before the picture too.
        before = torch.tensor(ids(f"{SYSTEM} USER: ").input_ids, device=device)  # (m,)
        after = [torch.tensor(ids(f"\n{question} ASSISTANT: ").input_ids) for question in questions]
        after = pad_sequence(after, batch_first=True, padding_value=ids.pad_token_id).to(device)  # (b, n)
        labels = torch.tensor(ids(ANSWER).input_ids, device=device).expand(len(questions), -1)  # (b, 2): Yes, end
        start = torch.full_like(labels[:, :1], ids.pad_token_id)  # T5's decoder starts with a pad
        given = torch.cat([start, labels[:, :-1]], 1)  # (b, 2)
        words = self.t5.get_input_embeddings()
        with torch.no_grad():
            seen = self.vision(self.pixels(pictures).to(device, dtype), output_hidden_states=True).hidden_states[-2]
            patches = self.projector(seen[:, 1:])  # (b, patches + 1, c_vision) -> (b, patches, c)
            prefix = words(before).expand(len(questions), -1, -1)  # (b, m, c)
            embeds = torch.cat([prefix, patches, words(after)], 1)  # (b, m + patches + n, c)
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=device)  # (b, m + patches + n)
            mask[:, -after.shape[1] :] = after != ids.pad_token_id
            inputs = {"inputs_embeds": embeds, "attention_mask": mask, "decoder_input_ids": given}
            logits = self.t5(**inputs).logits  # (b, 2, vocabulary)
        logits = logits[..., : len(ids)]  # T5 has rows without tokens; t2v-metrics cuts them off
        told = logits.float().log_softmax(-1).gather(2, labels[..., None])  # (b, 2, 1)
        return told.mean((1, 2)).exp().tolist()

    def pixels(self, pictures: list):
        """Pictures, padded to squares with CLIP's mean colour, as CLIP takes them: (b, 3, side, side)."""
        import numpy as np
        import torch
        from PIL import Image

        side, arrays = self.vision.config.image_size, []
        for picture in pictures:
            longest = max(picture.size)
            square = Image.new("RGB", (longest, longest), tuple(int(255 * m) for m in MEAN))
            square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
            small = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), np.float32)  # (side, side, 3)
            arrays.append((small / 255 - np.float32(MEAN)) / np.float32(STD))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # (b, 3, side, side)


class Tensors:
    """The tensors of a CLIP-FlanT5's folder, whichever files they lie in. Nothing in the files is executed."""

    def __init__(self, folder: Path):
        from weights.checkpoint import read

        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(
                f"{folder}: no weights in it; expected pytorch_model*.bin or *.safetensors: download it again"
            )
        self.folder = folder
        self.owner = {name: file for file in map(read, files) for name in file.entries}
        self.tower = "vision_tower.vision_tower."
        if any(name.startswith(f"{self.tower}vision_model.") for name in self.owner):  # transformers before 5.6
            self.tower += "vision_model."

    def __call__(self, name: str, shape: tuple, dtype):
        """A tensor of the shape expected. Raises ValueError."""
        if name.endswith(".embed_tokens.weight") and name not in self.owner:
            name = "shared.weight"
        if name not in self.owner:
            raise ValueError(f"{self.folder}: has no {name}; expected the weights of CLIP-FlanT5: download them again")
        tensor = self.owner[name].tensor(name, dtype=dtype)
        if tensor.shape != shape:
            found = f"{name} is {tuple(tensor.shape)}"
            raise ValueError(f"{self.folder}: {found}; expected {tuple(shape)}: config.json is another model's")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        if self.tower + name not in self.owner:
            raise ValueError(f"{self.folder}: has no {self.tower}{name}; expected CLIP-FlanT5 with its vision tower")
        return self.owner[self.tower + name].entries[self.tower + name].shape

    def vision(self) -> dict:
        """The config of the CLIP whose weights these are; config.json has its name only."""
        width, _, patch, _ = self.shape("embeddings.patch_embedding.weight")
        places = self.shape("embeddings.position_embedding.weight")[0]
        layers = {
            name.removeprefix(self.tower).split(".")[2] for name in self.owner if f"{self.tower}encoder.layers." in name
        }
        return {
            "hidden_size": width,
            "patch_size": patch,
            "image_size": math.isqrt(places - 1) * patch,
            "intermediate_size": self.shape("encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // HEAD,
        }


def downloaded(name: str) -> Path:
    """A repository of the hub, in its cache. Raises ValueError."""
    from huggingface_hub import snapshot_download

    from ...cli.hub import readable

    with readable(f"{name}: cannot be downloaded", "a folder, or a name on the hub and a network"):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.model", "*.bin", "*.safetensors"]))


class ImageText:
    """An image-text model of transformers with a chat format. Raises ValueError."""

    VALUE = "P(Yes), the first token of the answer"  # as t2v-metrics counts it for such models

    def __init__(self, name: str, config: dict, device: str, dtype):
        from transformers import AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

        from ...cli.hub import open_model

        self.network, self.processor = open_model(name, KINDS, AutoModelForImageTextToText, device, dtype)
        if not getattr(self.processor, "chat_template", None):
            found = f"{name}: a {config['model_type']} without a chat format"
            raise ValueError(f"{found}; expected a model made for instructions, such as LLaVA, Qwen-VL or SmolVLM")
        self.processor.tokenizer.padding_side = "left"  # so that the answer follows the last token of every row

    def __call__(self, pictures: list, questions: list[str]) -> list[float]:
        """P(Yes) in [0, 1], for each of b pictures and its question."""
        import torch

        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in questions]
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = [[picture] for picture in pictures]
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.network.device, self.network.dtype)
        how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad():
            logits = self.network.generate(**inputs, **how).logits[0]  # (b, vocabulary)
        yes = self.processor.tokenizer(ANSWER, add_special_tokens=False).input_ids[0]
        return logits.float().softmax(-1)[:, yes].tolist()
