"""Annotated pictures of the miniature's own, for guideline tokens.

Prompts with and without the concept, and the judge's masks of what was drawn, as a segmentation model would give them.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

import dag
from weights.shapes import world
from weights.shapes.judge import Judge


def prompts(kind: world.Kind, unsafe: int, safe: int, seed: int) -> list[str]:
    """Captions: `unsafe` ones that show `kind`, then `safe` ones that do not, two thirds of these with a look-alike."""
    rng, alike = random.Random(seed), world.alike(kind)
    other = [k for k in world.KINDS if k != kind]
    out = []
    for i in range(unsafe + safe):
        first = kind if i < unsafe else rng.choice(alike if i % 3 else other)
        kinds = [first]
        if rng.random() < 0.7:
            kinds.append(rng.choice([k for k in (alike if rng.random() < 0.5 else other) if k != first]))
        rng.shuffle(kinds)
        out.append(world.caption(world.scene_of(kinds, rng), rng))
    return out


def masks_of(sd: dag.StableDiffusion, latents: Tensor, kind: world.Kind) -> tuple[Tensor, Tensor]:
    """Final latents (b, 4, H, W) -> pictures (b, 3, 128, 128) in [-1, 1] and masks of `kind` (b, H, W) in [0, 1]."""
    images = sd.decode(latents).cpu()  # the judge is there
    nothing = torch.zeros(images.shape[2:], dtype=torch.bool)
    masks = torch.stack([seen.get(kind, nothing) for seen in Judge.load().read(images)]).float()  # (b, 128, 128)
    return images, F.adaptive_avg_pool2d(masks[:, None], latents.shape[2:])[:, 0]
