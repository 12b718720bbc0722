"""Guideline tokens: the detector of a concept, how it reads a map, how it is stored.

They are optimised in optimisation.py. Source: paper section 3.1; OVAM for the background row.
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

from .config import Scaling
from .files import whole

FORMAT = "dag-tokens-1"


class TokenError(ValueError):
    """A token file that cannot be used. The message is one line: what, found, expected, what to do."""


@dataclass(frozen=True)
class GuidelineTokens:
    """The detector of one concept.

    embedding (1+K, c_text) float32: row 0 is the background, rows 1..K the concept. `reduce` says how the K maps become
    one: their "mean" (the paper's), or their "min" (ours): the concept is there only where every row sees it, which an
    (attribute, object) pair needs, because a mean of the two is high at a red square beside a blue circle too.
    `levels`, `lo` and `hi` are the normalisation constants at a few noise levels (timesteps, rising); all empty for
    tokens that were not optimised, or by the paper's recipe. `min_area`: the share of the frame below which what
    is seen is no object of this concept; None for the model's own (Scaling).
    """

    embedding: Tensor
    concept: str  # its text, which the embedding started from
    safety_text: str  # what guidance pushes away from
    factors: tuple[int, ...]  # layers looked at: latent grid / factor
    fingerprint: str  # of the model they belong to
    reduce: str = "mean"
    levels: tuple[int, ...] = ()
    lo: tuple[float, ...] = ()
    hi: tuple[float, ...] = ()
    min_area: float | None = None
    loss: float | None = None  # training loss and IoU of the kept embedding
    iou: float | None = None

    def limits(self, t: int) -> tuple[float, float]:
        """lo and hi at timestep t, linear between levels, constant beyond them."""
        return float(np.interp(t, self.levels, self.lo)), float(np.interp(t, self.levels, self.hi))

    def scaling(self, scaling: Scaling) -> Scaling:
        """A model's constants with what is the concept's own."""
        return scaling if self.min_area is None else replace(scaling, min_area=self.min_area)

    def raw(self, maps: Tensor) -> Tensor:
        """The maps of the K rows (b, K, H, W) -> the raw map (b, H, W), in (0, 1)."""
        return maps.mean(1) if self.reduce == "mean" else maps.amin(1)

    def detect(self, maps: Tensor, t: int) -> Tensor:
        """The maps of the K rows (b, K, H, W) at timestep t -> A (b, H, W)."""
        return self.normalise(self.raw(maps), t)

    def normalise(self, raw: Tensor, t: int) -> Tensor:
        """Raw map (b, H, W) at timestep t -> A (b, H, W) in [0, 1].

        Optimised tokens carry constants: A = clamp((raw - lo) / (hi - lo), 0, 1). Tokens that were not optimised have
        none and use OVAM's joint min-max over both rows, concept and background, so that raw = 1/2 stays 1/2. OVAM
        takes it over all pictures of a call; here over each, which then does not depend on what it is drawn beside.
        """
        if self.levels:
            lo, hi = self.limits(t)
            return ((raw - lo) / (hi - lo)).clamp(0, 1)
        low = torch.minimum(raw, 1 - raw).amin((1, 2), keepdim=True)  # (b, 1, 1)
        return (raw - low) / (1 - 2 * low).clamp(min=1e-6)

    @classmethod
    def from_text(cls, sd, concept: str, safety_text: str) -> "GuidelineTokens":
        """Tokens that were not optimised: the text encoder's hidden states of the start token and of the concept's."""
        ids = sd.text.tokenize([concept])[0]  # (m,)
        length = int((ids == sd.text.tokenizer.eos_token_id).nonzero()[0, 0])
        if length < 2:
            raise TokenError("the concept text is empty; expected words that name it")
        embedding = sd.text.encode([concept])[0, :length].float().cpu()  # (1+K, c_text)
        return cls(embedding, concept, safety_text, sd.config.cam_factors, fingerprint(sd))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: `embedding`, everything else as metadata."""
        meta = {k: json.dumps(v) for k, v in vars(self).items() if k != "embedding"}
        with whole(path) as temporary:
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
            if meta.pop("format", None) != FORMAT or embedding.ndim != 2 or len(embedding) < 2:
                raise TokenError(f"{path}: not a token file of format {FORMAT}; make one with train_tokens.py")
            fields = {k: json.loads(v) for k, v in meta.items()}
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            tokens = cls(embedding, **fields)
            limits = torch.tensor([tokens.levels, tokens.lo, tokens.hi])  # (3, levels); raises if their lengths differ
            rising = (limits[0].diff() > 0).all() and (limits[1] < limits[2]).all() and tokens.reduce in ("mean", "min")
            rising &= tokens.min_area is None or 0 <= tokens.min_area <= 1
            if not (embedding.isfinite().all() and limits.isfinite().all() and rising):
                raise TokenError(f"{path}: damaged, its values are not finite, known or in order; make it anew")
            return tokens
        except TokenError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError) as e:
            raise TokenError(f"{path}: not a token file; expected one made by train_tokens.py") from e

    def check(self, sd) -> str | None:
        """Raises TokenError when the tokens cannot be read by this model; returns a warning when they are another's."""
        width = sd.config.unet.context_dim
        if self.embedding.shape[1] != width:
            raise TokenError(
                f"tokens of '{self.concept}' are {self.embedding.shape[1]} wide, {sd.config.name} needs {width}: "
                "train tokens for this model with train_tokens.py"
            )
        has = {factor for factor, _ in sd.unet.cross_attention()}
        if not set(self.factors) <= has:
            raise TokenError(
                f"tokens of '{self.concept}' read layers of factors {self.factors}, {sd.config.name} has {sorted(has)}"
            )
        if self.fingerprint != fingerprint(sd):
            return f"tokens of '{self.concept}' were trained on another model; detection may be off"
        return None


def fingerprint(sd) -> str:
    """Hash of the signs of the cross-attention key weights, which survive rounding to any precision."""
    digest = hashlib.sha256()
    for _, layer in sd.unet.cross_attention():
        digest.update(layer.to_k.weight.detach().cpu().signbit().numpy().tobytes())
    return digest.hexdigest()[:16]
