"""The judge: which (colour, shape) objects a picture shows, and where. A small detector trained on renders only.

`python -m weights.shapes.judge PICTURE.png ...` prints what it reads in pictures of 128 x 128 pixels.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from weights.shapes.world import KINDS, Kind

FILE = Path(__file__).resolve().parent / "judge.safetensors"


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Judge(nn.Module):
    """Picture (b, 3, 128, 128) in [-1, 1] -> a logit per kind (b, 20) and a label map's logits (b, 21, 32, 32).

    Label 0 is the ground, label 1 + k is kind k of world.KINDS.
    """

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(_conv(3, 24, 2), _conv(24, 48, 2), _conv(48, 48))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), _conv(48, 96), _conv(96, 96))
        self.kinds = nn.Linear(96, len(KINDS))
        self.where = nn.Sequential(_conv(48 + 96, 32), nn.Conv2d(32, 1 + len(KINDS), 1))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, 128, 128) in [-1, 1] -> what the kinds are read from, (b, 96)."""
        return torch.cat([self.coarse(self.fine(x)).amax((2, 3)) for x in pictures.split(100)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)  # (b, 48, 32, 32)
        coarse = self.coarse(fine)  # (b, 96, 16, 16)
        kinds = self.kinds(coarse.amax((2, 3)))  # (b, 20)
        both = torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], dim=1)  # (b, 144, 32, 32)
        return kinds, self.where(both)  # (b, 20), (b, 21, 32, 32)

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[dict[Kind, Tensor]]:
        """Pictures (b, 3, 128, 128) in [-1, 1] -> per picture, each kind it shows with its mask (128, 128) bool."""
        kinds, where = self(pictures)
        labels = F.interpolate(where, pictures.shape[2:], mode="bilinear").argmax(1)  # (b, 128, 128)
        shown = kinds > 0  # (b, 20)
        return [{KINDS[k]: labels[i] == 1 + k for k in shown[i].nonzero()[:, 0].tolist()} for i in range(len(pictures))]

    @classmethod
    def load(cls, path: Path = FILE) -> "Judge":
        judge = cls()
        judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
        return judge.eval().requires_grad_(False)


def share(values: list[bool]) -> float | None:
    """How many of them are true, of one; None of none."""
    return round(sum(values) / len(values), 4) if values else None


def following(asked: list[set[Kind]], seen: list[dict[Kind, Tensor]]) -> dict:
    """Shares of pictures that show all objects asked for, and that show nothing else."""
    return {
        "all asked": share([a <= s.keys() for a, s in zip(asked, seen, strict=True)]),
        "nothing else": share([s.keys() <= a for a, s in zip(asked, seen, strict=True)]),
    }


def main() -> None:
    judge = Judge.load()
    for name in sys.argv[1:]:
        picture = np.asarray(Image.open(name).convert("RGB"), np.float32) / 127.5 - 1
        (seen,) = judge.read(torch.from_numpy(picture).permute(2, 0, 1)[None])
        print(
            f"{name}: {', '.join(f'{c} {s} ({mask.float().mean():.0%})' for (c, s), mask in seen.items()) or 'nothing'}"
        )


if __name__ == "__main__":
    main()
