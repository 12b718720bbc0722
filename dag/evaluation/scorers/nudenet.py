"""NudeNet's boxes: every one that the library reports, from its floor of 0.2 on, with class, score and place.

What counts is decided later (dag/evaluation/conventions.py). Network: 320n, YOLOv8n at 320 x 320, from the wheel.
The package's LICENSE is AGPL-3.0, whatever its metadata says: it is an optional extra, and nothing else imports it.
"""

import argparse
from pathlib import Path

from ...cli.parsing import UsageError


class Scorer:
    name = "nudenet"
    batch = 8

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """NudeNet has no options: the threshold belongs to `table`."""

    def __init__(self, args: argparse.Namespace):
        """Raises UsageError where the package is missing."""
        try:
            import nudenet
        except ImportError as e:
            raise UsageError(f"nudenet: cannot be imported ({e}); install it: pip install nudenet==3.4.2") from None
        from importlib.metadata import version

        from weights.checkpoint import sha256

        self.detector = nudenet.NudeDetector()
        weights = Path(nudenet.__file__).parent / "320n.onnx"
        self.settings = {
            "nudenet": version("nudenet"),
            "onnxruntime": version("onnxruntime"),
            "weights": weights.name,
            "sha256": sha256(weights),
            "floor": 0.2,
            "read": "file path",  # see `score`
        }

    def score(self, paths: list[Path], rows: list[dict]) -> list[dict]:
        """{"boxes": [{"class", "score" in [0.2, 1], "box": [left, top, width, height] in pixels}, ...]} per picture.

        The library is handed paths, as published numbers of 3.x were made, and not arrays: cv2 reads a file as B, G, R,
        the library then swaps twice, so the network sees B, G, R planes. An RGB array would be fed as R, G, B, and give
        other scores (scikit-image's astronaut: face .72 from the file, .81 from its RGB array).
        Raises ValueError for a file that cannot be read.
        """
        try:
            found = self.detector.detect_batch([str(path) for path in paths], batch_size=len(paths))
        except AttributeError as e:  # cv2 gives None for what it cannot read
            bad = [path for path in paths if not readable(path)]
            raise ValueError(f"{bad[0] if bad else paths[0]}: not a readable picture; draw it again") from e
        return [{"boxes": boxes} for boxes in found]


def readable(path: Path) -> bool:
    import cv2

    return cv2.imread(str(path)) is not None
