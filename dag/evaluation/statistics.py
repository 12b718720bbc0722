"""What tables are made of: figures with their intervals, and Markdown. Nothing here waits for torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 1000
INTERVALS = (
    "Brackets: 95 % intervals, a bootstrap over prompts. That of 0 of n, or n of n, is a point, though n prompts "
    "exclude no more than shares above some 3 / n."
)


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


Cell = str | int | float | Figure | None


@dataclass
class Table:
    """A table: its title, heads, rows, and notes below it."""

    title: str
    heads: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", f"| {' | '.join(self.heads)} |", "|" + "---|" * len(self.heads)]
        lines += [f"| {' | '.join(written(cell) for cell in row)} |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def plain(self) -> dict:
        """As JSON has it: an interval is [value, low, high]."""
        rows = [[[c.value, c.low, c.high] if isinstance(c, Figure) else c for c in row] for row in self.rows]
        return {"title": self.title, "heads": self.heads, "rows": rows, "notes": self.notes}


def number(value: float) -> str:
    """Three digits, two after the point of a larger one, and all of a whole number."""
    if value == round(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def written(cell: Cell) -> str:
    """A cell in Markdown."""
    if cell is None:
        return ""
    return str(cell) if isinstance(cell, (str, Figure)) else number(cell)


def estimate(statistic: Callable[[np.ndarray], np.ndarray], prompts: dict, columns: int) -> Figure | None:
    """A figure of all pictures with its interval over prompts, by the bootstrap; None where it has no value.

    prompts: by prompt, rows of `columns` numbers, one row per picture. statistic: from their sums (..., columns) to
    (...). Prompts are drawn with replacement, all pictures of one together; the draw is always the same.
    """
    if not prompts:
        return None
    sums = np.array([np.sum(rows, 0) for rows in prompts.values()], float).reshape(len(prompts), columns)
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)  # (1000, P)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, spread = float(statistic(sums.sum(0))), statistic(drawn @ sums)
    spread = spread[np.isfinite(spread)]
    if not np.isfinite(value):
        return None
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (value, value)
    return Figure(round(value, 6), round(float(low), 6), round(float(high), 6))


def mean(values: Iterable[tuple[str, float]]) -> Figure | None:
    """The mean of (prompt, value), one per picture."""
    prompts: dict[str, list] = {}
    for prompt, value in values:
        prompts.setdefault(prompt, []).append((value, 1))
    return estimate(lambda sums: sums[..., 0] / sums[..., 1], prompts, 2)


def total(values: Iterable[tuple[str, float]]) -> Figure | None:
    """The sum of (prompt, value), one per picture."""
    prompts: dict[str, list] = {}
    for prompt, value in values:
        prompts.setdefault(prompt, []).append((value,))
    return estimate(lambda sums: sums[..., 0], prompts, 1)


def erase_rate(values: Iterable[tuple[str, float, float]]) -> Figure | None:
    """1 - counted / counted without defence, of (prompt, without, with), one per picture; None of nothing."""
    prompts: dict[str, list] = {}
    for prompt, without, counted in values:
        prompts.setdefault(prompt, []).append((without, counted))
    return estimate(lambda sums: 1 - sums[..., 1] / sums[..., 0], prompts, 2)


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Frechet distance of two normal distributions, by their means (f,) and covariances (f, f)."""
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * values.clip(min=0) ** 0.5) @ vectors.T  # of cov_a
    cross = (np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0) ** 0.5).sum()  # trace of (cov_a cov_b)^(1/2)
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))
