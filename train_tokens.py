"""Make guideline tokens, the detector of one concept, from a checkpoint alone.

  python train_tokens.py --ckpt sd-v1-4.ckpt --concept "nude person"      sd-v1-4.ckpt.nude-person.safetensors, where
                                                                          sample.py finds it, and its pictures beside it
  python train_tokens.py --ckpt sd-v1-4.ckpt --concept "nude person" --data DIR      from pictures that are there

The model draws pictures of the concept and of look-alikes, an annotator says where the concept is, the tokens are
optimised, and look-alikes that they still confuse are drawn and added ("mining"). The folder of the pictures has
NAME.png, NAME.mask.png (white where the concept is) and captions.json: look at them, correct a mask, delete a picture,
and train again with --data.

--annotator maps: the model's own attention to the concept's words. grounded-sam: GroundingDINO and SAM, as the paper.
judge: the miniature's own detector.

--prompts FILE: a line [concept], then prompts that show it, one a line; [look-alikes: KIND], then prompts that do not;
several kinds, each of which gets figures of its own. Lines that start with # are left out.

--data DIR: as above. captions.json may be missing or have {"NAME.png": "its prompt"}. With seeds for all pictures the
queries are read along the trajectories they were drawn on, as in the paper, else from the pictures with noise added.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from dag.cli.parsing import Parser, UsageError, guarded, number, option, slug, warn
from dag.config import ANNOTATORS, NORMALISATIONS

DRAWING = {
    "n_unsafe": 24,
    "n_safe": 96,
    "rounds": 3,
    "annotator": "maps",
}  # the options of drawing, with their defaults
DRAWING |= dict.fromkeys(("prompts", "detector_model", "segmenter_model", "label", "not_label"))


def parser() -> Parser:
    parser = Parser("train_tokens.py", __doc__)
    add = parser.add_argument
    parser.add_model()
    add("--concept", metavar="TEXT", help='text the tokens start from (default, miniature only: "a red circle")')
    add("--safety-text", metavar="TEXT", help="what guidance will push away from (default: the concept text)")
    add("--data", type=Path, metavar="DIR", help="annotated pictures to train on, instead of drawing some")
    add("--prompts", type=Path, metavar="FILE", help="what to draw (default: what comes along for this concept)")
    add("--annotator", choices=ANNOTATORS, help="who says where the concept is (default: maps)")
    add("--detector-model", metavar="MODEL", help="grounded-sam: folder or hub name (default: GroundingDINO, base)")
    add("--segmenter-model", metavar="MODEL", help="grounded-sam: folder or hub name (default: SAM, huge)")
    add("--label", action="append", metavar="TEXT", help="grounded-sam: what to cover (default: the concept text)")
    add("--not-label", action="append", metavar="TEXT", help="grounded-sam: what to leave out, such as hair or face")
    add("--n-unsafe", type=number(int, 1, 1000), help="pictures of the concept to draw (default: 24)")
    add("--n-safe", type=number(int, 0, 1000), help="pictures of look-alikes, at first and to mine from (default: 96)")
    add("--rounds", type=number(int, 0, 100), help="of mining, at most (default: 3; recipe paper: 0)")
    add("--batch-size", type=number(int, 1, 1000), default=4, help="pictures drawn side by side (default: 4)")
    add("--recipe", choices=("default", "paper"), default="default", help="ours or the paper's (default: default)")
    reading = (
        "how maps become A, see dag/cam.py (default: fitted by our recipe, joint by the paper's, which learns by it)"
    )
    add("--normalisation", choices=NORMALISATIONS, help=reading)
    add("--tokens", type=Path, metavar="FILE", help="measure these tokens, read by --normalisation; optimise nothing")
    add("--steps", type=number(int, 1, 100000), help="of optimisation (default: 1500; paper: 100 per unsafe picture)")
    counts = "in the loss, of a pixel of the concept: more finds more, also falsely (default: 1)"
    add("--weight", type=number(float, 0.1, 100), help=counts)
    smallest = "ignore objects below this share of the frame (default: the model's)"
    add("--min-area", type=number(float, 0, 1), metavar="SHARE", help=smallest)
    add("--seed", type=number(int, 0, 2**40), default=0, help="of pictures and optimisation (default: 0)")
    place = "CKPT.CONCEPT.safetensors beside the --ckpt, where sample.py finds it; else out/tokens.safetensors"
    add("--out", type=Path, metavar="FILE", help=f"token file to write; pictures go beside it (default: {place})")
    return parser


def default_out(args: argparse.Namespace) -> Path:
    """Where new tokens of a checkpoint go: beside it, if that folder can be written to."""
    if args.ckpt is None or args.tokens is not None or args.concept is None:
        return Path("out", "tokens.safetensors")
    name = f"{args.ckpt.name}.{slug(args.concept)}.safetensors"
    if os.access(args.ckpt.parent, os.W_OK):
        return args.ckpt.with_name(name)
    warn(f"{args.ckpt.parent}: cannot be written to; the tokens go to {Path('out', name)}, pass them as --tokens")
    return Path("out", name)


def checked(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on others. Raises UsageError for options that do not go together."""
    args.out = default_out(args) if args.out is None else args.out
    if args.out.is_dir():
        raise UsageError(f"--out {args.out}: expected the name of a token file, such as tokens.safetensors")
    if args.concept is None and args.ckpt is not None and args.tokens is None:
        raise UsageError(
            '--concept: needed with --ckpt; expected the text the tokens start from, such as "nude person"'
        )
    for_training = ("concept", "safety_text", "steps", "weight", "min_area", "rounds")
    if args.tokens is not None and (useless := [name for name in for_training if getattr(args, name) is not None]):
        raise UsageError(f"--tokens reads finished ones: leave out {option(useless[0])}")
    if args.data is not None and (useless := [name for name in DRAWING if getattr(args, name) is not None]):
        raise UsageError(f"--data draws nothing: leave out {option(useless[0])}")
    if args.recipe == "paper" and args.normalisation == "fitted":
        raise UsageError("--normalisation fitted: the paper's recipe fits no constants; expected joint or map")
    if args.recipe == "paper" and args.weight is not None:
        raise UsageError("--weight: is of our recipe, the paper's has none; leave it out")
    if args.recipe == "paper" or args.tokens is not None:
        args.rounds = 0 if args.rounds is None else args.rounds
    args.rounds = 0 if args.n_safe == 0 else args.rounds
    for name, value in DRAWING.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    sam = ("detector_model", "segmenter_model", "label", "not_label")
    if args.annotator != "grounded-sam" and (useless := [name for name in sam if getattr(args, name) is not None]):
        raise UsageError(f"{option(useless[0])}: is of --annotator grounded-sam; leave it out, or name that annotator")
    if args.out.suffix != ".safetensors":  # the pictures' folder has the name without it
        raise UsageError(f"--out {args.out}: expected a name that ends in .safetensors")
    for name in ("ckpt", "tokens"):
        if (own := getattr(args, name)) is not None and own.resolve() == args.out.resolve():
            raise UsageError(f"--out {args.out}: is the file of --{name}; expected another name")


def run(args: argparse.Namespace) -> int:
    checked(args)
    import torch

    from dag.cli.annotations import save_sheet
    from dag.cli.training import Training

    training = Training(args)
    torch.manual_seed(args.seed)
    training.collect()
    print(training.told())
    tokens = training.before if args.tokens is not None else training.train(training.data, "tokens")
    name, measured, on = training.held_out(tokens)
    how = args.normalisation or tokens.normalisation or next(iter(measured))
    tokens = replace(tokens, normalisation=how, iou=measured[how].of(on.unsafe).iou.mean().item())
    tokens.save(args.out)
    sheet = args.out.with_suffix(".png")
    save_sheet(training.data, training.before, tokens, training.pictures, sheet)
    print(name)
    training.tell(measured, on, how)
    print(f"{args.out} and {sheet}" + ("" if args.data else f"; the pictures are in {training.folder}"))
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded("train_tokens.py", lambda: run(parser().parse_args(argv)), argv)


if __name__ == "__main__":
    sys.exit(main())
