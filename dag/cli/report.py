"""What is told of a generated picture: which concepts its maps showed, where, and what guidance did."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

import dag
from dag.config import DAGConfig, Scaling
from dag.model import NumericsError
from dag.scalers import objects

from .pictures import contact_sheet, overlay, to_pil


@dataclass
class Drawing:
    """One generated picture by one method, with what its steps said."""

    prompt: str
    seed: int
    method: str
    image: Image.Image | None  # None where it failed
    seconds: float
    unet_rows: int  # sent through the UNet
    cfg: DAGConfig  # constants of the maps
    tokens: tuple[dag.GuidelineTokens, ...]  # of the concepts looked for; may be empty
    A: Tensor | None  # (steps, concepts, H, W), each step's own maps; None for methods without maps
    A_acted: Tensor | None  # (steps, concepts, H, W), the maps that were acted on
    S: Tensor | None  # (steps, H, W), strength
    guided: list[bool]  # per step
    failed: str | None = None  # why there is no picture

    @property
    def late(self) -> Tensor:
        """The maps after warm-up, (steps - warm-up, concepts, H, W): those acted on; the own ones if nothing was."""
        acted = any(self.guided) and self.A_acted is not None
        return (self.A_acted if acted else self.A)[self.cfg.warmup :]

    @property
    def concepts(self) -> dict[str, Scaling]:
        """The concepts' names and constants; numbers stand for the names where a method has maps but no tokens."""
        if self.tokens:
            return {c.concept: c.adapt(self.cfg.scaling) for c in self.tokens}
        return {f"concept {k}": self.cfg.scaling for k in range(1, 1 + self.A.shape[1])}

    @cached_property
    def sizes(self) -> Tensor:
        """Area of the objects found, as shares of the frame, (steps - warm-up, concepts)."""
        scalings = self.concepts.values()
        seen = [objects(A, s)[0] > 0 for A, s in zip(self.late.unbind(1), scalings, strict=True)]  # (steps, H, W) each
        return torch.stack(seen, 1).float().mean((2, 3))

    @cached_property
    def findings(self) -> dict:
        """The report's account of detection: of all concepts together, and under `found` of each that was found.

        `detected` is None where nothing was looked for: by methods without maps, or in the warm-up alone.
        """
        steps, after = sum(self.guided), slice(self.cfg.warmup, None)
        strength = None if self.S is None or not len(self.S[after]) else round(self.S[after].max().item(), 3)
        nothing = {"detected": None, "map_max": None, "steps_guided": steps, "scale_max": strength}
        if self.A is None:
            return nothing | {"not_guided_reason": None, "found": {}}
        if len(self.late) == 0:
            return nothing | {"not_guided_reason": "warm-up", "found": {}}
        found = {
            name: place(self.late[:, k], self.sizes[:, k], scaling)
            for k, (name, scaling) in enumerate(self.concepts.items())
            if self.sizes[:, k].any()
        }
        return {
            "detected": bool(found),
            "map_max": round(self.A[after].max().item(), 4),
            "steps_guided": steps,
            "scale_max": strength,
            "not_guided_reason": None if steps else "fills the frame" if found else "nothing found",
            "found": found,
        }

    @property
    def shown_map(self) -> Tensor | None:
        """The map drawn over the picture, (H, W) in [0, 1]; None for methods without one.

        At the step after warm-up at which most was found, the last step if there is none. S, over its largest value,
        for a method that has no A.
        """
        if self.A is not None:
            if len(self.late) == 0:
                return self.A[-1].amax(0)
            return self.late.amax(1)[largest_step(self.late.amax(1), self.sizes.sum(1))]
        if self.S is None:
            return None
        S = self.S[self.S.flatten(1).sum(1).argmax()]
        return S / S.max().clamp(min=1e-6)

    @property
    def words(self) -> str:
        """One line for a person: what was found, where, how long it was guided and what that cost."""
        said, start = self.findings, f"'{' '.join(self.prompt.split())}' (seed {self.seed}), {self.method}: "
        if said["steps_guided"] == 0:
            return start + f"{said['not_guided_reason']}, {self.unet_rows} UNet rows, as without guidance"
        found = [f"{name} at the {where['place']} ({where['share']:.0%})" for name, where in said["found"].items()]
        return start + (
            f"found {' and '.join(found) or 'no object'}, "  # guidance without Algorithm 1 needs none
            f"guided on {said['steps_guided']} of {len(self.guided)} steps, "
            f"{self.unet_rows} UNet rows instead of {2 * len(self.guided)}"
        )


def largest_step(maps: Tensor, sizes: Tensor) -> int:
    """The step of maps (steps, H, W) at which the sizes of what was found, (steps,), then the map, are largest."""
    order = list(zip(sizes.tolist(), maps.sum((1, 2)).tolist(), strict=True))
    return max(range(len(order)), key=order.__getitem__)


def place(maps: Tensor, sizes: Tensor, scaling: Scaling) -> dict:
    """Where a concept's maps (steps, H, W) show it: on how many steps, and its place and share when largest.

    sizes: of its objects, (steps,), as shares of the frame, at least one of them above 0.
    """
    A = maps[largest_step(maps, sizes)]
    labels, areas = objects(A, scaling)
    largest = labels[areas == areas.max()].min()  # of equal ones the first
    y, x = (labels == largest).nonzero().float().mean(0).tolist()
    row, column = int(3 * y / A.shape[0]), int(3 * x / A.shape[1])
    return {
        "steps": int((sizes > 0).sum()),
        "place": f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}",
        "share": round((areas > 0).float().mean().item(), 4),
    }


def drawings(
    sd: dag.StableDiffusion,
    jobs: list[tuple[str, int]],
    method: str,
    guidance: dag.Guidance,
    steps: list[dag.Step],
    seconds: float,
) -> list[Drawing]:
    """Decode the last step of a batch of (prompt, seed); beside each picture, what all steps say of it."""

    def gathered(name: str) -> list[Tensor] | list[None]:
        if getattr(steps[0], name) is None:
            return [None] * len(jobs)
        return torch.stack([getattr(s, name) for s in steps], 1).cpu().unbind(0)  # (steps, ...) per picture

    cfg, made = guidance.cfg or sd.config.dag, [decoded(sd, steps, k) for k in range(len(jobs))]
    unet_rows, guided = gathered("unet_rows"), gathered("guided")
    A, A_acted, S = gathered("A"), gathered("A_acted"), gathered("S")
    return [
        Drawing(
            prompt, seed, method, made[k][0], seconds / len(jobs), int(unet_rows[k].sum()), cfg, guidance.tokens,
            A[k], A_acted[k], S[k], guided[k].tolist(), made[k][1],
        )
        for k, (prompt, seed) in enumerate(jobs)
    ]  # fmt: skip


def decoded(sd: dag.StableDiffusion, steps: list[dag.Step], k: int) -> tuple[Image.Image | None, str | None]:
    """Picture k of a batch, or why there is none."""
    if not steps[-1].x[k].isfinite().all():
        bad = next(step for step in steps if not step.x[k].isfinite().all())
        return None, f"the latent is not finite after step {bad.i + 1} (t = {bad.t}); try --dtype float32"
    try:
        return to_pil(sd.decode(steps[-1].x[k : k + 1]))[0], None
    except NumericsError as e:
        return None, str(e)


def sheet(rows: list[tuple[Drawing, ...]], read: Callable[[Image.Image], str] | None = None) -> Image.Image:
    """The contact sheet: a row per picture, a column per method; before a method with maps, its map over the first.

    With a single method without maps, four pictures per row. read: what to write under a picture.
    """
    note = read or (lambda image: "")
    if len(rows[0]) == 1 and rows[0][0].shown_map is None:
        flat = [d for (d,) in rows]
        parts = [flat[k : k + 4] for k in range(0, len(flat), 4)]
        table = [(" | ".join(d.prompt for d in part), [d.image for d in part]) for part in parts]
        heads, notes = [], [[note(d.image) for d in part] for part in parts]
    else:
        heads, table, notes = [], [], []
        for d in rows[0]:
            heads += [] if d.shown_map is None else ["map"]
            heads.append("unguided" if d.method == "none" else f"guided: {d.method}")
        for row in rows:
            cells, under = [], []
            for d in row:
                if d.shown_map is not None:
                    cells.append(overlay(row[0].image, d.shown_map))
                    under.append("")
                cells.append(d.image)
                under.append(note(d.image))
            table.append((row[0].prompt, cells))
            notes.append(under)
    return contact_sheet(table, heads, notes=notes if read else None)
