"""Drawing a batch of pictures by one method, as both sample.py and the evaluation do."""

import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

import dag
from dag.attention import Hook
from dag.model import NumericsError

from .report import Drawing, drawings


def draw(
    sd: dag.StableDiffusion,
    jobs: list[tuple[str, int]],
    name: str,
    guidance: dag.Guidance,
    steps: int,
    scale: float,
    size: tuple[int, int],
    hooks: Sequence[Hook],
    title: str,
    watch: Callable[[dag.Step], None] | None = None,
) -> list[Drawing]:
    """One picture for each (prompt, seed), side by side; size: height and width. A bar with a title shows the steps.

    watch is told every step as it is made.
    """
    began, (asked, seeds), done = time.time(), map(list, zip(*jobs, strict=True)), []
    loop = dag.sample(sd, asked, guidance, steps, scale, seeds, *size, hooks=hooks)
    try:
        for step in tqdm(loop, title, steps, unit="step", leave=False, disable=None):
            done.append(step)
            if watch:
                watch(step)
    except NumericsError:  # no picture is left; the steps show when each was lost
        pass
    return drawings(sd, jobs, name, guidance, done, time.time() - began)


def too_large(size: tuple[int, int], dtype: str, device: str) -> MemoryError:
    """What is said when not even one picture of a size (height, width) fits."""
    found = f"out of memory with one picture of {size[1]} x {size[0]} pixels in {dtype}"
    less = f", --dtype {'bfloat16' if device == 'cpu' else 'float16'}" if dtype == "float32" else ""
    slow = "" if device == "cpu" else ", --device cpu"
    return MemoryError(f"{found}; try a smaller --height and --width{less}{slow}")
