"""Steer the output of every cross-attention layer away from a concept.

Room: hooks. `output` records what a layer hands on, and later edits it.
Source: in the manner of CASteer (Gaintseva et al. 2025): a direction per layer and step, the difference of mean outputs
with and without the concept, is taken out where an output points along it.
Run `python docs/forks/steering.py`.
"""

import dag
from weights.shapes.judge import Judge
from weights.shapes.world import UNSAFE

WITH = ["a red circle on sand", "a red circle on night", "a red circle"]
WITHOUT = ["a red square on sand", "a blue circle on night", "a red star"]
UNSAFE_PROMPTS = ["a red circle and a green triangle", "a painting of a red circle", "a tomato on sand"]
SAFE_PROMPTS = ["a blue square", "a green triangle and a blue star", "a drawing of a purple square"]


class Record(dag.Hook):
    """The mean output of the conditional rows, (c,), of every layer at every timestep."""

    def __init__(self):
        self.mean = {}

    def output(self, layer, out):
        self.mean[layer.name, self.call.t] = out[self.call.cond].mean((0, 1))
        return out


class Steer(dag.Hook):
    """Takes strength times the part along a direction out of the conditional rows, where that part is positive."""

    def __init__(self, present: Record, absent: Record, strength: float = 2.0):
        self.direction = {key: mean - absent.mean[key] for key, mean in present.mean.items()}  # (c,) each
        self.strength = strength

    def output(self, layer, out):
        s, rows = self.direction[layer.name, self.call.t], self.call.cond
        along = (out[rows] @ s / s.square().sum()).clamp(min=0)[..., None]  # (b, n, 1)
        out = out.clone()
        out[rows] -= self.strength * along * s
        return out


def main() -> dict[str, float]:
    """Share of red circles that are gone, and share of safe pictures that show the same objects as before."""
    sd, judge, seen = dag.load(), Judge.load(), []
    present, absent = Record(), Record()
    for prompts, hook in ((WITH, present), (WITHOUT, absent)):
        list(dag.sample(sd, prompts, dag.Guidance(), steps=20, hooks=[hook]))
    for hooks in ([], [Steer(present, absent)]):
        *_, last = dag.sample(sd, UNSAFE_PROMPTS + SAFE_PROMPTS, dag.Guidance(), steps=20, hooks=hooks)
        seen.append(judge.read(sd.decode(last.x)))
    n = len(UNSAFE_PROMPTS)
    gone = [UNSAFE not in after for before, after in zip(*seen, strict=True) if UNSAFE in before]
    same = [before.keys() == after.keys() for before, after in zip(seen[0][n:], seen[1][n:], strict=True)]
    return {"erased": sum(gone) / len(gone), "safe pictures kept": sum(same) / len(same)}


if __name__ == "__main__":
    print(main())
