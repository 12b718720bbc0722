"""How guideline tokens are optimised from a few annotated pictures: the queries once, then the embedding alone.

Source: paper Eq. 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dag.attention import CrossAttention, Hook
from dag.cam import combine, guideline_keys, guideline_maps, layers_of, normalise, raw_map
from dag.config import NORMALISATIONS, Scaling
from dag.scalers import objects
from dag.tokens import GuidelineTokens, Reading, TokenError


class QueryCache(Hook):
    """Keeps the queries of a UNet call: `queries[layer]` (b, h, n, d).

    In half precision and on the CPU: a picture at 25 noise levels of SD 1.4 has 0.25 GB of them, 48 have 12 GB.
    """

    def __init__(self, layers: list[CrossAttention]):
        self.queries: dict[CrossAttention, Tensor | None] = dict.fromkeys(layers)

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> None:
        if layer in self.queries:
            self.queries[layer] = q.to("cpu", torch.float16)


class AnnotatedQueries:
    """Queries of N annotated pictures at several noise levels: all that the optimisation needs of the model.

    reading: the layers whose queries are kept. masks (N, H, W) in [0, 1] on the latent grid, all zero for a safe
    picture; may be set when the queries are read.
    """

    def __init__(self, sd, reading: Reading, masks: Tensor | None):
        self.sd, self.reading, self.masks = sd, reading, masks
        self.layers = layers_of(sd.unet, reading)
        self.cache = QueryCache(self.layers)
        self.times: list[int] = []
        self.queries: list[list[Tensor]] = []  # [time][layer], (N, h, n, d)

    @property
    def unsafe(self) -> Tensor:
        """(N,) bool: the concept covers at least half of some latent pixel."""
        return self.masks.amax((1, 2)) >= 0.5

    @torch.no_grad()
    def add(self, t: int, x: Tensor, context: Tensor) -> None:
        """Run the pictures' latents x (N, 4, H, W) at timestep t with their prompts' context (N, m, c_text).

        One after the other: the UNet's memory must not grow with N.
        """
        found = []  # [picture][layer], (1, h, n, d)
        for one, words in zip(x.split(1), context.split(1), strict=True):
            self.sd.unet(one, torch.full((1,), t, device=x.device), words, [self.cache])
            found.append(list(self.cache.queries.values()))
        self.times.append(t)
        self.queries.append([torch.cat(of_layer) for of_layer in zip(*found, strict=True)])

    def maps(self, c: Tensor, k: int, images: list[int] | slice = slice(None)) -> Tensor:
        """The rows' maps at the k-th noise level for embedding c: (images, K, H, W)."""
        keys = [guideline_keys(layer, c) for layer in self.layers]  # (h, K, d) each
        pairs = zip(self.queries[k], keys, strict=True)
        maps = [guideline_maps(q[images], dk, self.reading.heads) for q, dk in pairs]  # (images, K, n) each
        return combine(maps, [layer.factor for layer in self.layers], *self.masks.shape[1:])

    @torch.no_grad()
    def measure(self, tokens: GuidelineTokens, scaling: Scaling) -> dict[str, list["Detection"]]:
        """How well tokens detect at every noise level, under each normalisation that they have the constants for."""
        out = {how: [] for how in NORMALISATIONS if how != "fitted" or tokens.levels}
        for k, t in enumerate(self.times):
            raw = raw_map(tokens, self.maps(tokens.embedding, k))  # (N, H, W)
            for how, levels in out.items():
                levels.append(self.detection(normalise(replace(tokens, normalisation=how), raw, t), t, scaling))
        return out

    def detection(self, A: Tensor, t: int, scaling: Scaling) -> "Detection":
        """What the maps A (N, H, W) at timestep t show of the masks."""
        seen = objects(A, scaling)[0] > 0  # (N, H, W)
        mask = self.masks >= 0.5
        iou = (seen & mask).sum((1, 2)) / (seen | mask).sum((1, 2)).clamp(min=1)
        found = seen.flatten(1).any(1)
        edit, core = ((A >= threshold).float().mean((1, 2)) for threshold in (scaling.edit, scaling.unsafe))
        acts = found & (edit < scaling.full)  # Algorithm 1 ignores the others
        shares = [(v[self.unsafe], v[~self.unsafe]) for v in (found.float(), edit, core, acts.float())]
        return Detection(t, iou[self.unsafe].mean().item(), *((u.mean().item(), s.mean().item()) for u, s in shares))


class Detection(NamedTuple):
    """Detection at one noise level: means over the unsafe pictures and over the safe ones, NaN where there are none."""

    t: int
    iou: float  # of the objects with the mask, in unsafe pictures
    found: tuple[float, float]  # share of the pictures in which something is found
    edit: tuple[float, float]  # share of the frame with A >= Scaling.edit
    core: tuple[float, float]  # share of the frame with A >= Scaling.unsafe
    acts: tuple[float, float]  # share of the pictures that would be guided: found, and the map does not fill the frame


def mean(levels: list[Detection]) -> Detection:
    """The mean over noise levels, t too."""
    return Detection(*(np.mean(values, 0).tolist() for values in zip(*levels, strict=True)))


def choose(measured: dict[str, list[Detection]]) -> str | None:
    """The normalisation that guides many unsafe pictures and few safe ones; None if none guides more of the former."""
    acts = {how: np.nan_to_num(mean(levels).acts) for how, levels in measured.items()}
    best = max(acts, key=lambda how: acts[how][0] - acts[how][1])
    return best if acts[best][0] > acts[best][1] else None


STEEPEST = 0.01  # half of hi - lo at least: any closer and A would be a step


@dataclass(frozen=True)
class Recipe:
    """How an embedding is optimised. The defaults are ours; `PAPER` is the paper's."""

    steps: int = 1500
    lr: float = 0.1
    unsafe: int = 8  # pictures of a batch, at most
    safe: int = 16


PAPER = Recipe(lr=200.0, unsafe=1, safe=1)  # and 100 steps per unsafe picture
ROWS = 8  # concept rows K of our recipe
LEVELS = (1, 201, 401, 601, 801, 981)  # timesteps at which our recipe learns lo and hi

Progress = Iterator[tuple[int, GuidelineTokens | None]]  # step, and at every check the best tokens so far


def optimise(
    data: AnnotatedQueries, start: GuidelineTokens, recipe: Recipe = Recipe(), seed: int = 0, every: int = 50
) -> Progress:
    """Our recipe: the minimum of several rows, with normalisation constants learned beside the embedding.

    Eq. 2's cross-entropy is of the mask and of the raw map, which detection uses. With A' = s (raw - m) + 1/2, slope s
    and middle m learned per noise level, the probability is sigmoid(4 (A' - 1/2)): A's slope at its middle, and never a
    zero gradient. Then lo = m - 1/(2s) and hi = m + 1/(2s).
    Yields every step; the last one has the best tokens. Raises TokenError if no mask is unsafe.
    """
    how = start.normalisation or "fitted"
    start = replace(start, embedding=widen(start.embedding, ROWS, seed), reduce="min", normalisation=how)
    c = start.embedding.clone().requires_grad_()
    m = torch.full((len(LEVELS),), 0.5, requires_grad=True)
    s = torch.full((len(LEVELS),), 2.0, requires_grad=True)
    opt = torch.optim.Adam([c, m, s], recipe.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.02, recipe.steps)

    def logits(k: int, images: list[int]) -> Tensor:
        raw = raw_map(start, data.maps(c, k, images))[:, None]  # (images, 1, H, W)
        return 4 * interpolate(s, data.times[k]) * (raw - interpolate(m, data.times[k]))

    def step() -> None:
        opt.step()
        schedule.step()
        with torch.no_grad():
            s.clamp_(min=0.5)  # A may never fall where the raw map rises

    def tokens() -> GuidelineTokens:
        lo, hi = (tuple((m + sign / (2 * s)).tolist()) for sign in (-1, 1))
        return replace(start, embedding=c.detach().clone(), levels=LEVELS, lo=lo, hi=hi)

    yield from descend(data, recipe, seed, every, logits, opt, step, tokens)


def optimise_paper(
    data: AnnotatedQueries, start: GuidelineTokens, recipe: Recipe = PAPER, seed: int = 0, every: int = 50
) -> Progress:
    """The paper's recipe: Eq. 2 on each row's normalised map, SGD whose rate falls by 0.7 every 20 steps.

    start.normalisation: "joint" or "map"; None: joint. Tokens are trained as they will be read.
    """
    start = replace(start, normalisation=start.normalisation or "joint")
    c = start.embedding.clone().requires_grad_()
    opt = torch.optim.SGD([c], recipe.lr)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 20, 0.7)

    def logits(k: int, images: list[int]) -> Tensor:
        maps = data.maps(c, k, images)  # (images, K, H, W)
        A = torch.stack([normalise(start, row, data.times[k]) for row in maps.unbind(1)], 1)  # (images, K, H, W)
        return A - (1 - A)  # the two maps as logits of two classes

    def step() -> None:
        opt.step()
        schedule.step()

    yield from descend(
        data, recipe, seed, every, logits, opt, step, lambda: replace(start, embedding=c.detach().clone())
    )


def descend(
    data: AnnotatedQueries,
    recipe: Recipe,
    seed: int,
    every: int,
    logits: Callable[[int, list[int]], Tensor],
    opt: torch.optim.Optimizer,
    step: Callable[[], None],
    tokens: Callable[[], GuidelineTokens],
) -> Progress:
    """Minimise Eq. 2, the pixelwise cross-entropy of map and mask, over random batches at one noise level per step.

    logits(k, images): (images, rows, H, W) at the k-th noise level. Every so many steps the loss over all pictures and
    levels decides whether these are the best tokens so far.
    """
    positive, negative = data.unsafe.nonzero()[:, 0].tolist(), (~data.unsafe).nonzero()[:, 0].tolist()
    if not positive:
        raise TokenError("no unsafe picture: every mask is zero or missing; expected at least one with a mask")
    rng, best = np.random.default_rng(seed), None

    def loss_of(k: int, images: list[int]) -> Tensor:
        logit = logits(k, images)
        y = data.masks[images][:, None].expand_as(logit)
        return F.binary_cross_entropy_with_logits(logit, y)

    for i in range(1, recipe.steps + 1):
        images = rng.permutation(positive)[: recipe.unsafe].tolist() + rng.permutation(negative)[: recipe.safe].tolist()
        opt.zero_grad()
        loss_of(int(rng.integers(len(data.times))), images).backward()
        step()
        if i % every and i != recipe.steps:
            yield i, None
            continue
        with torch.no_grad():
            loss = np.mean([loss_of(k, list(range(len(data.masks)))).item() for k in range(len(data.times))])
            if best is None or loss < best.loss:
                best = replace(tokens(), loss=float(loss))
        yield i, best


def widen(embedding: Tensor, rows: int, seed: int) -> Tensor:
    """(1+K, c_text) -> at least `rows` concept rows: the K rows again and again, each with noise of its own size."""
    concept = embedding[1:]
    if rows <= len(concept):
        return embedding
    extra = concept[torch.arange(rows - len(concept)) % len(concept)]  # (rows - K, c_text)
    noise = torch.randn(extra.shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([embedding, extra + extra.std(1, keepdim=True) * noise])


def interpolate(values: Tensor, t: int) -> Tensor:
    """Values at LEVELS, read at timestep t, linear in between; a number that gradients flow through."""
    weights = [np.interp(t, LEVELS, row) for row in np.eye(len(LEVELS))]
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
        raw = raw_map(tokens, data.maps(tokens.embedding, k))[negative]
        floors.append(torch.quantile(raw[torch.randperm(len(raw))[:100_000]], 0.99).item())
    order = np.argsort(data.times)
    floor = np.interp(tokens.levels, np.array(data.times)[order], np.array(floors)[order])
    middle = [(lo + hi) / 2 for lo, hi in zip(tokens.lo, tokens.hi, strict=True)]
    lo = tuple(float(max(a, min(f, m - STEEPEST))) for a, f, m in zip(tokens.lo, floor, middle, strict=True))
    return replace(tokens, lo=lo, hi=tuple(2 * m - a for a, m in zip(lo, middle, strict=True)))
