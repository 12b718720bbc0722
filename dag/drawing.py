"""Drawings: a picture, how it came about, and what is said of it. What sample.py shows, without its files and flags."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .config import DAGConfig, Scaling
from .guidance import CFG, remember
from .model import StableDiffusion
from .pictures import contact_sheet, overlay, to_pil
from .sampling import Step, sample
from .scalers import objects
from .tokens import GuidelineTokens


@dataclass
class Drawing:
    """One picture by one method, and what happened on the way."""

    prompt: str
    seed: int
    method: str
    image: Image.Image
    seconds: float
    rows: int  # sent through the UNet
    tokens: tuple[GuidelineTokens, ...]  # of the concepts looked for; empty for methods without maps
    maps: Tensor | None  # (steps, concepts, H, W), A of every step; None for methods without maps
    strength: Tensor | None  # (steps,) largest S of every step
    guided: list[bool]  # per step

    @property
    def A(self) -> Tensor:
        """(steps, H, W): the largest of all concepts' maps."""
        return self.maps.amax(1)

    def telling(self, cfg: DAGConfig) -> Tensor:
        """The maps after warm-up that say what happened, (steps - warm-up, concepts, H, W).

        Those that were guided by, with what was seen before them remembered; the steps' own if nothing was guided.
        """
        return (acted_on(self.maps, cfg) if any(self.guided) else self.maps)[cfg.warmup :]

    def findings(self, cfg: DAGConfig) -> dict:
        """The report's account of detection: of all concepts together, and under `found` of each that was found.

        `detected` is None where nothing was looked for: by methods without maps, or in the warm-up alone.
        """
        steps = sum(self.guided)
        nothing = {"detected": None, "map_max": None, "steps_guided": steps, "scale_max": None, "found": {}}
        if self.maps is None:
            return nothing | {"not_guided_reason": None}
        late = self.telling(cfg)
        if len(late) == 0:
            return nothing | {"not_guided_reason": "warm-up"}
        found = {c.concept: place(late[:, k], c.scaling(cfg.scaling)) for k, c in enumerate(self.tokens)}
        found = {name: where for name, where in found.items() if where["steps"]}
        return {
            "detected": bool(found),
            "map_max": round(self.maps[cfg.warmup :].max().item(), 4),
            "steps_guided": steps,
            "scale_max": round(self.strength[cfg.warmup :].max().item(), 3),
            "not_guided_reason": None if steps else "fills the frame" if found else "nothing found",
            "found": found,
        }

    def shown_map(self, cfg: DAGConfig) -> Tensor:
        """The map at the step after warm-up where most was found, the last step's if there is none, (H, W)."""
        late = self.telling(cfg)
        if len(late) == 0:
            return self.A[-1]
        scalings = [c.scaling(cfg.scaling) for c in self.tokens]
        areas = [torch.cat([objects(a, s)[1] for a, s in zip(A, scalings, strict=True)]) for A in late]
        return late.amax(1)[largest(late.amax(1), areas)]

    def words(self, cfg: DAGConfig) -> str:
        """One line for a person: what was found, where, how long it was guided and what that cost."""
        said = self.findings(cfg)
        what = f"'{self.prompt}' (seed {self.seed}), {self.method}: "
        if said["steps_guided"] == 0:
            return what + f"{said['not_guided_reason']}, {self.rows} UNet rows, as without guidance"
        found = [f"{name} at the {where['place']} ({where['share']:.0%})" for name, where in said["found"].items()]
        found = " and ".join(found) or "no object"  # guidance without Algorithm 1 needs none
        return what + (
            f"found {found}, guided on {said['steps_guided']} of {len(self.guided)} steps, "
            f"{self.rows} UNet rows instead of {2 * len(self.guided)}"
        )


def acted_on(maps: Tensor, cfg: DAGConfig) -> Tensor:
    """Maps A of every step (steps, ..., H, W) -> the maps DAG guides by at these steps, of the same shape."""
    out = [torch.zeros(())]  # before the first step: nothing
    for A in maps:
        out.append(remember(A, out[-1], cfg))
    return torch.stack(out[1:])


def largest(maps: Tensor, areas: list[Tensor]) -> int:
    """The step of maps (steps, H, W) at which the areas of the objects found, then the map, are largest."""
    sizes = [(found.sum().item(), A.sum().item()) for found, A in zip(areas, maps, strict=True)]
    return max(range(len(sizes)), key=sizes.__getitem__)


def place(maps: Tensor, scaling: Scaling) -> dict:
    """Where a concept's maps (steps, H, W) show it: on how many steps, and its place and share when largest."""
    found = [objects(A, scaling) for A in maps]
    step = largest(maps, [areas for _, areas in found])
    A, (labels, areas) = maps[step], found[step]
    if len(areas) == 0:
        return {"steps": 0}
    y, x = (labels == 1 + areas.argmax()).nonzero().float().mean(0).tolist()  # of the largest object
    row, column = int(3 * y / A.shape[0]), int(3 * x / A.shape[1])
    return {
        "steps": sum(len(areas) > 0 for _, areas in found),
        "place": f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}",
        "share": round(areas.sum().item(), 4),
    }


def draw(
    sd: StableDiffusion,
    jobs: list[tuple[str, int]],
    method: str,
    guidance: CFG,
    steps: int,
    scale: float,
    size: tuple[int, int],
    progress: Callable[[Iterator[Step]], Iterator[Step]] = iter,
) -> list[Drawing]:
    """Draw one batch of (prompt, seed), size (height, width), with one method; `progress` wraps the loop."""
    began = time.time()
    loop = sample(sd, [p for p, _ in jobs], guidance, steps, scale, [s for _, s in jobs], *size)
    history = list(progress(loop))
    last = history[-1]
    images = to_pil(sd.decode(last.x))
    rows = torch.stack([s.rows for s in history]).sum(0).tolist()  # (b,)
    guided = torch.stack([s.guided for s in history], 1).tolist()  # (b, steps)
    maps = strength = [None] * len(jobs)
    if last.A is not None:
        maps = torch.stack([s.concepts for s in history], 1).cpu()  # (b, steps, concepts, H, W)
        strength = torch.stack([s.S.flatten(1).amax(1) for s in history], 1).cpu()  # (b, steps)
    seconds = (time.time() - began) / len(jobs)
    return [
        Drawing(prompt, seed, method, images[k], seconds, rows[k], guidance.tokens, maps[k], strength[k], guided[k])
        for k, (prompt, seed) in enumerate(jobs)
    ]


def sheet(
    rows: list[tuple[Drawing, ...]], cfg: DAGConfig, read: Callable[[Image.Image], str] | None = None
) -> Image.Image:
    """The contact sheet: a row a picture, a column a method; before a method with maps, its map over the first column.

    With a single method without maps, four pictures a row. read: what to write under a picture.
    """
    note = read or (lambda image: "")
    if len(rows[0]) == 1 and rows[0][0].maps is None:
        flat = [d for (d,) in rows]
        parts = [flat[k : k + 4] for k in range(0, len(flat), 4)]
        table = [(" | ".join(d.prompt for d in part), [d.image for d in part]) for part in parts]
        heads, notes = [], [[note(d.image) for d in part] for part in parts]
    else:
        names = ["unguided" if d.method == "none" else f"guided: {d.method}" for d in rows[0]]
        heads = [
            h for d, name in zip(rows[0], names, strict=True) for h in ([] if d.maps is None else ["map"]) + [name]
        ]
        table, notes = [], []
        for row in rows:
            cells, under = [], []
            for d in row:
                cells += [] if d.maps is None else [overlay(row[0].image, d.shown_map(cfg))]
                under += [] if d.maps is None else [""]
                cells.append(d.image)
                under.append(note(d.image))
            table.append((row[0].prompt, cells))
            notes.append(under)
    return contact_sheet(table, heads, notes=notes if read else None)
