"""Optimise guideline tokens, the detector of one concept, from a few annotated pictures.

  python train_tokens.py --out red-circle.safetensors    the miniature's concept, on 5 + 3 pictures it draws itself
  python train_tokens.py --ckpt sd-v1-4.ckpt --data DIR --concept "nude person" \\
      --safety-text "nude, nudity, naked, sexual"        sd-v1-4.ckpt.nude-person.safetensors, where sample.py finds it

DIR holds NAME.png and NAME.mask.png (white where the concept is; no mask file: a safe picture), and optionally
captions.json: {"NAME.png": "its prompt"} or {"NAME.png": {"prompt": "...", "seed": 3}}. With seeds for all pictures the
queries are read along the trajectories they were drawn on, as in the paper, else from the pictures with noise added.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from dag.cli.parsing import Parser, UsageError, guarded, number, option, slug, warn
from dag.config import NORMALISATIONS, SHAPES, STEPS, Scaling

HELD_OUT = 20  # pictures of each kind that the miniature's tokens are measured on
PAPER_STEPS = 100  # of the paper's recipe, per unsafe picture


def parser() -> Parser:
    parser = Parser("train_tokens.py", __doc__)
    add = parser.add_argument
    parser.add_model()
    add("--data", type=Path, metavar="DIR", help="annotated pictures (default, miniature only: drawn on the spot)")
    add("--concept", metavar="TEXT", help='text the tokens start from (default, miniature only: "a red circle")')
    add("--safety-text", metavar="TEXT", help="what guidance will push away from (default: the concept text)")
    add("--recipe", choices=("default", "paper"), default="default", help="ours or the paper's (default: default)")
    reading = (
        "how maps become A, see dag/cam.py (default: fitted by our recipe, joint by the paper's, which learns by it)"
    )
    add("--normalisation", choices=NORMALISATIONS, help=reading)
    add("--tokens", type=Path, metavar="FILE", help="measure these tokens, read by --normalisation; optimise nothing")
    add("--n-unsafe", type=number(int, 1, 1000), default=5, help="unsafe pictures to draw without --data (default: 5)")
    add("--n-safe", type=number(int, 0, 1000), default=3, help="safe pictures to draw without --data (default: 3)")
    add("--steps", type=number(int, 1, 100000), help=f"(default: 1500; paper: {PAPER_STEPS} per unsafe picture)")
    smallest = "ignore objects below this share of the frame (default: the model's)"
    add("--min-area", type=number(float, 0, 1), metavar="SHARE", help=smallest)
    add("--seed", type=number(int, 0, 2**50), default=0, help="of pictures and optimisation (default: 0)")
    place = "CKPT.CONCEPT.safetensors beside the --ckpt, where sample.py finds it; else out/tokens.safetensors"
    add("--out", type=Path, metavar="FILE", help=f"token file to write (default: {place})")
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


def run(args: argparse.Namespace) -> int:
    args.out = default_out(args) if args.out is None else args.out
    if args.out.is_dir() or args.out.suffix == ".png":
        raise UsageError(f"--out {args.out}: expected the name of a token file, such as tokens.safetensors")
    if args.ckpt is not None and args.data is None:
        raise UsageError(
            "--data: needed with --ckpt; expected a folder of annotated pictures (only the miniature draws its own)"
        )
    if args.concept is None and args.ckpt is not None and args.tokens is None:
        raise UsageError(
            '--concept: needed with --ckpt; expected the text the tokens start from, such as "nude person"'
        )

    for_training = ("concept", "safety_text", "steps", "min_area")
    if args.tokens is not None and (useless := [name for name in for_training if getattr(args, name) is not None]):
        raise UsageError(f"--tokens reads finished ones: leave out {option(useless[0])}")

    paper = args.recipe == "paper"
    if paper and args.normalisation == "fitted":
        raise UsageError("--normalisation fitted: the paper's recipe fits no constants; expected joint or map")

    import torch

    from dag.cli import annotations, setup
    from dag.tokens import GuidelineTokens, TokenError
    from weights.optimisation import PAPER, Recipe, mean, optimise, optimise_paper, raise_lo

    setup.writable(args.out.parent)
    sd, *_ = setup.open_model(args)
    concept = SHAPES.concept if args.concept is None else args.concept
    safety_text = concept if args.safety_text is None else args.safety_text
    if args.tokens is None:
        setup.check_text(sd, "--concept", concept)
        setup.check_text(sd, "--safety-text", safety_text)
        before = replace(GuidelineTokens.from_text(sd, concept, safety_text), min_area=args.min_area)
        if args.normalisation != "fitted":  # there are no constants yet
            before = replace(before, normalisation=args.normalisation)
    else:
        before = GuidelineTokens.load(args.tokens)
        if args.normalisation == "fitted" and not before.levels:
            raise UsageError(f"--normalisation fitted: {args.tokens} has no constants; expected joint or map")
        if message := before.check(sd):
            warn(message)
        concept = before.concept
    scaling = before.adapt(sd.config.dag.scaling)
    if args.data is not None:
        pictures, masks, prompts, seeds = annotations.read_folder(args.data, sd)
        if not (masks > 0).any():
            raise TokenError(
                f"{args.data}: no unsafe picture, every mask is missing; expected at least one NAME.mask.png"
            )
        if seeds is None:
            print("queries from the pictures with noise added (captions.json has no seed for every picture)")
            data = annotations.from_noised(sd, before.reading, pictures, masks, prompts)
        else:
            print("queries along the trajectories of the captions' prompts and seeds")
            size = tuple(pictures.shape[2:])
            data, latents = annotations.from_trajectories(sd, before.reading, masks, prompts, seeds, size)
            apart = (sd.decode(latents).cpu() - pictures).abs().mean((1, 2, 3)) / 2  # (N,)
            if apart.max() > 0.05:
                raise ValueError(
                    f"{args.data}: picture {int(apart.argmax()) + 1} is not what its prompt and seed draw in {STEPS} "
                    f"steps at scale {sd.config.scale:g} (off by {apart.max():.0%}); leave the seeds out of "
                    "captions.json"
                )
    else:
        data, pictures = annotations.from_judge(sd, before.reading, concept, args.n_unsafe, args.n_safe, args.seed)
    unsafe = int(data.unsafe.sum())
    print(f"{unsafe} unsafe and {len(data.masks) - unsafe} safe pictures")
    if unsafe == len(data.masks):
        warn("no safe picture: nothing teaches the tokens what is not the concept; add some look-alikes")

    after = before
    if args.tokens is None:
        recipe = replace(PAPER, steps=PAPER_STEPS * unsafe) if paper else Recipe()
        recipe = recipe if args.steps is None else replace(recipe, steps=args.steps)
        torch.manual_seed(args.seed)
        steps = (optimise_paper if paper else optimise)(data, before, recipe, args.seed)
        bar = annotations.progress(steps, "tokens", recipe.steps)
        for _, best in bar:
            if best is not None:
                after = best
                bar.set_postfix(loss=f"{after.loss:.4f}")
        after = after if paper else raise_lo(data, after)
    measured = data.measure(after, scaling)
    how = args.normalisation or after.normalisation or next(iter(measured))
    after = replace(after, normalisation=how, iou=mean(measured[how]).iou)
    after.save(args.out)
    annotations.save_sheet(data, before, after, pictures, args.out.with_suffix(".png"))

    name = "training pictures"
    if args.data is None:
        held_out, _ = annotations.from_judge(sd, before.reading, concept, HELD_OUT, HELD_OUT, args.seed + 77)
        measured, name = held_out.measure(after, scaling), f"{HELD_OUT} unsafe and {HELD_OUT} safe held-out pictures"
    print(f"{name}, loss {after.loss:.4f}")
    tell(measured, scaling, how)
    print(f"{args.out} and {args.out.with_suffix('.png')}")
    return 0


def tell(measured: dict, scaling: Scaling, how: str) -> None:
    """Print what AnnotatedQueries.measure found, under every normalisation, and last of all one line to hand on."""
    from weights.optimisation import choose, mean

    heads = "found", f"A >= {scaling.edit:g}", f"A >= {scaling.unsafe:g}", "guided"
    print("IoU in unsafe pictures. In unsafe / safe ones, shares of pictures in which something is found, of the frame")
    print(
        f"with {heads[1]} and {heads[2]}, of pictures that would be guided: found, {heads[1]} on < {scaling.full:.0%}."
    )
    print("normalisation   t   IoU " + "".join(f"{head:>13}" for head in heads))
    summary = []
    for reading, levels in measured.items():
        for v in levels[::4]:
            print(f"{reading:13} {v.t:3d}  {v.iou:.2f}  " + "  ".join(f"{u:.2f} / {s:.2f}" for u, s in v[2:]))
        v = mean(levels)
        shares = [f"{head} {u:.2f}/{s:.2f}" for head, (u, s) in zip(heads, v[2:], strict=True)]
        summary.append(f"{reading} IoU {v.iou:.2f}, {', '.join(shares)}")
    best = choose(measured)
    advice = f"choose {best}" if best else "none of them guides, train with the default recipe"
    print(f"mean of all t: {'; '.join(summary)}. Read by {how}; {advice}")


def main(argv: list[str] | None = None) -> int:
    return guarded("train_tokens.py", lambda: run(parser().parse_args(argv)), argv)


if __name__ == "__main__":
    sys.exit(main())
