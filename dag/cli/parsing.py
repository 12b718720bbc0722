"""What sample.py and train_tokens.py share of the command line. Nothing here waits for torch, so --help is quick."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from ..config import METHODS, SD14, SHAPES, SIDE, DAGConfig, Scaling

CONSTANTS = {  # of DAG, by their names in DAGConfig and Scaling
    "warmup": "steps, from the first, on which nothing is guided",
    "top": "dag: share of the latent's values that are edited",
    "threshold": "dag-sld: lambda of its mask",
    "memory": "share of a map that the next step keeps; 0: forget at once",
    "unsafe": "A from here on is an object",
    "edit": "A from here on may be edited (tau)",
    "full": "ignore a map when this share of it may be edited",
    "area_gain": "strength per share of the frame; none: without the AreaScaler",
    "magnitude": "upper end of T; 1: without the MagnitudeScaler",
    "min_area": "drop objects below this share of the frame; goes before the token file's",
    "s_max": "upper bound on S, or none",
}


class UsageError(ValueError):
    """A wrong argument: one line, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Errors become UsageErrors; the description is shown as it is written."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UsageError(f"{message} (--help shows all options)")

    def add_model(self) -> None:
        """The options that say which model runs where."""
        add, dtypes = self.add_argument, ("float32", "float16", "bfloat16")
        add(
            "--ckpt",
            type=Path,
            metavar="FILE",
            help="SD 1.x or 2.x checkpoint, .ckpt or .safetensors (default: the miniature)",
        )
        released = (
            "released erased model to lay over it: ESD, SA, SalUn, MACE, UCE, AdvUnlearn, SPM or SDID, a file or folder"
        )
        told = "what the UNet of an SD 2.x file predicts, which its file does not tell: eps (512-base) or v (768-v)"
        add("--prediction", choices=("eps", "v"), help=told)
        add("--overlay", type=Path, metavar="FILE", help=released)
        own = "SPM's m: its weights are added m^2 times (default: 1)"
        add("--overlay-strength", type=number(float, 0, 10), default=1.0, metavar="M", help=own)
        add("--device", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
        add("--dtype", choices=dtypes, help="of the networks (default: float16 on cuda, else float32)")
        add("--debug", action="store_true", help="show tracebacks and what was ignored in the checkpoint")

    def add_constants(self) -> None:
        """An option for every constant of DAG; those that are not given are missing in the namespace."""
        group = self.add_argument_group("constants of DAG", "default: SD 1.4's, and the miniature's where it differs")
        sd14, shapes = (vars(cfg) | vars(cfg.scaling) for cfg in (SD14.dag, SHAPES.dag))
        for field in (field for kind in (DAGConfig, Scaling) for field in fields(kind) if field.name in CONSTANTS):
            own = ["none" if cfg[field.name] is None else f"{cfg[field.name]:.3g}" for cfg in (sd14, shapes)]
            text = f"{CONSTANTS[field.name]} (default: {', '.join(dict.fromkeys(own))})"
            kind = number(int if field.type is int else float, -1e6, 1e6)  # guidance.py knows the ranges
            kind = or_none(kind) if field.type == float | None else kind
            group.add_argument(option(field.name), type=kind, default=argparse.SUPPRESS, metavar="X", help=text)


def number(kind: type, low: float, high: float):
    """A parser of numbers from low to high; NaN and infinity are refused."""

    def parse(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of the right kind ({kind.__name__})") from None
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low:g} to {high:g}")
        return value

    return parse


def option(name: str) -> str:
    """The option that is stored under a name."""
    return f"--{name.replace('_', '-')}"


def changed(args: argparse.Namespace, default: argparse.Namespace) -> list[str]:
    """The names of the options that are not as by default."""
    return [name for name, value in vars(args).items() if not hasattr(default, name) or value != getattr(default, name)]


def or_none(parse: Callable):
    """A parser of what `parse` takes, and of the word none."""
    return lambda text: None if text == "none" else parse(text)


def given(args: argparse.Namespace) -> list[str]:
    """The constants of DAG that the command line turns."""
    return [name for name in CONSTANTS if hasattr(args, name)]


def turned(cfg: DAGConfig, args: argparse.Namespace) -> DAGConfig:
    """cfg with the constants that the command line turns."""
    own, of_scaling = ({f.name for f in fields(kind)} & set(given(args)) for kind in (DAGConfig, Scaling))
    scaling = replace(cfg.scaling, **{name: getattr(args, name) for name in of_scaling})
    return replace(cfg, **{name: getattr(args, name) for name in own}, scaling=scaling)


def side(text: str) -> int:
    """A parser of the height or width of a picture, in pixels."""
    value = number(int, SIDE, 4096)(text)
    if value % SIDE:
        nearest = max(SIDE, round(value / SIDE) * SIDE)
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {SIDE}, try {nearest}")
    return value


def methods(text: str) -> list[str]:
    """A parser of a list of guidance methods."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method '{name}', expected a list of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def slug(text: str) -> str:
    """Text as a part of a file's name: small letters, digits and hyphens, at most 40."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "empty"


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def guarded(program: str, run: Callable[[], int], argv: list[str] | None) -> int:
    """Run a program; every expected failure becomes one line and an exit status: 2 usage, 1 data, 130 Ctrl-C."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may be in no encoding that the terminal knows
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run()
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as e:
        if debug:
            raise
        code, message = 2 if isinstance(e, UsageError) else 1, " ".join(str(e).split()) or type(e).__name__
        if not isinstance(e, (ValueError, ArithmeticError, OSError, MemoryError)):  # a driver's error: not ours
            message = f"{type(e).__name__}: {(message.splitlines() or [''])[0][:200]} (--debug shows where)"
    print(f"{program}: {message}", file=sys.stderr)
    return code
