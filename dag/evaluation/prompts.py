"""Prompt sets, read from files as their authors publish them. Nothing here waits for torch.

  i2p=FILE.csv            I2P, as its authors publish it or with the unlearning papers' seeds; --i2p sexual: 931 rows
  ring-a-bell=FILE.csv    its repository's CSVs, or SAFREE's copy
  mma=FILE.csv            MMA-Diffusion; --mma says which of its columns
  coco=FILE.csv           captions as coco_30k.csv and coco_10k.csv; 1,000 of them, drawn with --coco-seed
  FILE.txt, FILE.jsonl    as --prompts of sample.py
  everyday                24 mild captions that come along
  shapes, concepts        the miniature's (dag/evaluation/shapes.py)

A CSV's own seeds and guidance scales are used where it has them. Of these sets only the last three come with the
project: the others are gated, or explicit.
"""

import argparse
import csv
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dag.cli.parsing import UsageError, number
from dag.cli.prompts import from_json, lines_of

EVERYDAY = Path(__file__).resolve().parents[2] / "weights" / "prompts" / "everyday.txt"
SUITES = ("shapes", "concepts")
IDS = ("case_number", "image_id", "coco_id", "index", "Unnamed: 0", "")  # columns that may name a row, in this order
COCO = 1000  # captions drawn, as in the paper


@dataclass(frozen=True)
class Prompt:
    """One row of a set. seed and scale: the row's own, or None."""

    id: str
    text: str
    seed: int | None = None
    scale: float | None = None
    more: dict = field(default_factory=dict)  # what its pictures' rows say besides


@dataclass(frozen=True)
class PromptSet:
    """A set, and what a table must say of it: where it came from, which variant it is and which rows were taken."""

    name: str
    prompts: list[Prompt]
    about: dict
    suite: str | None = None


@dataclass(frozen=True)
class Variant:
    """How one published file looks: the columns that it must and must not have, and what is read from where."""

    name: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    text: str = "prompt"
    seed: str | None = None
    scale: str | None = None

    def fits(self, columns: list[str]) -> bool:
        return all(c in columns for c in self.has) and not any(c in columns for c in self.lacks)


def _seeded(name: str, *has: str, lacks: tuple[str, ...] = ()) -> Variant:
    return Variant(name, ("prompt", "evaluation_seed", *has), lacks, seed="evaluation_seed")


_OTHER = ("categories", "adv_prompt", "sanitized_adv_prompt")
VARIANTS = {
    "i2p": (
        Variant(
            "with evaluation seeds, as unlearning papers run it", ("prompt", "categories", "evaluation_seed"),
            seed="evaluation_seed", scale="evaluation_guidance",
        ),
        Variant(
            "its authors' (AIML-TUDA/i2p)", ("prompt", "categories", "sd_seed"),
            seed="sd_seed", scale="sd_guidance_scale",
        ),
    ),
    "ring-a-bell": (
        Variant("SAFREE's copy", ("sensitive prompt",), text="sensitive prompt"),
        _seeded("its repository's", "case_number", lacks=(*_OTHER, "source", "image_id", "coco_id")),
    ),
    "mma": (
        Variant("adversarial prompts", ("target_prompt", "adv_prompt"), text="adv_prompt"),
        Variant("sanitized ones", ("target_prompt", "sanitized_adv_prompt"), text="sanitized_adv_prompt"),
    ),
    "coco": (
        *(_seeded(f"by {column}", column, lacks=_OTHER) for column in ("coco_id", "image_id", "source")),
        _seeded("by case_number", "case_number", lacks=(*_OTHER, "sensitive prompt")),
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is drawn."""
    add = parser.add_argument
    add(
        "--prompts", action="append", required=True, metavar="SET",
        help="i2p=FILE, ring-a-bell=FILE, mma=FILE, coco=FILE (CSV); FILE.txt or .jsonl; everyday; shapes or concepts "
        "(the miniature's suites); may be repeated",
    )  # fmt: skip
    add("--count", type=number(int, 1, 10**6), help=f"prompts of each set (default: all; coco {COCO}; shapes 32)")
    add("--images", type=number(int, 1, 1000), default=1, help="per prompt; number i uses seed + i (default: 1)")
    add("--seed", type=number(int, 0, 2**62), help="of every first picture (default: the file's own, else 0)")
    add("--scale", type=number(float, 0, 1000), help="guidance scale (default: the file's own, else the model's)")
    add("--i2p", choices=("sexual", "all"), default="sexual", help="rows with this category (default: sexual)")
    add("--mma", choices=("adversarial", "sanitized"), default="adversarial", help="its column (default: adversarial)")
    add("--coco-seed", type=number(int, 0, 2**62), default=0, help="of the draw of captions (default: 0)")


def read(args: argparse.Namespace) -> list[PromptSet]:
    """The sets that --prompts names, in order. Raises UsageError, ValueError: one line, which file, row and column."""
    sets: list[PromptSet] = []
    for text in args.prompts:
        if text in SUITES:
            from . import shapes  # here: only the suites need the miniature's world

            sets += shapes.SETS[text](args)
        else:
            sets.append(one(text, args))
    names = [s.name for s in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--prompts: two sets are called '{twice[0]}'; expected each once")
    return sets


def one(text: str, args: argparse.Namespace) -> PromptSet:
    """The set of one --prompts."""
    kind, equals, name = text.partition("=")
    if equals and kind in VARIANTS:
        return table(kind, Path(name), args)
    path = EVERYDAY if text == "everyday" else Path(text)
    if path.suffix.lower() == ".csv":
        raise UsageError(f"--prompts {text}: which set is it? Expected {'=FILE, '.join(VARIANTS)}=FILE")
    numbered = lines_of(path)
    if path.suffix.lower() == ".jsonl":
        told = {n: from_json(line, f"{path}, line {n}") for n, line in numbered.items()}
    else:
        told = {n: {"prompt": line} for n, line in numbered.items()}
    prompts = [Prompt(str(row.get("id", n)), row["prompt"], row.get("seed")) for n, row in told.items()]
    about = {
        "variant": "one prompt per line",
        "seeds": "the file's" if any("seed" in r for r in told.values()) else None,
    }
    return checked(path, "everyday" if text == "everyday" else path.stem, prompts, about, args)


def table(kind: str, path: Path, args: argparse.Namespace) -> PromptSet:
    """A set from a CSV file."""
    columns, rows = records(path)
    fitting = [v for v in VARIANTS[kind] if v.fits(columns)]
    if kind == "mma":
        fitting = [v for v in fitting if v.name.startswith(args.mma)]
    if not fitting:
        others = [k for k, variants in VARIANTS.items() if k != kind and any(v.fits(columns) for v in variants)]
        wanted = "; or ".join(", ".join(v.has) for v in VARIANTS[kind])
        looks = f", which are those of {' or '.join(others)}" if others else ""
        found = ", ".join(c or "(no name)" for c in columns[:12])
        raise UsageError(f"{path}: has the columns {found}{looks}; expected for {kind}: {wanted}")
    variant = fitting[0]
    about = {"variant": variant.name, "rows": len(rows)}
    seed, scale = (column if column in columns else None for column in (variant.seed, variant.scale))
    about |= {"seeds": seed and f"column {seed}", "scales": scale and f"column {scale}"}
    own = next((c for c in IDS if c in columns and len({row[c] for _, row in rows} - {""}) == len(rows)), None)
    about["ids"] = "row numbers" if own is None else f"column {own or '(no name)'}"
    prompts = []
    for k, (line, row) in enumerate(rows):
        if kind == "i2p" and args.i2p not in ("all", *row["categories"].split(", ")):
            continue
        where = f"{path}, line {line}"
        prompts.append(
            Prompt(
                str(k) if own is None else row[own],
                row[variant.text],
                None if seed is None else whole(row[seed], seed, where),
                None if scale is None else real(row[scale], scale, where),
            )
        )
        if not prompts[-1].text.strip():
            raise ValueError(f"{where}: column {variant.text} is empty; expected a prompt: correct or delete the row")
    if kind == "i2p":
        about["categories"] = args.i2p
    if kind == "coco":
        about["drawn"] = f"{min(args.count or COCO, len(prompts))} of {len(prompts)}, seed {args.coco_seed}"
    return checked(path, kind, prompts, about, args)


def checked(path: Path, name: str, prompts: list[Prompt], about: dict, args: argparse.Namespace) -> PromptSet:
    """The set of what was read: some of it, if so asked for. Raises ValueError for none, or two with one name."""
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; expected at least one")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"{path}: two rows have the id '{twice}'; expected each once")
    if long := [i for i in ids if not 0 < len(i.encode()) <= 80]:
        raise ValueError(f"{path}: a row's id is '{long[0][:40]}'; expected 1 to 80 letters, it becomes a file's name")
    if "drawn" in about:
        count = min(args.count or COCO, len(prompts))
        prompts = [prompts[k] for k in sorted(random.Random(args.coco_seed).sample(range(len(prompts)), count))]
    about = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} | about
    if args.seed is not None:
        prompts, about = [replace(prompt, seed=None) for prompt in prompts], about | {"seeds": None}
    if args.scale is not None:
        prompts, about = [replace(prompt, scale=None) for prompt in prompts], about | {"scales": None}
    return PromptSet(name, prompts[: args.count], about)


def records(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV file, and its rows with the line each ends on. Raises ValueError for what is none."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns, rows = [c.strip() for c in next(reader, [])], []
            for row in reader:
                if not row:
                    continue  # an empty line, as some editors leave one at the end
                if len(row) != len(columns):
                    found = f"{path}, line {reader.line_num}: has {len(row)} fields, the header has {len(columns)}"
                    raise ValueError(f"{found}; expected as many, with quotes around a comma in a prompt")
                rows.append((reader.line_num, dict(zip(columns, row, strict=True))))
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}); expected a CSV file") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not UTF-8 text; expected a CSV file") from e
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num}: {e}; expected a CSV file") from e
    if len(set(columns)) < len(columns):
        twice = next(c for c in columns if columns.count(c) > 1)
        raise ValueError(f"{path}: has two columns called '{twice}'; expected each once")
    return columns, rows


def _value(parse: Callable, expected: str):
    def value(text: str, column: str, where: str):
        try:
            return parse(text)
        except (ValueError, OverflowError):
            raise ValueError(f"{where}: {column} is '{text[:40]}', expected {expected}") from None

    return value


def _whole(text: str) -> int:
    seed = int(text) if text.strip().lstrip("+-").isdigit() else float(text)  # pandas writes 5 as 5.0 beside a gap
    if seed != int(seed) or not 0 <= seed <= 2**62:
        raise ValueError
    return int(seed)


def _real(text: str) -> float:
    scale = float(text)
    if not (math.isfinite(scale) and 0 <= scale <= 1000):
        raise ValueError
    return scale


whole, real = _value(_whole, "a whole number from 0 to 2^62"), _value(_real, "a number from 0 to 1000")
