"""Annotated pictures as the optimisation sees them: the queries that the UNet computed for them, masks and kinds."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dag.attention import NO_ROWS, CrossAttention, Hook
from dag.cam import combine, guideline_maps, keys_by_layer, layers_of, normalise
from dag.config import NORMALISATIONS, Scaling
from dag.scalers import objects
from dag.tokens import GuidelineTokens, Reading

CHUNK = 16  # pictures looked at at once where all are: of SD 1.4 their queries at one noise level are 0.3 GB in float32
CONCEPT = ""  # the kind of a picture that shows the concept


class QueryHook(Hook):
    """Catches the conditional rows' queries of a UNet call; a loop that draws pictures pays nothing else for them."""

    def __init__(self, layers: list[CrossAttention]):
        self.queries: dict[CrossAttention, Tensor | None] = dict.fromkeys(layers)  # become (b, h, n, d)

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> None:
        if layer in self.queries and self.call.cond != NO_ROWS:
            self.queries[layer] = q[self.call.cond]

    def caught(self) -> Tensor:
        """The last call's, all layers of a picture in one row: (b, sum of h*n*d) float16 on the CPU."""
        return torch.cat([q.flatten(1) for q in self.queries.values()], 1).to("cpu", torch.float16)


class AnnotatedQueries:
    """Queries of pictures at several noise levels, with masks: all that the optimisation needs of the model.

    times: the levels' timesteps, in the order of the queries. Per picture: queries (levels, sum of h*n*d) float16, a
    mask (H, W) in [0, 1] on the latent grid, all zero where the concept is not, and its kind, CONCEPT or the name of a
    kind of look-alike.
    """

    def __init__(self, sd, reading: Reading, times: Sequence[int], H: int, W: int):
        self.reading, self.times = reading, list(times)
        self.layers = layers_of(sd.unet, reading)
        self.device = sd.device
        self.queries: list[Tensor] = []
        self.masks = torch.zeros(0, H, W)
        self.kinds: list[str] = []

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(h, n, d) of every layer."""
        H, W = self.masks.shape[1:]
        sizes = [(layer.num_heads, layer.to_q.out_features // layer.num_heads, layer.factor) for layer in self.layers]
        return [(h, (H // f) * (W // f), d) for h, d, f in sizes]

    def room(self, pictures: int, folder: Path) -> Tensor:
        """Place for the queries of so many pictures, (pictures, levels, sum of h*n*d) float16, in a file of `folder`.

        The file has no name and is gone with the tensor or the process. A picture of SD 1.4 has 0.25 GB at 25 levels:
        the system decides what of it stays in memory. Raises ValueError where the disk has no room.
        """
        shape = pictures, len(self.times), sum(h * n * d for h, n, d in self.shapes)
        size = 2 * int(np.prod(shape))
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, in a mapped file it is a crash
                    os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=shape))
        except OSError as e:
            raise ValueError(
                f"{folder}: no room for {size / 1e9:.1f} GB of queries ({e.strerror}); free some, ask for fewer "
                "pictures, or name a folder on another disk with --out"
            ) from e

    def add(self, queries: Sequence[Tensor], masks: Tensor, kinds: Sequence[str]) -> None:
        """More pictures: queries (levels, sum of h*n*d) each, masks (N, H, W) and kinds."""
        self.queries += list(queries)
        self.masks = torch.cat([self.masks, masks])
        self.kinds += kinds

    def merge(self, other: "AnnotatedQueries") -> None:
        """The pictures of another, too."""
        self.add(other.queries, other.masks, other.kinds)

    def subset(self, images: Sequence[int]) -> "AnnotatedQueries":
        """Some of the pictures; nothing is copied."""
        some = object.__new__(AnnotatedQueries)
        vars(some).update(vars(self))
        some.queries, some.kinds = [self.queries[i] for i in images], [self.kinds[i] for i in images]
        some.masks = self.masks[list(images)]
        return some

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def unsafe(self) -> Tensor:
        """(N,) bool: the concept covers at least half of some latent pixel."""
        return self.masks.amax((1, 2)) >= 0.5

    def maps(self, c: Tensor, split: Sequence[int], k: int, images: Sequence[int]) -> Tensor:
        """Raw maps (images, H, W) of pictures at the k-th noise level, on c's device.

        c: an embedding, (g, c_text) or (layers, g, c_text).
        """
        flat = torch.stack([self.queries[i][k] for i in images]).to(c.device)  # (images, sum of h*n*d)
        parts = flat.split([h * n * d for h, n, d in self.shapes], dim=1)
        maps = [
            guideline_maps(q.unflatten(1, shape), k_g, split, self.reading.heads)
            for k_g, q, shape in zip(keys_by_layer(self.layers, c).values(), parts, self.shapes, strict=True)
        ]  # (images, 1, n) each
        return combine(maps, [layer.factor for layer in self.layers], *self.masks.shape[1:])[:, 0]

    def all_maps(self, c: Tensor, split: Sequence[int], k: int) -> Tensor:
        """`maps` of every picture, (N, H, W), on the CPU."""
        images = range(len(self))
        chunks = [self.maps(c, split, k, images[i : i + CHUNK]).cpu() for i in images[::CHUNK]]
        return torch.cat(chunks)

    @torch.no_grad()
    def measure(self, tokens: GuidelineTokens, scaling: Scaling) -> dict[str, "Seen"]:
        """How well tokens detect, under each normalisation that they have the constants for."""
        seen = {how: [] for how in NORMALISATIONS if how != "fitted" or tokens.levels}
        for k, t in enumerate(self.times):
            raw = self.all_maps(tokens.embedding.to(self.device), tokens.split, k)  # (N, H, W)
            for how, levels in seen.items():
                levels.append(self.seen(normalise(replace(tokens, normalisation=how), raw, t), scaling))
        return {how: Seen(*map(torch.stack, zip(*levels, strict=True))) for how, levels in seen.items()}

    def seen(self, A: Tensor, scaling: Scaling) -> tuple[Tensor, ...]:
        """What the maps A (N, H, W) of one noise level show of the masks: the fields of Seen, (N,) each."""
        found, mask = objects(A, scaling)[0] > 0, self.masks >= 0.5  # (N, H, W)
        iou = (found & mask).sum((1, 2)) / (found | mask).sum((1, 2)).clamp(min=1)
        edit, core = ((A >= threshold).float().mean((1, 2)) for threshold in (scaling.edit, scaling.unsafe))
        acts = found.flatten(1).any(1) & (edit < scaling.full)  # Algorithm 1 ignores the others
        return iou, found.flatten(1).any(1).float(), edit, core, acts.float()


class Seen(NamedTuple):
    """What tokens detect at every noise level in every picture, (levels, N) each."""

    iou: Tensor  # of the objects with the mask
    found: Tensor  # 1 where there is an object
    edit: Tensor  # share of the frame with A >= Scaling.edit
    core: Tensor  # share of the frame with A >= Scaling.unsafe
    acts: Tensor  # 1 where the picture would be guided: something is found, and the map does not fill the frame

    def of(self, images: Tensor) -> "Seen":
        """Some of the pictures: indices, or (N,) bool."""
        return Seen(*(values[:, images] for values in self))


def choose(seen: dict[str, Seen], unsafe: Tensor) -> str | None:
    """The normalisation that guides many unsafe pictures and few safe ones; None if none guides more of the former."""
    gain = {how: (v.of(unsafe).acts.mean() - v.of(~unsafe).acts.mean().nan_to_num()).item() for how, v in seen.items()}
    best = max(gain, key=gain.get)
    return best if gain[best] > 0 else None
