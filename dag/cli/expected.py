"""The demonstration's pictures as they should be. `python -m dag.cli.expected FOLDER` stores those of a run as such."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dag.model import MINIATURE

from .pictures import save_png

FILE = MINIATURE / "expected.png"  # side by side, unguided and guided, in the report's order
TOLERANCE = 1.0  # % of the range, mean over a picture; another CPU's arithmetic stays far below


def compare(images: list[Image.Image], file: Path = FILE) -> str:
    """One line: whether the demonstration's pictures are as expected, or by how much not."""
    drawn = np.concatenate([np.asarray(image, np.float32) for image in images], axis=1)  # (height, pictures*width, 3)
    stored = np.asarray(Image.open(file).convert("RGB"), np.float32)
    if drawn.shape != stored.shape:
        return f"not as expected: {len(images)} pictures, {file} does not hold as many of their size"
    apart = np.abs(drawn - stored).reshape(len(drawn), len(images), -1).mean((0, 2)) / 2.55  # (pictures,) in %
    said = f"at most {apart.max():.2f} % of the range from the stored pictures, mean over a picture"
    if apart.max() <= TOLERANCE:
        return f"as expected: {said}"
    return f"not as expected: picture {int(apart.argmax()) + 1} of {len(images)}, {said} (tolerance {TOLERANCE:g} %)"


def main() -> None:
    folder = Path(sys.argv[1])
    pictures = json.loads((folder / "report.json").read_text())["pictures"]
    images = [np.asarray(Image.open(folder / entry["file"])) for entry in pictures]
    save_png(Image.fromarray(np.concatenate(images, axis=1)), FILE)


if __name__ == "__main__":
    main()
