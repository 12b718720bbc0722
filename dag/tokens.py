"""Guideline tokens: what they are, how they are stored, how they are optimised.

Source: paper section 3.1 and Eq. 2; OVAM for the background row.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .attention import guideline_maps
from .cam import QueryCache, combine, key_differences
from .config import Scaling
from .scalers import objects

FORMAT = "dag-tokens-1"


class TokenError(ValueError):
    """A token file that cannot be used. The message is one line: what, found, expected, what to do."""


@dataclass(frozen=True)
class GuidelineTokens:
    """The detector of one concept.

    embedding (1+K, c_text) float32: row 0 is the background, rows 1..K the concept. `levels`, `lo` and `hi` are the
    normalisation constants at a few noise levels (timesteps, rising); all empty for tokens that were not optimised.
    """

    embedding: Tensor
    concept: str  # its text, which the embedding started from
    safety_text: str  # what guidance pushes away from
    factors: tuple[int, ...]  # layers looked at: latent grid / factor
    fingerprint: str  # of the model they belong to
    levels: tuple[int, ...] = ()
    lo: tuple[float, ...] = ()
    hi: tuple[float, ...] = ()
    loss: float | None = None  # training loss and IoU of the kept embedding
    iou: float | None = None

    def limits(self, t: int) -> tuple[float, float]:
        """lo and hi at timestep t, linear between levels, constant beyond them."""
        return float(np.interp(t, self.levels, self.lo)), float(np.interp(t, self.levels, self.hi))

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
        temporary = Path(f"{path}.tmp")
        save_file({"embedding": self.embedding.contiguous()}, temporary, {"format": FORMAT, **meta})
        os.replace(temporary, path)

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
            rising = (limits[0].diff() > 0).all() and (limits[1] < limits[2]).all()
            if not (embedding.isfinite().all() and limits.isfinite().all() and rising):
                raise TokenError(f"{path}: damaged, its values are not finite or not in order; make it anew")
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
        if not set(self.factors) & {factor for factor, _ in sd.unet.cross_attention()}:
            raise TokenError(
                f"tokens of '{self.concept}' read layers of factors {self.factors}, {sd.config.name} has none"
            )
        if self.fingerprint != fingerprint(sd):
            return f"tokens of '{self.concept}' were trained on another model; detection may be off"
        return None


def fingerprint(sd) -> str:
    """Hash of the cross-attention key weights, rounded to bfloat16 so that half-precision copies have the same."""
    digest = hashlib.sha256()
    for _, layer in sd.unet.cross_attention():
        rounded = layer.to_k.weight.detach().to("cpu", torch.float16).to(torch.bfloat16)
        digest.update(rounded.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class AnnotatedQueries:
    """Queries of N annotated pictures at several noise levels: all that the optimisation needs of the model.

    masks (N, H, W) in [0, 1] on the latent grid, all zero for a safe picture; may be set when the queries are read.
    """

    def __init__(self, sd, masks: Tensor | None):
        self.sd, self.masks = sd, masks
        self.probe = QueryCache(sd.unet, sd.config.cam_factors)
        self.times: list[int] = []
        self.queries: list[list[Tensor]] = []  # [time][layer], (N, h, n, d)

    @torch.no_grad()
    def add(self, t: int, x: Tensor, context: Tensor) -> None:
        """Run the pictures' latents x (N, 4, H, W) at timestep t with their prompts' context (N, m, c_text)."""
        self.sd.unet(x, torch.full((len(x),), t, device=x.device), context, self.probe)
        self.times.append(t)
        self.queries.append([self.probe.queries[layer] for layer in self.probe.factors])

    def raw(self, c: Tensor, k: int, images: list[int] | slice = slice(None)) -> Tensor:
        """Raw maps per concept row at the k-th noise level for embedding c: (images, K, H, W)."""
        keys = [key_differences(layer, c) for layer in self.probe.factors]  # (h, K, d) each
        maps = [guideline_maps(q[images], dk) for q, dk in zip(self.queries[k], keys, strict=True)]  # (images, K, n)
        return combine(maps, list(self.probe.factors.values()), *self.masks.shape[1:])

    def measure(self, tokens: GuidelineTokens, scaling: Scaling) -> list[tuple[int, float, float, float]]:
        """Per noise level: t, mean IoU of objects in unsafe pictures, shares of unsafe and safe pictures found."""
        unsafe, out = self.masks.amax((1, 2)) >= 0.5, []
        for k, t in enumerate(self.times):
            A = tokens.normalise(self.raw(tokens.embedding, k).mean(1), t)  # (N, H, W)
            seen = torch.stack([objects(a, scaling)[0] > 0 for a in A])  # (N, H, W)
            mask = self.masks >= 0.5
            iou = (seen & mask).sum((1, 2)) / (seen | mask).sum((1, 2)).clamp(min=1)
            found = seen.flatten(1).any(1).float()
            out.append((t, *(v.mean().item() for v in (iou[unsafe], found[unsafe], found[~unsafe]))))
        return out


@dataclass(frozen=True)
class Recipe:
    """How an embedding is optimised. The defaults are ours; `PAPER` is the paper's."""

    steps: int = 600
    lr: float = 0.02
    unsafe: int = 4  # pictures of a batch
    safe: int = 3
    safe_weight: float = 1.0  # of safe pictures in the loss
    levels: tuple[int, ...] = (1, 201, 401, 601, 801, 981)  # timesteps at which lo and hi are learned
    joint: bool = False  # the paper's: cross-entropy on jointly normalised maps, SGD with StepLR(20, 0.7)


PAPER = Recipe(lr=200.0, unsafe=1, safe=1, joint=True)


@dataclass
class Progress:
    """One step of the optimisation; `tokens`, the best so far, is set at every check of the whole cache."""

    step: int
    tokens: GuidelineTokens | None = None


def optimise(
    data: AnnotatedQueries, start: GuidelineTokens, recipe: Recipe, seed: int = 0, every: int = 50
) -> Iterator[Progress]:
    """Minimise Eq. 2 over the embedding, background row included; yields every step, the last with the best tokens.

    Eq. 2 is the pixelwise cross-entropy of map and mask, averaged over concept rows and pixels, one noise level a step.
    With A' = s (raw - b) + 1/2, s and b learned per level, its probability is sigmoid(4 (A' - 1/2)): A's slope at its
    centre and never a zero gradient; then lo = b - 1/(2s) and hi = b + 1/(2s). Raises TokenError if no mask is unsafe.
    """
    unsafe = data.masks.amax((1, 2)) > 0
    positive, negative = unsafe.nonzero()[:, 0].tolist(), (~unsafe).nonzero()[:, 0].tolist()
    if not positive:
        raise TokenError("no unsafe picture: every mask is zero or missing; expected at least one with a mask")
    rng = np.random.default_rng(seed)
    c = start.embedding.clone().requires_grad_()
    b = torch.full((len(recipe.levels),), 0.5, requires_grad=True)
    s = torch.full((len(recipe.levels),), 2.0, requires_grad=True)
    if recipe.joint:
        opt = torch.optim.SGD([c], recipe.lr)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 20, 0.7)
    else:
        opt = torch.optim.Adam([c, b, s], recipe.lr)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.02, recipe.steps)

    def loss_of(k: int, images: list[int]) -> Tensor:
        raw, y = data.raw(c, k, images), data.masks[images][:, None]  # (images, K, H, W), (images, 1, H, W)
        if recipe.joint:
            A = torch.stack([start.normalise(row, data.times[k]) for row in raw.unbind(1)], 1)  # (images, K, H, W)
            logit = A - (1 - A)  # the two maps as logits of two classes
        else:
            logit = 4 * at_level(s, recipe.levels, data.times[k]) * (raw - at_level(b, recipe.levels, data.times[k]))
        loss = F.binary_cross_entropy_with_logits(logit, y.expand_as(logit), reduction="none").mean((1, 2, 3))
        return (loss * torch.where(unsafe[images], 1.0, recipe.safe_weight)).mean()

    everything, best = list(range(len(data.masks))), None
    for step in range(1, recipe.steps + 1):
        images = rng.permutation(positive)[: recipe.unsafe].tolist() + rng.permutation(negative)[: recipe.safe].tolist()
        opt.zero_grad()
        loss_of(int(rng.integers(len(data.times))), images).backward()
        opt.step()
        schedule.step()
        with torch.no_grad():
            s.clamp_(min=0.5)  # A may never fall where the raw map rises
        progress = Progress(step)
        if step % every == 0 or step == recipe.steps:
            with torch.no_grad():
                whole = np.mean([loss_of(k, everything).item() for k in range(len(data.times))])
            if best is None or whole < best.loss:
                best = replace(start, embedding=c.detach().clone(), loss=float(whole))
                if not recipe.joint:
                    lo, hi = ((b + sign / (2 * s)).detach().tolist() for sign in (-1, 1))
                    best = replace(best, levels=recipe.levels, lo=tuple(lo), hi=tuple(hi))
            progress.tokens = best
        yield progress


def at_level(values: Tensor, levels: tuple[int, ...], t: int) -> Tensor:
    """Values (levels,) read at timestep t, linear between levels; a number that gradients flow through."""
    weights = [np.interp(t, levels, row) for row in np.eye(len(levels))]
    return (values * torch.tensor(weights, dtype=values.dtype)).sum()


@torch.no_grad()
def raise_lo(data: AnnotatedQueries, tokens: GuidelineTokens, quantile: float = 0.99) -> GuidelineTokens:
    """Raise lo, where needed, to a quantile of the raw map over the negative pixels of the pictures, level by level.

    With lo any lower nearly every pixel has A >= 0.01 and Algorithm 1 takes the frame as full. hi comes down by as
    much, so that A = 1/2, where objects begin, stays where the optimisation put it.
    """
    negative, floors = data.masks < 0.01, []
    for k in range(len(data.times)):
        raw = data.raw(tokens.embedding, k).mean(1)[negative]
        floors.append(torch.quantile(raw[torch.randperm(len(raw))[:100_000]], quantile).item())
    order = np.argsort(data.times)
    floor = np.interp(tokens.levels, np.array(data.times)[order], np.array(floors)[order])
    centre = [(lo + hi) / 2 for lo, hi in zip(tokens.lo, tokens.hi, strict=True)]
    lo = tuple(float(max(a, min(f, c - 0.01))) for a, f, c in zip(tokens.lo, floor, centre, strict=True))
    return replace(tokens, lo=lo, hi=tuple(2 * c - a for a, c in zip(lo, centre, strict=True)))
