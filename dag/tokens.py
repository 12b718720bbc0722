"""Guideline tokens, the detector of one concept, and their file.

cam.py reads maps with them, weights/optimisation.py makes them. Source: paper section 3.1; OVAM (Marcos-Manchon et al.
2024) for the background row.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights.files import atomic_write

from .config import NORMALISATIONS, Scaling

FORMAT = "dag-tokens-2"  # 1 had one background row, and its maps were merged otherwise


class TokenError(ValueError):
    """A token file that cannot be used. The message is one line: what, found, expected, what to do."""


@dataclass(frozen=True)
class Reading:
    """Which cross-attention layers the maps come from, and how their heads are pooled."""

    layers: tuple[int | str, ...]  # a number: every layer whose grid is that many times smaller; a string: its name
    heads: str = "mean"  # or "max"

    def has(self, layer) -> bool:
        """Whether a cross-attention layer is one of them."""
        return layer.factor in self.layers or layer.name in self.layers


@dataclass(frozen=True)
class GuidelineTokens:
    """The detector of one concept.

    embedding float32: first `background` rows of what the concept is told from, then those of the concept. (g, c_text),
    the same in every layer that is read, as in the paper; or (layers, g, c_text), every layer's own, in the order they
    run. OVAM has one row of either. Several background rows can learn several look-alikes.
    `normalisation` makes A of the raw map (`cam.normalise`): "fitted", "joint" or "map"; None, as in older files:
    fitted if there are constants, else joint. These are `lo` and `hi` at a few noise `levels` (timesteps, rising).
    """

    embedding: Tensor
    concept: str  # its text, which the embedding started from
    safety_text: str  # what guidance pushes away from
    reading: Reading
    fingerprint: str  # of the model they belong to
    background: int = 1
    normalisation: str | None = None
    levels: tuple[int, ...] = ()
    lo: tuple[float, ...] = ()
    hi: tuple[float, ...] = ()
    min_area: float | None = None  # smallest object, as a share of the frame; None: the model's own (Scaling)
    loss: float | None = None  # training loss and IoU of the kept embedding
    iou: float | None = None

    @property
    def split(self) -> tuple[int, int]:
        """How many rows are background, and how many the concept."""
        return self.background, self.embedding.shape[-2] - self.background

    def limits(self, t: int) -> tuple[float, float]:
        """lo and hi at timestep t, linear between levels, constant beyond them."""
        return float(np.interp(t, self.levels, self.lo)), float(np.interp(t, self.levels, self.hi))

    def adapt(self, scaling: Scaling) -> Scaling:
        """The model's constants with the concept's own in their place."""
        return scaling if self.min_area is None else replace(scaling, min_area=self.min_area)

    @classmethod
    def from_text(cls, sd, concept: str, safety_text: str, reading: Reading | None = None) -> "GuidelineTokens":
        """Tokens that were not optimised: the text encoder's hidden states of the start token and of the concept's.

        reading: default the model's own. Raises TokenError for an empty text.
        """
        _, end = sd.text.places(concept)
        if end < 2:
            raise TokenError("the concept text is empty; expected words that name it")
        embedding = sd.text.encode([concept])[0, :end].float().cpu()  # (g, c_text)
        return cls(embedding, concept, safety_text, reading or Reading(sd.config.cam_factors), fingerprint(sd))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: `embedding`, everything else as metadata."""
        fields = {k: v for k, v in vars(self).items() if k not in ("embedding", "reading")}
        fields |= {"factors": self.reading.layers, "heads": self.reading.heads}
        meta = {k: json.dumps(v) for k, v in fields.items()}
        with atomic_write(path) as temporary:
            save_file({"embedding": self.embedding.contiguous()}, temporary, {"format": FORMAT, **meta})

    @classmethod
    def load(cls, path: str | Path) -> "GuidelineTokens":
        """Read a token file. Raises TokenError."""
        if not Path(path).is_file():
            raise TokenError(f"{path}: no such file; expected a token file made by train_tokens.py")
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                embedding = file.get_tensor("embedding").float()
            if meta.pop("format", None) != FORMAT or embedding.ndim not in (2, 3) or embedding.shape[-2] < 2:
                raise TokenError(f"{path}: not a token file of format {FORMAT}; make one with train_tokens.py")
            fields = {k: tuple(v) if isinstance(v := json.loads(text), list) else v for k, text in meta.items()}
            reading = Reading(fields.pop("factors", ()), fields.pop("heads", "mean"))
            tokens = cls(embedding, reading=reading, **fields)
            limits = torch.tensor([tokens.levels, tokens.lo, tokens.hi])  # (3, levels); raises if their lengths differ
            rising = (limits[0].diff() > 0).all() and (limits[1] < limits[2]).all() and limits.isfinite().all()
            known = 1 <= tokens.background < embedding.shape[-2] and reading.layers and reading.heads in ("mean", "max")
            known = known and tokens.normalisation in (None, *NORMALISATIONS)
            known = known and (tokens.normalisation != "fitted" or tokens.levels)
            if not (embedding.isfinite().all() and rising and known and 0 <= (tokens.min_area or 0) <= 1):
                raise TokenError(f"{path}: damaged, its values are not finite, known or in order; make it anew")
            return tokens
        except TokenError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError) as e:
            raise TokenError(f"{path}: not a token file; expected one made by train_tokens.py") from e

    def check(self, sd) -> str | None:
        """Raises TokenError when the tokens cannot be read by this model; returns a warning when they are another's."""
        width = sd.config.unet.context_dim
        if self.embedding.shape[-1] != width:
            found = f"are {self.embedding.shape[-1]} wide, {sd.config.name} needs {width}"
            raise TokenError(f"tokens of '{self.concept}' {found}: train tokens for this model with train_tokens.py")
        has = {key for layer in sd.unet.cross_attention() for key in (layer.factor, layer.name)}
        if missing := [key for key in self.reading.layers if key not in has]:
            factors = sorted(key for key in has if isinstance(key, int))
            found = f"read layer {missing[0]}, which {sd.config.name} does not have"
            raise TokenError(f"tokens of '{self.concept}' {found}; expected a factor of {factors} or a layer's name")
        read = sum(map(self.reading.has, sd.unet.cross_attention()))
        if self.embedding.ndim == 3 and len(self.embedding) != read:
            found = f"have rows for {len(self.embedding)} layers, and read {read} of {sd.config.name}"
            raise TokenError(f"tokens of '{self.concept}' {found}: train tokens for this model with train_tokens.py")
        if self.fingerprint != fingerprint(sd):
            return f"tokens of '{self.concept}' were trained on another model; detection may be off"
        return None


def fingerprint(sd) -> str:
    """Hash of the signs of the cross-attention key weights, which survive rounding to any precision.

    An adapter on these layers (LoRA) counts: its weights are part of the hash.
    """
    digest = hashlib.sha256()
    for layer in sd.unet.cross_attention():
        for weight in layer.to_k.state_dict().values():
            digest.update(weight.cpu().signbit().numpy().tobytes())
    return digest.hexdigest()[:16]
