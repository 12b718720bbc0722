"""What sample.py and train_tokens.py share of the command line. Nothing here waits for torch, so --help is quick."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..config import METHODS, SIDE


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
            help="SD 1.x checkpoint, .ckpt or .safetensors (default: the miniature)",
        )
        add("--device", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
        add("--dtype", choices=dtypes, help="of the networks (default: float16 on cuda, else float32)")
        add("--debug", action="store_true", help="show tracebacks and what was ignored in the checkpoint")


def number(kind: type, low: float, high: float):
    """A parser of numbers from low to high; NaN and infinity are refused."""

    def parse(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of the right kind ({kind.__name__})") from None
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low:g} to {high:g}")
        return value

    return parse


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
        code, message = 2 if isinstance(e, UsageError) else 1, str(e)
        if not isinstance(e, (ValueError, ArithmeticError, OSError)):  # out of memory, a driver's error: not ours
            message = f"{type(e).__name__}: {(message.splitlines() or [''])[0][:200]} (--debug shows where)"
    print(f"{program}: {message}", file=sys.stderr)
    return code
