"""How guideline tokens are optimised from a few annotated pictures: the queries once, then the embedding alone.

Source: paper Eq. 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import guideline_maps
from .cam import QueryCache, combine, key_differences
from .config import Scaling
from .scalers import objects
from .tokens import GuidelineTokens, TokenError


class AnnotatedQueries:
    """Queries of N annotated pictures at several noise levels: all that the optimisation needs of the model.

    masks (N, H, W) in [0, 1] on the latent grid, all zero for a safe picture; may be set when the queries are read.
    """

    def __init__(self, sd, masks: Tensor | None):
        self.sd, self.masks = sd, masks
        self.probe = QueryCache(sd.unet, sd.config.cam_factors)
        self.times: list[int] = []
        self.queries: list[list[Tensor]] = []  # [time][layer], (N, h, n, d)

    @property
    def unsafe(self) -> Tensor:
        """(N,) bool: the concept covers at least half of some latent pixel."""
        return self.masks.amax((1, 2)) >= 0.5

    @torch.no_grad()
    def add(self, t: int, x: Tensor, context: Tensor) -> None:
        """Run the pictures' latents x (N, 4, H, W) at timestep t with their prompts' context (N, m, c_text)."""
        self.sd.unet(x, torch.full((len(x),), t, device=x.device), context, self.probe)
        self.times.append(t)
        self.queries.append([self.probe.queries[layer] for layer in self.probe.layers])

    def maps(self, c: Tensor, k: int, images: list[int] | slice = slice(None)) -> Tensor:
        """The rows' maps at the k-th noise level for embedding c: (images, K, H, W)."""
        keys = [key_differences(layer, c) for layer in self.probe.layers]  # (h, K, d) each
        maps = [guideline_maps(q[images], dk) for q, dk in zip(self.queries[k], keys, strict=True)]  # (images, K, n)
        return combine(maps, list(self.probe.layers.values()), *self.masks.shape[1:])

    @torch.no_grad()
    def measure(self, tokens: GuidelineTokens, scaling: Scaling, every: int = 1) -> list["Level"]:
        """How well tokens detect, at every so many noise levels."""
        out = []
        for k, t in list(enumerate(self.times))[::every]:
            A = tokens.detect(self.maps(tokens.embedding, k), t)  # (N, H, W)
            seen = torch.stack([objects(a, scaling)[0] > 0 for a in A])  # (N, H, W)
            mask = self.masks >= 0.5
            iou = (seen & mask).sum((1, 2)) / (seen | mask).sum((1, 2)).clamp(min=1)
            found, edit = seen.flatten(1).any(1).float(), (A >= scaling.edit).float().mean((1, 2))
            of_unsafe, of_safe = self.unsafe, ~self.unsafe
            values = iou[of_unsafe], found[of_unsafe], found[of_safe], edit[of_unsafe], edit[of_safe]
            out.append(Level(t, *(v.mean().item() for v in values)))
        return out


class Level(NamedTuple):
    """Detection at one noise level, means over pictures; NaN where there are none."""

    t: int
    iou: float  # of the objects with the mask, in unsafe pictures
    found: float  # share of unsafe pictures in which something is found
    false: float  # share of safe ones
    edit: float  # share of the frame that may be edited, in unsafe pictures
    edit_safe: float  # and in safe ones


STEEPEST = 0.01  # half of hi - lo at least: any closer and A would be a step


@dataclass(frozen=True)
class Recipe:
    """How an embedding is optimised. The defaults are ours; `PAPER` is the paper's."""

    steps: int = 1500
    lr: float = 0.1
    concept_rows: int = 8  # K: the text's, repeated with noise, and their minimum; 0: the text's and their mean (paper)
    unsafe: int = 8  # pictures of a batch, at most
    safe: int = 16
    safe_weight: float = 1.0  # of safe pictures in the loss
    levels: tuple[int, ...] = (1, 201, 401, 601, 801, 981)  # timesteps at which lo and hi are learned
    joint: bool = False  # the paper's: cross-entropy on jointly normalised maps, SGD with StepLR(20, 0.7)


PAPER = Recipe(lr=200.0, concept_rows=0, unsafe=1, safe=1, joint=True)


@dataclass
class Progress:
    """One step of the optimisation; at every check of the whole cache the best tokens so far and all that is needed to
    go on from there."""

    step: int
    tokens: GuidelineTokens | None = None
    state: dict | None = None


def optimise(
    data: AnnotatedQueries,
    start: GuidelineTokens,
    recipe: Recipe,
    seed: int = 0,
    every: int = 50,
    state: dict | None = None,
) -> Iterator[Progress]:
    """Minimise Eq. 2 over the embedding, background row included; yields every step, the last with the best tokens.

    Eq. 2 is the pixelwise cross-entropy of map and mask, one noise level a step: the paper's on each row's map, ours on
    the raw map, which is what detection uses. With A' = s (raw - b) + 1/2, s and b learned per level, ours has the
    probability sigmoid(4 (A' - 1/2)): A's slope at its centre and never a zero gradient; then lo = b - 1/(2s) and
    hi = b + 1/(2s). `state`, a Progress's, goes on from there as if never stopped. Raises TokenError if no mask is
    unsafe.
    """
    positive, negative = data.unsafe.nonzero()[:, 0].tolist(), (~data.unsafe).nonzero()[:, 0].tolist()
    if not positive:
        raise TokenError("no unsafe picture: every mask is zero or missing; expected at least one with a mask")
    rng = np.random.default_rng(seed)
    embedding = widened(start.embedding, recipe.concept_rows, seed)
    start = replace(start, embedding=embedding, reduce="min" if recipe.concept_rows else "mean")
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
        maps, y = data.maps(c, k, images), data.masks[images][:, None]  # (images, K, H, W), (images, 1, H, W)
        if recipe.joint:
            A = torch.stack([start.normalise(row, data.times[k]) for row in maps.unbind(1)], 1)  # (images, K, H, W)
            logit = A - (1 - A)  # the two maps as logits of two classes
        else:
            raw = start.raw(maps)[:, None]  # (images, 1, H, W)
            logit = 4 * at_level(s, recipe.levels, data.times[k]) * (raw - at_level(b, recipe.levels, data.times[k]))
        loss = F.binary_cross_entropy_with_logits(logit, y.expand_as(logit), reduction="none").mean((1, 2, 3))
        return (loss * torch.where(data.unsafe[images], 1.0, recipe.safe_weight)).mean()

    everything, best, first = list(range(len(data.masks))), None, 1
    if state is not None:
        first, best = state["step"] + 1, replace(start, **state["best"])
        for p, value in zip((c, b, s), state["values"], strict=True):
            p.data = value.clone()
        opt.load_state_dict(state["opt"])
        schedule.load_state_dict(state["schedule"])
        rng.bit_generator.state = state["rng"]
        yield Progress(state["step"], best, state)
    for step in range(first, recipe.steps + 1):
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
            progress.state = {
                "step": step, "best": {k: getattr(best, k) for k in ("embedding", "loss", "levels", "lo", "hi")},
                "values": [p.detach().clone() for p in (c, b, s)],
                "opt": opt.state_dict(), "schedule": schedule.state_dict(), "rng": rng.bit_generator.state,
            }  # fmt: skip
        yield progress


def widened(embedding: Tensor, rows: int, seed: int) -> Tensor:
    """(1+K, c_text) -> at least `rows` concept rows: the K rows again and again, each with noise of its own size."""
    concept = embedding[1:]
    if rows <= len(concept):
        return embedding
    extra = concept[torch.arange(rows - len(concept)) % len(concept)]  # (rows - K, c_text)
    noise = torch.randn(extra.shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([embedding, extra + extra.std(1, keepdim=True) * noise])


def at_level(values: Tensor, levels: tuple[int, ...], t: int) -> Tensor:
    """Values (levels,) read at timestep t, linear between levels; a number that gradients flow through."""
    weights = [np.interp(t, levels, row) for row in np.eye(len(levels))]
    return (values * torch.tensor(weights, dtype=values.dtype)).sum()


@torch.no_grad()
def raise_lo(data: AnnotatedQueries, tokens: GuidelineTokens) -> GuidelineTokens:
    """Raise lo, where needed, to the 99 % quantile of the raw map over the pictures' negative pixels, level by level.

    With lo any lower nearly every pixel has A >= 0.01 and Algorithm 1 takes the frame as full. hi comes down by as
    much, so that A = 1/2, where objects begin, stays where the optimisation put it; lo stays STEEPEST below that.
    """
    negative, floors = data.masks < 0.01, []
    if not negative.any():
        return tokens
    for k in range(len(data.times)):
        raw = tokens.raw(data.maps(tokens.embedding, k))[negative]
        floors.append(torch.quantile(raw[torch.randperm(len(raw))[:100_000]], 0.99).item())
    order = np.argsort(data.times)
    floor = np.interp(tokens.levels, np.array(data.times)[order], np.array(floors)[order])
    centre = [(lo + hi) / 2 for lo, hi in zip(tokens.lo, tokens.hi, strict=True)]
    lo = tuple(float(max(a, min(f, c - STEEPEST))) for a, f, c in zip(tokens.lo, floor, centre, strict=True))
    return replace(tokens, lo=lo, hi=tuple(2 * c - a for a, c in zip(lo, centre, strict=True)))
