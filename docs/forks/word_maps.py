"""Which pixels attend to a word of the prompt? The full softmax over the text, as a picture for each word.

Room: hooks. The one it uses, `TextMaps` of dag/recording.py, looks and answers None, so the layers go on as they were.
Source: Tang et al. 2023, "What the DAAM": mean over heads, layers and steps.
Run `python docs/forks/word_maps.py`; it writes out/word-maps.png.
"""

from pathlib import Path

import torch.nn.functional as F

import dag
from dag.cli.pictures import contact_sheet, overlay, save_png, to_pil
from dag.recording import TextMaps
from dag.tokens import Reading
from weights.shapes.judge import Judge

PROMPTS = ["a red circle and a green triangle on night", "a yellow star and a blue square", "a brick and a purple star"]


def main() -> dict[str, float]:
    """How much more pixels inside a shape attend to the shape's word than pixels outside do: mean over the words."""
    sd, rows, ratios, total = dag.load(), [], [], 0
    words = TextMaps(sd.unet, Reading((1, 2)))
    for step in dag.sample(sd, PROMPTS, dag.Guidance(), steps=20, hooks=[words]):
        total = total + words.read(*step.x.shape[2:])  # (b, m, H, W)
    pictures, total = sd.decode(step.x), total / total.amax((2, 3), keepdim=True)
    for prompt, image, maps, seen in zip(PROMPTS, to_pil(pictures), total, Judge.load().read(pictures), strict=True):
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
