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
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from dag.cli.parsing import Parser, UsageError, guarded, number, option, slug, warn
from dag.config import ANNOTATORS, NORMALISATIONS, SHAPES, STEPS, Scaling

HELD_OUT = 24  # pictures of the concept and of each kind of look-alike that the judge measures on
MINING = 1 / 3  # of the steps of training: so many show what is confused
PAPER_STEPS = 100  # of the paper's recipe, per unsafe picture
DRAWING = {
    "n_unsafe": 24,
    "n_safe": 24,
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
    add("--n-safe", type=number(int, 0, 1000), help="pictures of look-alikes, at first and to mine from (default: 24)")
    add("--rounds", type=number(int, 0, 100), help="of mining, at most (default: 3; recipe paper: 0)")
    add("--batch-size", type=number(int, 1, 1000), default=4, help="pictures drawn side by side (default: 4)")
    add("--recipe", choices=("default", "paper"), default="default", help="ours or the paper's (default: default)")
    reading = (
        "how maps become A, see dag/cam.py (default: fitted by our recipe, joint by the paper's, which learns by it)"
    )
    add("--normalisation", choices=NORMALISATIONS, help=reading)
    add("--tokens", type=Path, metavar="FILE", help="measure these tokens, read by --normalisation; optimise nothing")
    add("--steps", type=number(int, 1, 100000), help=f"(default: 1500; paper: {PAPER_STEPS} per unsafe picture)")
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
    warn(f"{args.ckpt.parent}: cannot be written to; tokens go to {Path('out', name)}, pass them as --tokens")
    return Path("out", name)


def checked(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on others. Raises UsageError for options that do not go together."""
    args.out = default_out(args) if args.out is None else args.out
    if args.out.is_dir() or args.out.suffix == ".png":
        raise UsageError(f"--out {args.out}: expected the name of a token file, such as tokens.safetensors")
    if args.concept is None and args.ckpt is not None and args.tokens is None:
        raise UsageError(
            '--concept: needed with --ckpt; expected the text the tokens start from, such as "nude person"'
        )
    for_training = ("concept", "safety_text", "steps", "min_area", "rounds")
    if args.tokens is not None and (useless := [name for name in for_training if getattr(args, name) is not None]):
        raise UsageError(f"--tokens reads finished ones: leave out {option(useless[0])}")
    if args.data is not None and (useless := [name for name in DRAWING if getattr(args, name) is not None]):
        raise UsageError(f"--data draws nothing: leave out {option(useless[0])}")
    if args.recipe == "paper" and args.normalisation == "fitted":
        raise UsageError("--normalisation fitted: the paper's recipe fits no constants; expected joint or map")
    if args.recipe == "paper" or args.tokens is not None:
        args.rounds = 0 if args.rounds is None else args.rounds
    for name, value in DRAWING.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    sam = ("detector_model", "segmenter_model", "label", "not_label")
    if args.annotator != "grounded-sam" and (useless := [name for name in sam if getattr(args, name) is not None]):
        raise UsageError(f"{option(useless[0])}: is of --annotator grounded-sam; leave it out, or name that annotator")


def run(args: argparse.Namespace) -> int:
    checked(args)
    import torch

    from dag.cli import annotations, setup
    from dag.cli.annotators import annotator
    from dag.tokens import GuidelineTokens

    setup.writable(args.out.parent)
    sd, *_ = setup.open_model(args)
    before = start(args, sd)
    scaling = before.adapt(sd.config.dag.scaling)
    torch.manual_seed(args.seed)

    if args.data is not None:
        pictures, data = from_folder(args, sd, before)
    else:
        folder = args.out.with_suffix("")
        if (folder / "captions.json").exists():
            raise UsageError(
                f"{folder}: has pictures already; train on them with --data {folder}, remove it, or name another --out"
            )
        annotate, prompts = annotator(args, sd, before.concept), annotations.Prompts(args, sd, before.concept)
        pictures, data = drawn(args, sd, before, annotate, prompts, folder)
        for k in range(1, args.rounds + 1):
            tokens = trained(args, data, before, f"tokens {k}", MINING)
            more = mined(args, sd, data, tokens, scaling, annotate, prompts, folder, k)
            if more is None:
                break
            pictures = torch.cat([pictures, more])
    told(data)
    tokens = before if args.tokens is not None else trained(args, data, before, "tokens")

    name, measured, on = held_out(args, sd, data, before, tokens, scaling)
    how = args.normalisation or tokens.normalisation or next(iter(measured))
    tokens = replace(tokens, normalisation=how, iou=measured[how].of(on.unsafe).iou.mean().item())
    tokens.save(args.out)
    annotations.save_sheet(data, before, tokens, pictures, args.out.with_suffix(".png"))
    print(f"{name}; training loss {tokens.loss or float('nan'):.4f}")
    tell(measured, on, scaling, how, sd.config.dag.warmup)
    print(f"{args.out} and {args.out.with_suffix('.png')}")
    return 0


def start(args: argparse.Namespace, sd):
    """The tokens to start from: the concept's text, or those of --tokens."""
    from dag.cli import setup
    from dag.tokens import GuidelineTokens

    if args.tokens is not None:
        tokens = GuidelineTokens.load(args.tokens)
        if args.normalisation == "fitted" and not tokens.levels:
            raise UsageError(f"--normalisation fitted: {args.tokens} has no constants; expected joint or map")
        if message := tokens.check(sd):
            warn(message)
        return tokens
    concept = SHAPES.concept if args.concept is None else args.concept
    known = sd.config.safety_text if slug(concept) == slug(sd.config.concept) else concept
    safety_text = known if args.safety_text is None else args.safety_text
    setup.check_text(sd, "--concept", concept)
    setup.check_text(sd, "--safety-text", safety_text)
    tokens = replace(GuidelineTokens.from_text(sd, concept, safety_text), min_area=args.min_area)
    return tokens if args.normalisation == "fitted" else replace(tokens, normalisation=args.normalisation)


def from_folder(args: argparse.Namespace, sd, before) -> tuple:
    """Pictures (N, 3, height, width) of --data, and their queries."""
    from dag.cli import annotations
    from dag.tokens import TokenError

    pictures, masks, jobs, seeded = annotations.read_folder(args.data, sd)
    if not (masks > 0).any():
        raise TokenError(f"{args.data}: no unsafe picture, every mask is missing; expected at least one NAME.mask.png")
    data = annotations.nothing_yet(sd, before.reading, *pictures.shape[2:])
    if not seeded:
        print("queries from the pictures with noise added (captions.json has no seed for every picture)")
        room = annotations.from_noised(sd, data, pictures, jobs, args.out.parent)
        data.add(room, masks, [job.kind for job in jobs])
        return pictures, data
    print("queries along the trajectories of the captions' prompts and seeds")
    for part, again, found in annotations.draw(sd, data, jobs, args.out.parent, args.batch_size, "trajectories"):
        at = slice(len(data), len(data) + len(part))
        apart = (again - pictures[at]).abs().mean((1, 2, 3)) / 2  # (batch,)
        if apart.max() > 0.05:
            raise ValueError(
                f"{args.data / part[int(apart.argmax())].name}: is not what its prompt and seed draw in {STEPS} steps "
                f"at scale {sd.config.scale:g} (off by {apart.max():.0%}); leave the seeds out of captions.json"
            )
        data.add(found.queries, masks[at], found.kinds)
    return pictures, data


def drawn(args: argparse.Namespace, sd, before, annotate, prompts, folder: Path) -> tuple:
    """The first pictures (N, 3, height, width) that an annotator sees something in, and their queries."""
    import torch

    from dag.cli import annotations
    from weights.queries import CONCEPT

    side = sd.config.size
    data, pictures = annotations.nothing_yet(sd, before.reading, side, side), []
    total = args.n_unsafe + args.n_safe
    print(annotations.cost(sd, data, total, args.rounds, args.n_safe, args.out.parent))
    kinds = [prompts.kinds[i % len(prompts.kinds)] for i in range(args.n_safe)]
    jobs = prompts.jobs([CONCEPT] * args.n_unsafe, "concept") + prompts.jobs(kinds, "look-alike")
    done = 0
    try:
        for part, some, found in annotations.draw(sd, data, jobs, args.out.parent, args.batch_size, "pictures"):
            masks = annotate(some, found)  # (batch, height, width)
            if args.annotator != "judge":  # the others cannot tell a look-alike from the concept
                masks *= torch.tensor([job.kind == CONCEPT for job in part])[:, None, None]
            annotations.save(folder, part, some, masks)
            done += len(part)
            kept = [i for i, job in enumerate(part) if job.kind != CONCEPT or masks[i].max() > 0]
            found.masks = annotations.on_grid(sd, masks)
            data.merge(found.subset(kept))
            pictures.append(some[kept])
    except KeyboardInterrupt:
        if done:
            warn(f"{done} of {total} pictures were finished; --data {folder} trains on them")
        raise
    unsafe = int(data.unsafe.sum())
    if unsafe == 0:
        raise ValueError(
            f"--annotator {args.annotator}: none of {args.n_unsafe} pictures shows '{before.concept}'; they stay in "
            f"{folder}: look at them, and paint masks for --data or try another annotator"
        )
    if left := total - len(data):
        warn(f"{left} of {args.n_unsafe} pictures of the concept are left out: no mask, the annotator did not see it")
    return torch.cat(pictures), data


def mined(args: argparse.Namespace, sd, data, tokens, scaling: Scaling, annotate, prompts, folder: Path, k: int):
    """Round k: draw more look-alikes, add to the data those that the tokens take for the concept.

    Kinds that were confused before are drawn more often. Returns their pictures (N, 3, height, width), or None.
    """
    import torch

    from dag.cli import annotations

    before = Counter(data.kinds)
    rng = random.Random(args.seed + k)
    kinds = [*prompts.kinds, *rng.choices(prompts.kinds, [before[kind] for kind in prompts.kinds], k=args.n_safe)]
    jobs, pictures, confused = prompts.jobs(kinds[: args.n_safe], f"mined-{k}"), [], []
    candidates = data.subset([])
    for part, some, found in annotations.draw(sd, data, jobs, args.out.parent, args.batch_size, f"round {k}"):
        masks = annotate(some, found) * (args.annotator == "judge")  # (batch, height, width)
        found.masks = annotations.on_grid(sd, masks)
        seen = late(found.measure(tokens, scaling), found, sd.config.dag.warmup)
        false = (seen.acts.amax(0) > 0) & ~found.unsafe  # (batch,)
        wrong = false.nonzero()[:, 0].tolist()
        if wrong:
            annotations.save(folder, [part[i] for i in wrong], some[wrong], masks[wrong])
            candidates.merge(found.subset(wrong))
            pictures.append(some[wrong])
            confused += [part[i].kind for i in wrong]
    said = ", ".join(f"{count} {kind}" for kind, count in Counter(confused).most_common())
    print(
        f"mining, round {k}: {len(confused)} of {len(jobs)} look-alikes were taken for the concept"
        + (said and f": {said}")
    )
    if not confused:
        return None
    room = data.room(len(confused), args.out.parent)  # so that the file of all candidates can go
    for i, queries in enumerate(candidates.queries):
        room[i] = queries
    data.add(room, candidates.masks, candidates.kinds)
    return torch.cat(pictures)


def trained(args: argparse.Namespace, data, before, title: str, share: float = 1.0):
    """The tokens that a recipe makes of the data, in a share of its steps."""
    from dag.cli import annotations
    from weights.optimisation import PAPER, Recipe, optimise, optimise_paper, raise_lo

    paper = args.recipe == "paper"
    recipe = replace(PAPER, steps=PAPER_STEPS * int(data.unsafe.sum())) if paper else Recipe()
    recipe = replace(recipe, steps=max(1, round(share * (args.steps or recipe.steps))))
    bar = annotations.progress(
        (optimise_paper if paper else optimise)(data, before, recipe, args.seed), title, recipe.steps
    )
    for _, best in bar:
        if best is not None:
            after = best
            bar.set_postfix(loss=f"{after.loss:.4f}")
    return after if paper else raise_lo(data, after)


def told(data) -> None:
    """Say what there is to train on."""
    unsafe = int(data.unsafe.sum())
    kinds = Counter(kind for kind, own in zip(data.kinds, data.unsafe.tolist(), strict=True) if not own)
    print(
        f"{unsafe} unsafe and {len(data) - unsafe} safe pictures"
        + "".join(f", {n} {kind}" for kind, n in kinds.items())
    )
    if unsafe == len(data):
        warn("no safe picture: nothing teaches the tokens what is not the concept; add some look-alikes")


def held_out(args: argparse.Namespace, sd, data, before, tokens, scaling: Scaling) -> tuple:
    """A name, what AnnotatedQueries.measure finds in pictures that were not trained on, and these pictures' data."""
    import torch

    from dag.cli import annotations
    from dag.cli.annotators import annotator
    from weights.queries import CONCEPT, Seen

    if args.data is None and args.annotator == "judge":
        other = argparse.Namespace(**vars(args) | {"seed": args.seed + 77})
        prompts, judge = annotations.Prompts(other, sd, before.concept), annotator(args, sd, before.concept)
        jobs, on = prompts.jobs(HELD_OUT * [CONCEPT, *prompts.kinds], "held-out"), data.subset([])
        for _, some, found in annotations.draw(sd, data, jobs, args.out.parent, args.batch_size, "held-out pictures"):
            found.masks = annotations.on_grid(sd, judge(some, found))
            kept = [i for i, kind in enumerate(found.kinds) if kind != CONCEPT or found.unsafe[i]]
            on.merge(found.subset(kept))
        return f"{len(on)} held-out pictures, masks by the judge", on.measure(tokens, scaling), on
    unsafe, safe = data.unsafe.nonzero()[:, 0].tolist(), (~data.unsafe).nonzero()[:, 0].tolist()
    if args.tokens is not None or len(unsafe) < 2:
        return f"{len(data)} pictures, none of them held out", data.measure(tokens, scaling), data
    order, parts = unsafe + safe, []
    folds = len(order) if len(order) <= 16 else 4
    for k in range(folds):
        rest = data.subset([i for j, i in enumerate(order) if j % folds != k])
        without = trained(args, rest, before, f"held-out part {k + 1} of {folds}")
        parts.append(data.subset(order[k::folds]).measure(without, scaling))
    measured = {
        how: Seen(*(torch.cat(v, 1) for v in zip(*(part[how] for part in parts), strict=True))) for how in parts[0]
    }
    on = data.subset([i for k in range(folds) for i in order[k::folds]])
    return f"{len(on)} pictures, each held out in one of {folds} trainings", measured, on


def late(measured: dict, on, warmup: int):
    """What is seen from the first level after warm-up on, by the reading that comes first."""
    from dag.cli.annotations import STRIDE
    from weights.queries import Seen

    return Seen(*(values[-(-warmup // STRIDE) :] for values in next(iter(measured.values()))))


def tell(measured: dict, on, scaling: Scaling, how: str, warmup: int) -> None:
    """Print what was measured, under every normalisation, then by kind, and last of all one line to hand on."""
    import torch

    from weights.queries import choose

    heads = "found", f"A >= {scaling.edit:g}", f"A >= {scaling.unsafe:g}", "guided"
    print("IoU in unsafe pictures. In unsafe / safe ones, shares of pictures in which something is found, of the frame")
    print(
        f"with {heads[1]} and {heads[2]}, of pictures that would be guided: found, {heads[1]} on < {scaling.full:.0%}."
    )
    print("normalisation   t   IoU " + "".join(f"{head:>13}" for head in heads))
    unsafe, summary = on.unsafe, []
    for reading, seen in measured.items():
        u, s = seen.of(unsafe), seen.of(~unsafe)
        for k in range(0, len(on.times), 4):
            cells = [f"{a[k].mean():.2f} / {b[k].mean():.2f}" for a, b in zip(u[1:], s[1:], strict=True)]
            print(f"{reading:13} {on.times[k]:3d}  {u.iou[k].mean():.2f}  {'  '.join(cells)}")
        shares = [f"{head} {a.mean():.2f}/{b.mean():.2f}" for head, a, b in zip(heads, u[1:], s[1:], strict=True)]
        summary.append(f"{reading} IoU {u.iou.mean():.2f}, {', '.join(shares)}")
    seen = late({how: measured[how]}, on, warmup)
    kinds = {k: torch.tensor([kind == k for kind in on.kinds]) & ~unsafe for k in dict.fromkeys(on.kinds)}
    print(f"\n{'read by ' + how + ', after warm-up':34} pictures   falsely guided: at any level   levels")
    worst = []
    for kind, at in kinds.items():
        if at.any():
            acts = seen.of(at).acts
            worst.append((acts.amax(0).mean().item(), kind))
            print(f"{kind:34} {int(at.sum()):8d} {worst[-1][0]:31.2f} {acts.mean():8.2f}")
    u = seen.of(unsafe)
    clear = torch.tensor([t <= 501 for t in on.times[-len(u.iou) :]])
    iou = f"IoU {u.iou.mean():.2f}, {u.iou[clear].mean():.2f} at t <= 501"
    print(f"the concept: found on {u.acts.mean():.2f} of the levels, {iou}")
    if worst:
        print("worst kind of look-alike: {1}, {0:.2f} falsely guided".format(*max(worst)))
    best = choose(measured, unsafe)
    advice = f"choose {best}" if best else "none of them guides, train with the default recipe"
    print(f"mean of all t: {'; '.join(summary)}. Read by {how}; {advice}")


def main(argv: list[str] | None = None) -> int:
    return guarded("train_tokens.py", lambda: run(parser().parse_args(argv)), argv)


if __name__ == "__main__":
    sys.exit(main())
