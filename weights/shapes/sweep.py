"""How the miniature's constants were chosen: one lever at a time around SHAPES.dag, on prompts kept for tuning.

`python -m weights.shapes.sweep` prints rows like those of docs/constants.md: SHAPES.dag with what a row names changed.
"""

import argparse
from dataclasses import replace

import dag
from dag.config import SHAPES, DAGConfig, Scaling
from weights.shapes.benchmark import TOKENS, blind, draw, effect, part
from weights.shapes.judge import Judge
from weights.shapes.world import prompt_sets

VARIANTS: list[dict] = [
    {},
    {"warmup": 3},
    {"warmup": 1},
    {"memory": 0.95},
    {"memory": 0.95, "warmup": 1},
    {"memory": 0.95, "warmup": 1, "s_max": 2.5},
    {"memory": 0.95, "warmup": 1, "top": 0.1},
    {"memory": 0.95, "warmup": 1, "top": 1.0, "s_max": 2.0},
    {"memory": 0.9, "warmup": 1},
    {"memory": 0.97, "warmup": 1, "s_max": 2.5},
    {"memory": 1.0, "warmup": 1, "s_max": 4.0},
    {"memory": 1.0, "warmup": 1, "top": 1.0},
    {"memory": 1.0, "warmup": 1, "top": 1.0, "s_max": 2.0},
    {"memory": 1.0, "warmup": 1, "top": 1.0, "s_max": 1.5},
    {"memory": 0.0, "warmup": 1},
    {"memory": 0.0, "warmup": 1, "s_max": 2.0},
    {"memory": 0.0, "warmup": 1, "top": 1.0, "s_max": 2.0},
    {"memory": 0.0, "warmup": 1, "top": 1.0, "s_max": 1.5},
    {"min_area": 0.06},
    {"min_area": 0.06, "warmup": 3},
    {"s_max": 4.0},
    {"paper": True},
]
COLUMNS = {  # of a set, what is told
    "explicit": ("erased", "clean", "others kept", "change outside"),
    "nickname": ("erased", "clean", "others kept", "change outside"),
    "look-alike": ("safe ones changed", "identical"),
    "benign": ("identical",),
}


def config(changes: dict) -> DAGConfig:
    """SHAPES.dag with some fields of it, or of its scaling, changed; `paper`: the paper's constants."""
    if "paper" in changes:
        return DAGConfig(scaling=Scaling(min_area=SHAPES.dag.scaling.min_area))
    own = {k: v for k, v in changes.items() if k in ("warmup", "top", "memory")}
    scaling = {k: v for k, v in changes.items() if k in ("s_max", "min_area")}
    return replace(SHAPES.dag, **own, scaling=replace(SHAPES.dag.scaling, **scaling))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="of each set, one picture each (default: 8)")
    args = parser.parse_args()
    sd, judge, tokens = dag.load(), Judge.load(), dag.GuidelineTokens.load(TOKENS)
    sets = prompt_sets(args.prompts, seed=1)
    prompts = [prompt for name in COLUMNS for prompt, _ in sets[name]]
    seeds = list(range(1000, 1000 + len(prompts)))
    plain = draw(sd, prompts, blind(tokens, SHAPES.dag), seeds)
    seen = judge.read(plain["images"])
    heads = [f"{name}: {column}" for name in COLUMNS for column in COLUMNS[name]]
    print(f"| changed | {' | '.join(heads)} |\n{'|---' * (1 + len(heads))}|")
    for changes in VARIANTS:
        other = draw(sd, prompts, dag.DAG(tokens, cfg=config(changes)), seeds)
        then, cells = judge.read(other["images"]), []
        for k, name in enumerate(COLUMNS):
            at = slice(k * args.prompts, (k + 1) * args.prompts)
            result = effect(part(plain, at), part(other, at), seen[at], then[at])
            cells += ["" if result[column] is None else str(result[column]) for column in COLUMNS[name]]
        print(f"| {', '.join(f'{k} {v}' for k, v in changes.items()) or 'nothing'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
