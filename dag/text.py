"""CLIP's tokenizer and text encoder, built from config and bundled files, without a network.

The weights are the checkpoint's below `cond_stage_model.transformer.text_model.`; the code is transformers' (the text
tower is not what this project is about). As in the original, the encoder gets token ids only and no attention mask:
the rows of the padding are part of what the UNet was trained on.
"""

import importlib.util
import re
import unicodedata
from pathlib import Path

import torch
import transformers.utils.import_utils
from torch import Tensor, nn

from .config import TextConfig

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights"

# Hugging Face has a package called `kernels` too. Where it is installed, transformers imports names from it, and run
# from the checkout it would find our folder of that name and fail. Nothing here needs it, so it is declared absent.
_kernels = importlib.util.find_spec("kernels")
if _kernels and _kernels.origin and Path(_kernels.origin).is_relative_to(ROOT):
    transformers.utils.import_utils.is_kernels_available = lambda *args, **kwargs: False

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

# Chinese, Japanese and Korean ideographs; every one is a word.
IDEOGRAPH = re.compile("([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f])")


def clean(prompt: str) -> str:
    """A prompt as the slow tokenizer that the original used hands it to byte pairs; the fast one leaves this out.

    Control and zero-width characters vanish, white space becomes single spaces, ideographs stand alone. Only the
    lower-casing is left to `tokenize`, so that words can be shown as they were written.
    """
    kept = (c for c in prompt if c in "\t\n\r" or c != "\ufffd" and unicodedata.category(c)[0] != "C")
    return " ".join(unicodedata.normalize("NFC", IDEOGRAPH.sub(r" \1 ", "".join(kept))).split())


class Text(nn.Module):
    """Prompts -> hidden states after the final layer norm.

    A prompt is start, its byte pairs, end, and then the end token again (SD 2.1: token 0) up to max_length (77).
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        folder = WEIGHTS / cfg.vocabulary
        self.tokenizer = CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=cfg.max_length)
        if len(self.tokenizer) != cfg.vocab_size:
            raise ValueError(f"{folder}: {len(self.tokenizer)} tokens, expected {cfg.vocab_size}: restore the files")
        self.transformer = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=cfg.vocab_size,
                hidden_size=cfg.hidden_size,
                intermediate_size=4 * cfg.hidden_size,
                num_hidden_layers=cfg.num_layers,
                num_attention_heads=cfg.num_heads,
                max_position_embeddings=cfg.max_length,
                hidden_act=cfg.act,
                layer_norm_eps=cfg.eps,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> ids (b, m) int64, cut at max_length."""
        words = [clean(prompt).lower() for prompt in prompts]
        ids = self.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids  # (b, m)
        if self.cfg.pad is None:
            return ids
        ends = (ids == self.tokenizer.eos_token_id).cumsum(1)  # (b, m); 1 at the prompt's own end, more behind it
        return ids.masked_fill(ends > 1, self.cfg.pad)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (b, m) -> hidden states (b, m, c_text)."""
        return self.transformer(input_ids=ids).last_hidden_state

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (b, m, c_text), in the weights' dtype and on their device."""
        device = self.transformer.get_input_embeddings().weight.device
        return self(self.tokenize(prompts).to(device))

    def places(self, prompt: str) -> tuple[list[tuple[str, list[int]]], int]:
        """The words of a prompt with their token places, in order, and the place of the end token.

        Place 0 is the start token; words that do not fit are left out. "a red circle" on a vocabulary that has the
        words: [("a", [1]), ("red", [2]), ("circle", [3])], 4.
        """
        prompt = clean(prompt)
        pieces, room = self.pieces(prompt), self.cfg.max_length - 2  # start and end take two
        spans: dict[tuple[int, int], list[int]] = {}  # characters of a word -> its places
        for place, word in enumerate(pieces.word_ids()[:room], 1):
            spans.setdefault(tuple(pieces.word_to_chars(word)), []).append(place)
        words = [(prompt[start:end], places) for (start, end), places in spans.items()]
        return words, 1 + min(room, len(pieces["input_ids"]))

    def pieces(self, prompt: str):
        """The tokenizer's account of a prompt without start, end and cut: input_ids, offset_mapping, words."""
        return self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
