"""The miniature's suites: the sets of prompts of `shapes` and of `concepts`.

shapes: for the red circle, three ways to ask for it (explicit, by its nickname, "circle" without a colour), a set for
each kind of look-alike, and benign prompts; 32 each, one picture per prompt. concepts: the red circle and the blue
star, each alone, both in one picture, and neither. Seeds 13 and 17 are kept for reporting; 0 to 3 were used for tuning.
"""

import argparse
import random

from dag.cli.parsing import UsageError
from weights.shapes import world

from .prompts import Prompt, PromptSet

COUNT, SEEDS = 32, {"shapes": 13, "concepts": 17}
CONCEPTS = {"red-circle": ("red", "circle"), "blue-star": ("blue", "star")}  # by their token files


def named(kind: world.Kind) -> str:
    """A kind as a set's name, "red-circle"."""
    return "-".join(kind)


RED = ("explicit", "nickname", "colourless")  # sets whose pictures show a red circle, most or some of them
KINDS = (*(named(kind) for kind in world.alike(world.UNSAFE)), "others")  # of look-alikes
SAFE = (*KINDS, "benign")
PAIRS = {
    "only-red-circle": [("red", "circle")],
    "only-blue-star": [("blue", "star")],
    "both": [*CONCEPTS.values()],
    "neither": [],
}


def settings(suite: str, args: argparse.Namespace) -> tuple[int, int]:
    """How many prompts of each set, and their seed. Raises UsageError."""
    if args.scale is not None:
        raise UsageError(f"--scale {args.scale:g}: --prompts {suite} is told of at the miniature's own; leave it out")
    return args.count or COUNT, SEEDS[suite] if args.seed is None else args.seed


def shapes(args: argparse.Namespace) -> list[PromptSet]:
    """The sets of the red circle. Raises UsageError for more prompts than there are different ones."""
    count, seed = settings("shapes", args)
    try:
        texts = world.prompt_sets(count, seed)
    except ValueError as e:
        raise UsageError(f"--count: {e}") from e
    del texts["look-alike"]  # by kind instead
    near = world.look_alikes(world.UNSAFE, count, seed)
    texts |= {name.replace(" ", "-"): some for name, some in near.items()}
    return numbered("shapes", texts, seed, args.images)


def concepts(args: argparse.Namespace) -> list[PromptSet]:
    """The sets of two concepts; those that show neither are neither red nor blue, neither a circle nor a star."""
    count, seed = settings("concepts", args)
    rng, others, texts = random.Random(seed), world.unlike(*CONCEPTS.values()), {}
    for name, kinds in PAIRS.items():
        texts[name] = []
        for _ in range(count):
            shown = rng.sample(kinds, len(kinds)) or [rng.choice(others)]
            texts[name].append((world.any_phrase([" ".join(kind) for kind in shown], rng), set(shown)))
    return numbered("concepts", texts, seed, args.images)


def numbered(suite: str, texts: dict[str, list[tuple[str, set]]], seed: int, images: int) -> list[PromptSet]:
    """The sets, each picture with a seed of its own."""
    first, sets = 100_000 * (seed + 1), []
    for name, some in texts.items():
        prompts = [
            Prompt(str(k), text, first + k * images, more={"asked": sorted(named(kind) for kind in kinds)})
            for k, (text, kinds) in enumerate(some)
        ]
        sets.append(PromptSet(name, prompts, {"variant": f"seed {seed}"}, suite))
        first += len(some) * images
    return sets


SETS = {"shapes": shapes, "concepts": concepts}
