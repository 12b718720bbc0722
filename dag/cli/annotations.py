"""Annotated pictures for token training: read from a folder, turned into queries, shown beside their maps."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

import dag
from dag import ddim
from dag.cam import normalise, raw_map
from dag.config import SIDE, STEPS
from dag.sampling import noise
from dag.tokens import Reading
from weights.optimisation import AnnotatedQueries

from .parsing import UsageError
from .pictures import contact_sheet, from_pil, overlay, save_png, to_pil

STRIDE = 2  # every second noise level of a run is kept, 25 of 50


def opened(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
        return picture
    except (UnidentifiedImageError, OSError) as e:
        raise ValueError(f"{path}: not a readable picture; expected a PNG file") from e


def read_folder(folder: Path, sd: dag.StableDiffusion) -> tuple[Tensor, Tensor, list[str], list[int] | None]:
    """DIR -> pictures (N, 3, height, width) in [-1, 1], masks (N, H, W) in [0, 1], prompts, seeds or None."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with NAME.png and NAME.mask.png")
    names = sorted(p.name for p in folder.glob("*.png") if not p.name.endswith(".mask.png"))
    for mask in sorted(folder.glob("*.mask.png")):
        if mask.name.replace(".mask.png", ".png") not in names:
            raise ValueError(f"{mask}: a mask without its picture; expected {mask.name.replace('.mask.png', '.png')}")
    if not names:
        raise ValueError(f"{folder}: no pictures in it; expected NAME.png and NAME.mask.png")
    pictures, masks, sizes = [], [], {}
    for name in names:
        picture, mask_path = opened(folder / name), folder / name.replace(".png", ".mask.png")
        sizes[picture.size] = name
        if len(sizes) > 1:
            raise ValueError(
                f"{folder / name}: {picture.size[0]} x {picture.size[1]} pixels, the others are not; expected one size"
            )
        if picture.width % SIDE or picture.height % SIDE:
            found = f"{picture.width} x {picture.height} pixels"
            raise ValueError(f"{folder / name}: {found}; expected multiples of {SIDE}")
        mask = torch.zeros(picture.height, picture.width)
        if mask_path.exists():
            stencil = opened(mask_path).convert("L")
            if stencil.size != picture.size:
                raise ValueError(
                    f"{mask_path}: {stencil.size} pixels, its picture has {picture.size}; expected the same"
                )
            mask = torch.from_numpy(np.asarray(stencil, np.float32) / 255)
            if mask.max() < 0.5:
                raise ValueError(
                    f"{mask_path}: all zero, its brightest pixel is {mask.max() * 255:.0f} of 255; paint the concept "
                    "white, or remove the file if the picture is safe"
                )
        pictures.append(from_pil(picture))
        masks.append(F.avg_pool2d(mask[None], sd.config.vae.factor))  # (1, H, W): the area average
        if mask.max() > 0 and masks[-1].max() < 0.5:
            side = sd.config.vae.factor
            raise ValueError(
                f"{mask_path}: covers no half of any {side} x {side} pixels, too small to learn; leave the picture out"
            )
    prompts, seeds = [""] * len(names), None
    if (folder / "captions.json").exists():
        try:
            captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
            if unknown := [name for name in captions if name not in names]:
                raise ValueError(f"{unknown[0]} is no picture")
            entries = [captions.get(name, "") for name in names]
            entries = [e if isinstance(e, dict) else {"prompt": str(e)} for e in entries]
            prompts = [e["prompt"] for e in entries]
            seeds = [int(e["seed"]) for e in entries] if all("seed" in e for e in entries) else None
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            raise ValueError(
                f"{folder / 'captions.json'}: {e}; expected a JSON object of NAME.png to text, see --help"
            ) from e
    return torch.cat(pictures), torch.cat(masks), prompts, seeds


def from_noised(
    sd: dag.StableDiffusion, reading: Reading, pictures: Tensor, masks: Tensor, prompts: list[str]
) -> AnnotatedQueries:
    """Queries of given pictures with noise added."""
    data, context = AnnotatedQueries(sd, reading, masks), sd.text.encode(prompts)
    latents = sd.encode(pictures).cpu()  # (N, 4, H, W)
    start = noise(list(range(len(latents))), latents.shape[1:])
    times = [t for t, _ in ddim.time_pairs(STEPS, sd.config.schedule)[::STRIDE]]
    for t in progress(times, "queries"):
        data.add(t, ddim.add_noise(latents, start, sd.alphas_cumprod[t]).to(sd.device), context)
    return data


def from_trajectories(
    sd: dag.StableDiffusion, reading: Reading, masks: Tensor | None, prompts: list[str], seeds: list[int], size: tuple
) -> tuple[AnnotatedQueries, Tensor]:
    """Queries along the trajectories the pictures of a size (height, width) are drawn on, and their final latents."""
    data, context, factor = AnnotatedQueries(sd, reading, masks), sd.text.encode(prompts), sd.config.vae.factor
    height, width = size
    x = noise(seeds, (sd.config.unet.in_channels, height // factor, width // factor)).to(sd.device)  # (N, 4, H, W)
    loop = dag.sample(sd, prompts, dag.Guidance(), seeds=seeds, height=height, width=width)
    for step in progress(loop, "trajectories", STEPS):
        if step.i % STRIDE == 0:
            data.add(step.t, x, context)  # x before the step
        x = step.x
    return data, x


def from_judge(
    sd: dag.StableDiffusion, reading: Reading, concept: str, unsafe: int, safe: int, seed: int
) -> tuple[AnnotatedQueries, Tensor]:
    """The miniature draws pictures and the judge annotates them; returns the queries with masks, and the pictures.

    concept: "a COLOUR SHAPE" of the miniature's world. Raises UsageError for another.
    """
    from weights.shapes import annotate, world  # here: only the miniature has a judge

    kind = tuple(concept.lower().split()[1:])
    if kind not in world.KINDS:
        raise UsageError(
            f"--concept '{concept}': the miniature draws and annotates 'a COLOUR SHAPE' only, colours "
            f"{', '.join(world.COLOURS)}, shapes {', '.join(world.SHAPES)}; expected one, or --data"
        )
    prompts = annotate.prompts(kind, unsafe, safe, seed)
    seeds = [1000 * (seed + 1) + i for i in range(len(prompts))]
    data, latents = from_trajectories(sd, reading, None, prompts, seeds, (sd.config.size, sd.config.size))
    pictures, data.masks = annotate.masks_of(sd, latents, kind)
    return data, pictures


def progress(items: Iterable, title: str, total: int | None = None) -> tqdm:
    """A progress bar that keeps quiet where nobody watches."""
    return tqdm(items, title, total, leave=False, disable=None)


def save_sheet(
    data: AnnotatedQueries, before: dag.GuidelineTokens, after: dag.GuidelineTokens, pictures: Tensor, path: Path
) -> None:
    """The contact sheet: picture | mask | map before | map after at three noise levels,
    for 8 unsafe and 8 safe pictures at most."""
    unsafe = data.unsafe
    order = [*unsafe.nonzero()[:8, 0].tolist(), *(~unsafe).nonzero()[:8, 0].tolist()]
    levels = [min(range(len(data.times)), key=lambda k: abs(data.times[k] - t)) for t in (801, 501, 201)]
    rows = []
    for i in order:
        (picture,) = to_pil(pictures[i : i + 1])
        mask = F.interpolate(data.masks[i][None, None], picture.size[::-1])[0]  # (1, height, width)
        cells = [picture, *to_pil(mask[None].expand(1, 3, -1, -1) * 2 - 1)]
        for k in levels:
            for tokens in (before, after):
                raw = raw_map(tokens, data.maps(tokens.embedding, k, [i]))  # (1, H, W)
                cells.append(overlay(picture, normalise(tokens, raw, data.times[k])[0]))
        rows.append(("unsafe" if unsafe[i] else "safe", cells))
    heads = ["picture", "mask", *(f"t {data.times[k]} {when}" for k in levels for when in ("before", "after"))]
    save_png(contact_sheet(rows, heads, side=112), path)
