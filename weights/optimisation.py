"""How guideline tokens are optimised from the queries of annotated pictures: the embedding alone learns.

Source: paper Eq. 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dag.cam import normalise
from dag.tokens import GuidelineTokens, TokenError

from .queries import AnnotatedQueries

STEEPEST = 0.01  # half of hi - lo at least: any closer and A would be a step


@dataclass(frozen=True)
class Recipe:
    """How an embedding is optimised. The defaults are ours; `PAPER` is the paper's."""

    steps: int = 1500
    lr: float = 0.1
    unsafe: int = 8  # pictures of a batch, at most
    safe: int = 16
    weight: float = 1.0  # in the loss, of a pixel of the concept; of any other: 1


PAPER = Recipe(lr=200.0, unsafe=1, safe=1)  # and 100 steps per unsafe picture
ROWS = 8  # of our recipe: so many background rows, and so many that are the concept
LEVELS = (1, 201, 401, 601, 801, 981)  # timesteps at which our recipe learns lo and hi

Progress = Iterator[tuple[int, GuidelineTokens | None]]  # step, and at every check the best tokens so far


def optimise(
    data: AnnotatedQueries, start: GuidelineTokens, recipe: Recipe = Recipe(), seed: int = 0, every: int = 100
) -> Progress:
    """Our recipe: several rows of background and of concept for every layer, and normalisation constants with them.

    Eq. 2's cross-entropy is of the mask and of the raw map, which detection uses. With A' = s (raw - m) + 1/2, slope s
    and middle m learned per noise level, the probability is sigmoid(4 (A' - 1/2)): A's slope at its middle, and never a
    zero gradient. Then lo = m - 1/(2s) and hi = m + 1/(2s).
    Yields every step; the last one has the best tokens. Raises TokenError if no mask is unsafe.
    """
    start = replace(widen(start, ROWS, seed), normalisation=start.normalisation or "fitted")
    c = start.embedding.expand(len(data.layers), -1, -1).to(data.device, copy=True)  # (layers, g, c_text)
    c.requires_grad_()
    m = torch.full((len(LEVELS),), 0.5, requires_grad=True)
    s = torch.full((len(LEVELS),), 2.0, requires_grad=True)
    opt = torch.optim.Adam([c, m, s], recipe.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.02, recipe.steps)

    def logits(raw: Tensor, t: int) -> Tensor:
        return 4 * interpolate(s, t).to(raw) * (raw - interpolate(m, t).to(raw))

    def step() -> None:
        opt.step()
        schedule.step()
        with torch.no_grad():
            s.clamp_(min=0.5)  # A may never fall where the raw map rises

    def tokens() -> GuidelineTokens:
        lo, hi = (tuple((m + sign / (2 * s)).tolist()) for sign in (-1, 1))
        return replace(start, embedding=c.detach().cpu().clone(), levels=LEVELS, lo=lo, hi=hi)

    yield from descend(data, recipe, seed, every, c, logits, opt, step, tokens)


def optimise_paper(
    data: AnnotatedQueries, start: GuidelineTokens, recipe: Recipe = PAPER, seed: int = 0, every: int = 100
) -> Progress:
    """The paper's recipe: Eq. 2 on the normalised map, SGD whose rate falls by 0.7 every 20 steps.

    start.normalisation: "joint" or "map"; None: joint. Tokens are trained as they will be read.
    """
    start = replace(start, normalisation=start.normalisation or "joint")
    c = start.embedding.to(data.device, copy=True).requires_grad_()
    opt = torch.optim.SGD([c], recipe.lr)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 20, 0.7)

    def logits(raw: Tensor, t: int) -> Tensor:
        A = normalise(start, raw, t)
        return A - (1 - A)  # the two maps as logits of two classes

    def step() -> None:
        opt.step()
        schedule.step()

    def tokens() -> GuidelineTokens:
        return replace(start, embedding=c.detach().cpu().clone())

    yield from descend(data, recipe, seed, every, c, logits, opt, step, tokens)


def descend(
    data: AnnotatedQueries,
    recipe: Recipe,
    seed: int,
    every: int,
    c: Tensor,
    logits: Callable[[Tensor, int], Tensor],
    opt: torch.optim.Optimizer,
    step: Callable[[], None],
    tokens: Callable[[], GuidelineTokens],
) -> Progress:
    """Minimise Eq. 2, the pixelwise cross-entropy of map and mask, over random batches at one noise level per step.

    logits(raw, t): of raw maps (images, H, W) at timestep t. Every so many steps the loss of all pictures at every
    fourth noise level decides whether these are the best tokens so far, and which safe pictures are drawn from then on:
    with a probability in proportion to their loss, so that the look-alikes that are still confused come more often.
    """
    positive, negative = data.unsafe.nonzero()[:, 0].tolist(), (~data.unsafe).nonzero()[:, 0].tolist()
    if not positive:
        raise TokenError("no unsafe picture: every mask is zero or missing; expected at least one with a mask")
    rng, best, split = np.random.default_rng(seed), None, tokens().split
    bce = partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(recipe.weight))
    hard = np.full(len(negative), 1 / max(1, len(negative)))

    def losses(k: int) -> Tensor:
        """Of every picture at the k-th noise level, (N,)."""
        return bce(logits(data.all_maps(c, split, k), data.times[k]), data.masks, reduction="none").mean((1, 2))

    for i in range(1, recipe.steps + 1):
        images = rng.permutation(positive)[: recipe.unsafe].tolist()
        if negative:
            images += rng.choice(negative, min(recipe.safe, len(negative)), replace=False, p=hard).tolist()
        k = int(rng.integers(len(data.times)))
        logit = logits(data.maps(c, split, k, images), data.times[k])  # (images, H, W)
        opt.zero_grad()
        bce(logit, data.masks[images].to(logit)).backward()
        step()
        if i % every and i != recipe.steps:
            yield i, None
            continue
        with torch.no_grad():
            found = torch.stack([losses(k) for k in range(0, len(data.times), 4)]).mean(0)  # (N,)
        if best is None or found.mean() < best.loss:
            best = replace(tokens(), loss=found.mean().item())
        hard = found[negative].double().numpy()
        hard /= hard.sum()
        yield i, best


def widen(tokens: GuidelineTokens, rows: int, seed: int) -> GuidelineTokens:
    """At least `rows` rows of background and of concept: each again and again, with noise of its own size.

    Of tokens that are the same in every layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def wider(part: Tensor) -> Tensor:
        if len(part) >= rows:
            return part
        extra = part[torch.arange(rows - len(part)) % len(part)]  # (rows missing, c_text)
        noise = torch.randn(extra.shape, generator=generator)
        return torch.cat([part, extra + extra.std(1, keepdim=True) * noise])  # (rows, c_text)

    background, concept = (wider(part) for part in tokens.embedding.split(tokens.split))
    return replace(tokens, embedding=torch.cat([background, concept]), background=len(background))


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
        raw = data.all_maps(tokens.embedding.to(data.device), tokens.split, k)[negative]
        floors.append(torch.quantile(raw[torch.randperm(len(raw))[:100_000]], 0.99).item())
    order = np.argsort(data.times)
    floor = np.interp(tokens.levels, np.array(data.times)[order], np.array(floors)[order])
    middle = [(lo + hi) / 2 for lo, hi in zip(tokens.lo, tokens.hi, strict=True)]
    lo = tuple(float(max(a, min(f, m - STEEPEST))) for a, f, m in zip(tokens.lo, floor, middle, strict=True))
    return replace(tokens, lo=lo, hi=tuple(2 * m - a for a, m in zip(lo, middle, strict=True)))
