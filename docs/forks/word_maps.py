"""Which pixels attend to a word of the prompt? The full softmax over the text, as a picture for each word.

Room: hooks. `attention` looks and answers None, so the layer goes on as it was.
Source: Tang et al. 2023, "What the DAAM": mean over heads, layers and steps.
Run `python docs/forks/word_maps.py`; it writes out/word-maps.png.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import dag
from dag.cam import combine
from dag.cli.pictures import contact_sheet, overlay, save_png, to_pil
from weights.shapes.judge import Judge

PROMPTS = ["a red circle and a green triangle on night", "a yellow star and a blue square", "a brick and a purple star"]


class WordMaps(dag.Hook):
    """Adds up what the conditional rows' attention p = softmax(q k^T / sqrt(d)) gives to every token place."""

    def __init__(self):
        self.total = {}  # layer -> (b, m, n)

    def attention(self, layer, q, k, v):
        if layer.factor <= 2:
            q, k = q[self.call.cond], k[self.call.cond]
            p = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)  # (b, h, n, m)
            self.total[layer] = self.total.get(layer, 0) + p.mean(1).transpose(1, 2)  # (b, m, n)

    def read(self, H, W):
        """The map of every token place, (b, m, H, W), over its largest value."""
        maps = combine(list(self.total.values()), [layer.factor for layer in self.total], H, W)
        return maps / maps.amax((2, 3), keepdim=True)


def main() -> dict[str, float]:
    """How much more pixels inside a shape attend to the shape's word than pixels outside do: mean over the words."""
    sd, words, rows, ratios = dag.load(), WordMaps(), [], []
    *_, last = dag.sample(sd, PROMPTS, dag.Guidance(), steps=20, hooks=[words])
    pictures = sd.decode(last.x)
    for prompt, image, maps, seen in zip(
        PROMPTS, to_pil(pictures), words.read(*last.x.shape[2:]), Judge.load().read(pictures), strict=True
    ):
        of = {word: maps[places].mean(0) for word, places in sd.text.places(prompt)[0]}  # (H, W) each
        rows.append((prompt, [image, *(overlay(image, A) for A in of.values())]))
        for (_, shape), mask in seen.items():
            if shape in of:
                inside = F.adaptive_avg_pool2d(mask[None].float(), of[shape].shape)[0] >= 0.5  # (H, W)
                ratios.append((of[shape][inside].mean() / of[shape][~inside].mean()).item())
    Path("out").mkdir(exist_ok=True)
    save_png(contact_sheet(rows, ["picture", "its words"], side=96), Path("out/word-maps.png"))
    return {"attention inside over outside": sum(ratios) / len(ratios)}


if __name__ == "__main__":
    print(main())
