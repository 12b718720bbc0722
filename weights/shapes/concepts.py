"""Two concepts at once: the red circle and the blue star, each alone, both in one picture, and neither of them.

`python -m weights.shapes.concepts` draws every prompt unguided and with both token files together, prints what became
of each concept, read by the judge (columns as in benchmark.py), and writes a sheet, --out.
"""

import argparse
import random
from pathlib import Path

import torch

import dag
from dag.cli.pictures import contact_sheet, save_png, to_pil
from dag.model import MINIATURE
from weights.shapes import world
from weights.shapes.benchmark import draw, effect, part
from weights.shapes.judge import Judge

CONCEPTS = {("red", "circle"): "red-circle.safetensors", ("blue", "star"): "blue-star.safetensors"}
SETS = {"red circle": [("red", "circle")], "blue star": [("blue", "star")], "both": list(CONCEPTS), "neither": []}
COLUMNS = "with it", "erased", "clean", "change outside"


def prompts(kinds: list[world.Kind], count: int, rng: random.Random) -> list[str]:
    """Prompts that show these kinds, or one that is neither red nor blue, neither a circle nor a star, in any style."""
    others, out = world.unlike(*CONCEPTS), []
    for _ in range(count):
        shown = rng.sample(kinds, len(kinds)) or [rng.choice(others)]
        out.append(world.any_phrase([" ".join(kind) for kind in shown], rng))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="of each set, one picture each (default: 32)")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/concepts.png"), metavar="FILE")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sd, judge, rng = dag.load(), Judge.load(), random.Random(args.seed)
    tokens = [dag.GuidelineTokens.load(MINIATURE / file) for file in CONCEPTS.values()]
    texts = {name: prompts(kinds, args.prompts, rng) for name, kinds in SETS.items()}
    every = [text for some in texts.values() for text in some]
    seeds = [100_000 * (args.seed + 1) + i for i in range(len(every))]
    plain, other = (draw(sd, every, method, seeds) for method in (dag.Guidance(), dag.DAG(*tokens)))
    seen, then = judge.read(plain["images"]), judge.read(other["images"])
    rows, shown = [], min(3, args.prompts)
    print(f"| prompts | concept | {' | '.join(COLUMNS)} | rows per step |\n{'|---' * (3 + len(COLUMNS))}|")
    for k, (name, some) in enumerate(texts.items()):
        at = slice(k * args.prompts, (k + 1) * args.prompts)
        before, after = part(plain, at), part(other, at)
        for concept in CONCEPTS:
            result = effect(before, after, seen[at], then[at], (concept, *CONCEPTS))
            cells = ["" if result[column] is None else f"{result[column]:g}" for column in COLUMNS]
            print(f"| {name} | {' '.join(concept)} | {' | '.join(cells)} | {result['rows per step']:.2f} |")
        if name == "both":
            had = [t for s, t in zip(seen[at], then[at], strict=True) if CONCEPTS.keys() <= s.keys()]
            both = sum(not CONCEPTS.keys() & t.keys() for t in had)
            print(f"| both | both erased | {len(had)} | {both / max(1, len(had)):.4g} | | | |")
        if name == "neither":
            print(f"| neither | bit for bit the unguided picture | {args.prompts} | {result['identical']:g} | | | |")
        pairs = torch.stack([before["images"], after["images"]], 1)[:shown]  # (shown, 2, 3, 128, 128)
        rows.append((" | ".join(some[:shown]), to_pil(pairs.flatten(0, 1))))
    save_png(contact_sheet(rows, ["unguided", "guided with both"] * shown, side=128), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
