"""Let some words of the prompt weigh less, or more, than the others.

Room: hooks. `attention` takes the layer's place, in the conditional rows alone.
Source: Hertz et al. 2022, "Prompt-to-Prompt", section 3.2: attention is multiplied after the softmax.
Run `python docs/forks/reweight.py`.
"""

import torch

import dag
from weights.shapes.judge import Judge

PROMPTS = ["a red circle and a green triangle", "a yellow star and a blue square", "a purple circle and a red star"]


class Reweight(dag.Hook):
    """Multiplies the attention that image i gives to its token places[i] by a weight."""

    def __init__(self, places: list[list[int]], weight: float):
        self.places, self.weight = places, weight

    def attention(self, layer, q, k, v):
        p = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)  # (b, h, n, m)
        for p_i, places in zip(p[self.call.cond], self.places, strict=False):  # no rows in a safety call
            p_i[:, :, places] *= self.weight
        return p @ v  # (b, h, n, d)


def main() -> dict[str, float]:
    """Shares of pictures with the first and the last object, for weights of the last object's two words."""
    sd, judge, shares = dag.load(), Judge.load(), {}
    words = [sd.text.places(prompt)[0] for prompt in PROMPTS]  # a COLOUR SHAPE and a COLOUR SHAPE
    first, last = ([(pair[k][0], pair[k + 1][0]) for pair in words] for k in (1, 5))
    for weight in (1.0, 0.0):
        hook = Reweight([pair[5][1] + pair[6][1] for pair in words], weight)
        *_, end = dag.sample(sd, PROMPTS, dag.Guidance(), steps=20, hooks=[hook])
        seen = judge.read(sd.decode(end.x))
        for name, kinds in (("first", first), ("last", last)):
            shown = [kind in picture for kind, picture in zip(kinds, seen, strict=True)]
            shares[f"{name} object at weight {weight:g}"] = sum(shown) / len(shown)
    return shares


if __name__ == "__main__":
    print(main())
