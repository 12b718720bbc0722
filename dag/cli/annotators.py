"""Who says where the concept is in the pictures that were drawn: the model itself, GroundingDINO and SAM, or the judge.

An annotator is called with pictures (N, 3, height, width) in [-1, 1] and their queries, and returns masks
(N, height, width) in [0, 1]: all zero where it does not see the concept.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import dag
from weights.queries import AnnotatedQueries

from .parsing import UsageError

LATEST = 701  # the model's own maps are averaged from this timestep on: before, the layout is not decided
CONTRAST = 1.5  # the mean of a map where the concept is, at least, over its mean elsewhere; else it is nowhere
LITTLE = ("a", "an", "the", "of", "in", "on", "with", "and", "or")  # words that name nothing

Annotator = Callable[[Tensor, AnnotatedQueries], Tensor]


def annotator(args: argparse.Namespace, sd: dag.StableDiffusion, concept: str) -> Annotator:
    """The one that --annotator names; loads what it needs. Raises UsageError and ValueError."""
    if args.annotator == "maps":
        return Words(sd, concept)
    if args.annotator == "judge":
        return judge(sd, concept)
    from .grounded_sam import DETECTOR, SEGMENTER, GroundedSAM  # here: it takes seconds to import

    models = args.detector_model or DETECTOR, args.segmenter_model or SEGMENTER
    found = GroundedSAM(args.label or [concept], args.not_label or [], *models, sd.device)
    return lambda pictures, data: found.masks(pictures).float()


class Words:
    """The model annotates its own pictures, by the attention that it pays to the concept's words while it draws them.

    Their share in the attention to the whole text of the concept, start, end and padding included, as DAAM (Tang et al.
    2023) and OVAM read it: the formula of dag/cam.py with tokens that were not optimised. Its mean over the later noise
    levels is cut by Otsu's threshold.
    """

    def __init__(self, sd: dag.StableDiffusion, concept: str):
        words, _ = sd.text.places(concept)
        own = [place for word, places in words if word.lower() not in LITTLE for place in places]
        if not own:
            raise UsageError(f"--concept '{concept}': has no word to look for; expected words that name it")
        rows = sd.text.encode([concept])[0].float()  # (m, c_text)
        others = [place for place in range(len(rows)) if place not in own]
        self.c, self.split = rows[others + own], [len(others), len(own)]  # (m, c_text)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, data: AnnotatedQueries) -> Tensor:
        late = [k for k, t in enumerate(data.times) if t <= LATEST]
        maps = torch.stack([data.all_maps(self.c, self.split, k) for k in late]).mean(0)  # (N, H, W)
        masks = torch.stack([cut(one) for one in maps])  # (N, H, W)
        return F.interpolate(masks[:, None], pictures.shape[2:])[:, 0]  # (N, height, width)


def cut(raw: Tensor) -> Tensor:
    """A map (H, W) -> where it is high, (H, W) of 0 and 1: Otsu's threshold, all 0 where there is too little contrast.

    The threshold (Otsu 1979) is the one between whose two sides the variance is largest.
    """
    values = raw.flatten().double().sort().values  # (H*W,)
    below = torch.arange(1, len(values), dtype=torch.float64)  # how many values are below each possible threshold
    sums = values.cumsum(0)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(values) - below)  # means of both sides
    best = (below * (len(values) - below) * (high - low) ** 2).argmax()
    return (raw > values[best]).float() * float(high[best] >= CONTRAST * low[best])


def judge(sd: dag.StableDiffusion, concept: str) -> Annotator:
    """The miniature's own detector. Raises UsageError for another model or a concept it does not know."""
    from weights.shapes.judge import Judge

    kind = kind_of(sd, concept)
    if kind is None:
        raise UsageError(
            f"--annotator judge: knows 'a COLOUR SHAPE' of the miniature only; expected maps for '{concept}'"
        )
    read = Judge.load().read

    def masks(pictures: Tensor, data: AnnotatedQueries) -> Tensor:
        nothing = torch.zeros(pictures.shape[2:], dtype=torch.bool)
        return torch.stack([seen.get(kind, nothing) for part in pictures.split(32) for seen in read(part)]).float()

    return masks


def kind_of(sd: dag.StableDiffusion, concept: str) -> tuple[str, str] | None:
    """The miniature's (colour, shape) that a concept names; None for other models and concepts."""
    from weights.shapes import world

    kind = tuple(concept.lower().split()[1:])
    return kind if sd.config.name == "shapes" and kind in world.KINDS else None
