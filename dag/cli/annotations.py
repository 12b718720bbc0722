"""Annotated pictures for token training: drawn or read from a folder, kept there, and shown beside their maps."""

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import dag
from dag import ddim
from dag.cam import normalise
from dag.config import SIDE, STEPS
from dag.sampling import noise
from dag.text import WEIGHTS
from dag.tokens import Reading
from weights.files import atomic_write
from weights.queries import CONCEPT, AnnotatedQueries, QueryHook

from .annotators import kind_of
from .parsing import UsageError, slug, warn
from .pictures import contact_sheet, from_pil, opened, overlay, save_png, to_pil
from .prompts import concept_and_look_alikes

STRIDE = 2  # every second noise level of a run is kept, 25 of 50


@dataclass(frozen=True)
class Job:
    """A picture to draw. kind: CONCEPT, or the name of a kind of look-alike."""

    name: str
    prompt: str
    seed: int
    kind: str

    @property
    def entry(self) -> dict:
        """What captions.json says of it."""
        return {"prompt": self.prompt, "seed": self.seed, "kind": self.kind}


class Prompts:
    """An endless supply of pictures to draw, of the concept and of look-alikes; no two have the same seed.

    From --prompts; else, for the miniature's own kinds, from the grammar of its world; else from the file that comes
    along for this concept. Raises UsageError where there is none, ValueError for a file that cannot be used.
    """

    def __init__(self, args: argparse.Namespace, sd: dag.StableDiffusion, concept: str):
        kind, shipped = kind_of(sd, concept), WEIGHTS / "prompts" / f"{slug(concept)}.txt"
        if args.prompts is None and kind is not None:
            from weights.shapes import world

            named = world.showing(kind, kind, 240, random.Random(args.seed))
            near = world.look_alikes(kind, 240, args.seed)
            own, alike = [p for p, _ in named], {k: [p for p, _ in some] for k, some in near.items()}
        else:
            if args.prompts is None and not shipped.is_file():
                raise UsageError(
                    f"--concept '{concept}': no prompts for it come along; expected --prompts FILE (see --help)"
                )
            own, pairs = concept_and_look_alikes(args.prompts or shipped)
            alike: dict[str, list[str]] = {}
            for prompt, k in pairs:
                alike.setdefault(k, []).append(prompt)
        self.kinds = list(alike)
        self.supply = {k: itertools.cycle(prompts) for k, prompts in {CONCEPT: own, **alike}.items()}
        self.seeds = itertools.count(1000 * (args.seed + 1))

    def jobs(self, kinds: Iterable[str], name: str) -> list[Job]:
        """A job of each of these kinds."""
        return [Job(f"{name}-{i:03d}.png", next(self.supply[k]), next(self.seeds), k) for i, k in enumerate(kinds)]


def draw(
    sd: dag.StableDiffusion,
    data: AnnotatedQueries,
    jobs: list[Job],
    folder: Path,
    batch: int,
    title: str,
    passing: bool = False,
) -> Iterator[tuple[list[Job], Tensor, AnnotatedQueries]]:
    """Draw pictures at the size of `data`; of each batch the jobs, pictures (batch, 3, height, width), and queries.

    The queries, with masks of 0, come from the very calls of the UNet that draw. folder: for the file they are kept in.
    passing: there is room for a single batch, whose queries the next one's replace.
    """
    (H, W), factor = data.masks.shape[1:], sd.config.vae.factor
    room, hook = data.room(min(batch, len(jobs)) if passing else len(jobs), folder), QueryHook(data.layers)
    with progress(None, title, len(jobs) * STEPS) as bar:
        for first in range(0, len(jobs), batch):
            part, at = jobs[first : first + batch], 0 if passing else first
            own = room[at : at + len(part)]  # (batch, levels, sum of h*n*d)
            prompts, seeds = [job.prompt for job in part], [job.seed for job in part]
            size = {"height": H * factor, "width": W * factor}
            for step in dag.sample(sd, prompts, dag.Guidance(), seeds=seeds, hooks=[hook], **size):
                if step.i % STRIDE == 0:
                    own[:, step.i // STRIDE] = hook.caught()
                bar.update(len(part))
            found = data.subset([])
            found.add(own, torch.zeros(len(part), H, W), [job.kind for job in part])
            yield part, sd.decode(step.x).cpu(), found


def on_grid(sd: dag.StableDiffusion, masks: Tensor) -> Tensor:
    """Masks of pictures (N, height, width) -> on the latent grid, by their area (N, H, W)."""
    return F.avg_pool2d(masks[:, None], sd.config.vae.factor)[:, 0]


def nothing_yet(sd: dag.StableDiffusion, reading: Reading, height: int, width: int) -> AnnotatedQueries:
    """No pictures of a size in pixels, at the noise levels that are kept."""
    times = [t for t, _ in ddim.time_pairs(STEPS, sd.config.schedule)[::STRIDE]]
    return AnnotatedQueries(sd, reading, times, height // sd.config.vae.factor, width // sd.config.vae.factor)


def cost(
    sd: dag.StableDiffusion, data: AnnotatedQueries, pictures: int, batch: int, rounds: int, more: int, folder: Path
) -> str:
    """What drawing will take, from a timed UNet call: of a batch, two rows a picture."""
    batch = min(batch, pictures)
    x = torch.zeros(2 * batch, sd.config.unet.in_channels, *data.masks.shape[1:], device=sd.device)
    context, t = sd.text.encode([""] * len(x)), torch.full((len(x),), 500, device=sd.device)
    for _ in range(2):  # the first call is slower
        began = time.perf_counter()
        with torch.no_grad():
            sd.unet(x, t, context).sum().item()  # waits for the device
        seconds = (time.perf_counter() - began) / batch
    minutes = [n * STEPS * seconds / 60 for n in (pictures, more)]
    size = 2 * len(data.times) * sum(h * n * d for h, n, d in data.shapes) * pictures / 1e9
    mining = f"; then up to {rounds} rounds of mining, {minutes[1]:.1f} minutes each" if rounds else ""
    return (
        f"{pictures} pictures x {STEPS} steps x 2 UNet rows: about {minutes[0]:.1f} minutes{mining}. Their queries "
        f"take {size:.1f} GB in {folder} while this runs"
    )


def save(folder: Path, jobs: Sequence[Job], pictures: Tensor, masks: Tensor) -> None:
    """Add pictures (N, 3, height, width), masks (N, height, width) and captions to a folder that --data reads."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = folder / "captions.json"
    entries = json.loads(captions.read_text(encoding="utf-8")) if captions.exists() else {}
    for job, picture, mask in zip(jobs, to_pil(pictures), masks, strict=True):
        save_png(picture, folder / job.name)
        if mask.max() > 0:
            stencil = Image.fromarray((mask.numpy() * 255).round().astype(np.uint8))
            save_png(stencil, folder / job.name.replace(".png", ".mask.png"))
        entries[job.name] = job.entry
    with atomic_write(captions) as temporary:
        temporary.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_folder(folder: Path, sd: dag.StableDiffusion) -> tuple[Tensor, Tensor, list[Job], bool]:
    """DIR -> pictures (N, 3, height, width) in [-1, 1], masks (N, H, W) in [0, 1], their jobs, and if all have seeds.

    Pictures that captions.json says are of the concept, but that have no mask, are left out, with a warning.
    """
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
        masks.append(on_grid(sd, mask[None]))  # (1, H, W)
        if mask.max() > 0 and masks[-1].max() < 0.5:
            side = sd.config.vae.factor
            raise ValueError(
                f"{mask_path}: covers no half of any {side} x {side} pixels, too small to learn; leave the picture out"
            )
    entries = captions_of(folder, names)
    jobs = [job_of(name, entry, mask) for name, entry, mask in zip(names, entries, masks, strict=True)]
    kept = [i for i, job in enumerate(jobs) if job is not None]
    if left := [name for name, job in zip(names, jobs, strict=True) if job is None]:
        warn(f"{folder}: {len(left)} pictures of the concept without a mask are left out, such as {left[0]}")
    if not any(mask.max() > 0 for mask in masks):
        raise ValueError(f"{folder}: no unsafe picture, every mask is missing; expected at least one NAME.mask.png")
    return torch.cat(pictures)[kept], torch.cat(masks)[kept], [jobs[i] for i in kept], all("seed" in e for e in entries)


def captions_of(folder: Path, names: list[str]) -> list[dict]:
    """What captions.json says of each picture, with at least a prompt. Raises ValueError."""
    path = folder / "captions.json"
    try:
        captions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if unknown := [name for name in captions if name not in names]:
            warn(f"{path}: tells of {len(unknown)} pictures that are not there, such as {unknown[0]}")
        entries = [captions.get(name, "") for name in names]
        entries = [e if isinstance(e, dict) else {"prompt": str(e)} for e in entries]
        return [e | {"prompt": str(e["prompt"])} | ({"seed": int(e["seed"])} if "seed" in e else {}) for e in entries]
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: {e}; expected a JSON object of NAME.png to text, see --help") from e


def job_of(name: str, entry: dict, mask: Tensor) -> Job | None:
    """A picture of a folder; None for one that is said to be of the concept and has no mask (height, width)."""
    unsafe = mask.max().item() > 0
    kind = entry.get("kind", CONCEPT if unsafe else "safe")
    return None if kind == CONCEPT and not unsafe else Job(name, entry["prompt"], entry.get("seed", 0), str(kind))


def from_noised(
    sd: dag.StableDiffusion, data: AnnotatedQueries, pictures: Tensor, jobs: list[Job], folder: Path
) -> Tensor:
    """Queries (N, levels, sum of h*n*d) of given pictures with noise added, one after the other."""
    room, hook = data.room(len(jobs), folder), QueryHook(data.layers)
    latents = sd.encode(pictures).cpu()  # (N, 4, H, W)
    start, context = noise(list(range(len(latents))), latents.shape[1:]), sd.text.encode([job.prompt for job in jobs])
    with torch.no_grad():
        for k, t in enumerate(progress(data.times, "queries")):
            x = ddim.add_noise(latents, start, sd.alphas_cumprod[t].cpu()).to(sd.device)
            for i in range(len(jobs)):
                sd.unet(x[i : i + 1], torch.tensor([t], device=sd.device), context[i : i + 1], [hook])
                room[i : i + 1, k] = hook.caught()
    return room


def progress(items: Iterable | None, title: str, total: int | None = None) -> tqdm:
    """A progress bar that keeps quiet where nobody watches; without items it is moved by hand."""
    return tqdm(items, title, total, leave=False, disable=None)


def save_sheet(
    data: AnnotatedQueries, before: dag.GuidelineTokens, after: dag.GuidelineTokens, pictures: Tensor, path: Path
) -> None:
    """The contact sheet: picture | mask | map before | map after at three noise levels.

    8 pictures of the concept, and of the others the 8 whose maps are highest: those that are most likely confused.
    """
    levels = [min(range(len(data.times)), key=lambda k: abs(data.times[k] - t)) for t in (801, 501, 201)]
    maps = {}
    for when, tokens in (("before", before), ("after", after)):
        raw = [data.all_maps(tokens.embedding.to(data.device), tokens.split, k) for k in levels]  # (N, H, W) each
        maps[when] = [normalise(tokens, one, data.times[k]) for one, k in zip(raw, levels, strict=True)]
    high = torch.stack(maps["after"]).mean((0, 2, 3))  # (N,)
    unsafe, safe = data.unsafe.nonzero()[:, 0], (~data.unsafe).nonzero()[:, 0]
    rows = []
    for i in [*unsafe[:8].tolist(), *safe[high[safe].argsort(descending=True)][:8].tolist()]:
        (picture,) = to_pil(pictures[i : i + 1])
        mask = F.interpolate(data.masks[i][None, None], picture.size[::-1])[0]  # (1, height, width)
        cells = [picture, *to_pil(mask[None].expand(1, 3, -1, -1) * 2 - 1)]
        for k in range(len(levels)):
            cells += [overlay(picture, maps[when][k][i]) for when in ("before", "after")]
        rows.append((data.kinds[i] or "the concept", cells))
    heads = ["picture", "mask", *(f"t {data.times[k]} {when}" for k in levels for when in ("before", "after"))]
    save_png(contact_sheet(rows, heads, side=112), path)
