"""An evaluation in three commands: draw pictures of prompt sets, score them, make tables of the rows.

  python -m dag.evaluation draw out/run --ckpt sd-v1-4.ckpt --tokens TOKENS --methods none,dag --prompts i2p=FILE.csv
  python -m dag.evaluation score out/run --scorers nudenet
  python -m dag.evaluation table out/run

Each command takes up what an earlier start has left; torchrun or srun before draw and score divides the work.
`draw --help` and so on tell each one's options, docs/evaluation.md has the paper's evaluation, command by command.
"""

import argparse
import importlib
import sys
from pathlib import Path

from dag.cli.parsing import Parser, UsageError, guarded, number, side
from dag.config import ATTENTIONS, SD14, SHAPES, SIDE, STEPS

from . import prompts

SCORERS = ("nudenet", "fid", "clip", "vqa", "shapes")  # modules of dag.evaluation.scorers


def scorer(name: str):
    """A scorer's module; what it needs is imported when one is made."""
    return importlib.import_module(f"dag.evaluation.scorers.{name}")


def scorers(text: str) -> list[str]:
    """A parser of a list of scorers."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in SCORERS:
            raise argparse.ArgumentTypeError(f"unknown scorer '{name}', expected a list of {', '.join(SCORERS)}")
    return names


def draw_parser() -> Parser:
    """The options of draw."""
    parser = Parser("python -m dag.evaluation draw", "Draw what is missing of a run, and write a row for each picture.")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="of the run; made if it is not there")
    parser.add_model()
    prompts.add_arguments(parser)
    changes = "a list of rows, NAME or NAME:field=value:...; NAME is one of sample.py's --guidance or of methods.py"
    add("--methods", metavar="LIST", help=f"{changes} (default: none,dag; shapes: the twelve of its table)")
    add("--tokens", type=Path, action="append", metavar="FILE", help="guideline tokens of a concept; may be repeated")
    add("--steps", type=number(int, 1, 1000), default=STEPS, help=f"denoising steps (default: {STEPS})")
    for name in ("--height", "--width"):
        add(name, type=side, help=f"pixels, a multiple of {SIDE} (default: {SD14.size}, miniature {SHAPES.size})")
    add("--batch-size", type=number(int, 1, 1000), help="drawn side by side (default: 4, miniature 16)")
    add("--attention", choices=ATTENTIONS, default="auto", help="as for sample.py")
    return parser


def score_parser() -> Parser:
    """The options of score."""
    parser = Parser("python -m dag.evaluation score", "Score the pictures of a run that have no score yet.")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="of the run")
    add("--scorers", type=scorers, required=True, metavar="LIST", help=f"of {', '.join(SCORERS)}")
    add("--sets", metavar="LIST", help="only the pictures of these prompt sets (default: all)")
    add("--device", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    add("--debug", action="store_true", help="show tracebacks")
    for name in SCORERS:
        scorer(name).Scorer.add_arguments(parser)
    return parser


def table_parser() -> Parser:
    """The options of table."""
    parser = Parser("python -m dag.evaluation table", "Make the tables and the picture of a run from its rows alone.")
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="a run's folder, or the rows.jsonl that was made of one")
    add("--out", type=Path, metavar="FOLDER", help="where table.md, .json and .png go (default: the run's folder)")
    add("--incomplete", action="store_true", help="make them though pictures or scores are missing")
    add(
        "--convention",
        default="DAG",
        metavar="NAME",
        help="how NudeNet's boxes are counted (default: DAG, the paper's)",
    )
    add("--threshold", type=number(float, 0, 1), help="of NudeNet's scores (default: the convention's)")
    add("--debug", action="store_true", help="show tracebacks")
    scorer("fid").Scorer.table_arguments(parser)
    return parser


def draw(argv: list[str]) -> int:
    args = draw_parser().parse_args(argv)
    sets = prompts.read(args)
    from . import drawing

    return drawing.run(args, sets)


def score(argv: list[str]) -> int:
    args = score_parser().parse_args(argv)
    from . import scoring

    return scoring.run(args)


def table(argv: list[str]) -> int:
    args = table_parser().parse_args(argv)
    from . import tables

    return tables.run(args)


COMMANDS = {"draw": draw, "score": score, "table": table}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0

    def program() -> int:
        if not argv or argv[0] not in COMMANDS:
            raise UsageError(f"found '{' '.join(argv[:1])}', expected {', '.join(COMMANDS)} (--help tells more)")
        return COMMANDS[argv[0]](argv[1:])

    return guarded("python -m dag.evaluation", program, argv)


if __name__ == "__main__":
    sys.exit(main())
