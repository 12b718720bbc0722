"""FID (Heusel et al. 2017): the Fréchet distance between two sets of pictures, in features of an Inception network.

Scoring writes features, 2,048 per picture, into a file beside the rows; `table` computes the distance. The network is
torch-fidelity's conversion of the TensorFlow original (`inception-v3-compat`), which resizes every picture to 299 x 299
as TensorFlow 1 did, bilinear and without antialiasing. Another resize gives other figures.

Real pictures are turned into a reference once, for all runs: python -m dag.evaluation.scorers.fid FOLDER REFERENCE
"""

import argparse
import json
import sys
from pathlib import Path

from ...cli.parsing import Parser, UsageError, guarded

FEATURES = 2048
FEW = 2048  # pictures; below, a covariance of 2,048 features is singular
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Scorer:
    name = "fid"
    batch = 32

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        text = f"Inception's weights, {WEIGHTS} of torch-fidelity's releases (default: downloaded once)"
        parser.add_argument("--fid-weights", type=Path, metavar="FILE", help=text)

    @staticmethod
    def table_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--fid-real", type=Path, metavar="FILE", help="reference made by python -m dag.evaluation.scorers.fid")
        add(
            "--fid-base",
            type=Path,
            metavar="RUN",
            help="run whose pictures without guidance FID SD1.4 compares with (default: the run itself)",
        )

    def __init__(self, args: argparse.Namespace):
        """Raises UsageError where the package or the weights cannot be had."""
        from ...cli.setup import default_device

        self.device = args.device or default_device()
        self.network, self.settings = inception(args.fid_weights, self.device)
        self.path, self.written = args.folder / "rows" / f"fid-{args.process}.f32", 0

    def score(self, paths: list[Path], rows: list[dict]) -> list[dict]:
        """{"features_file": its name in rows/, "index": the picture's place in it} per picture.

        The file holds float32, little-endian, FEATURES per picture, and is complete before its rows are written.
        """
        content = self.features(paths).astype("<f4").tobytes()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(content)
        first, self.written = self.written, self.written + len(paths)
        return [{"features_file": self.path.name, "index": first + i} for i in range(len(paths))]

    def features(self, paths: list[Path]):
        """Features of pictures of any size, an array (n, FEATURES)."""
        import numpy as np
        import torch

        from ...cli.pictures import opened

        arrays = [np.asarray(opened(path)) for path in paths]
        one_size = len({array.shape for array in arrays}) == 1
        found = []
        for some in [arrays] if one_size else [[array] for array in arrays]:
            u8 = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2)  # (n, 3, height, width)
            found.append(self.network(u8.to(self.device))[0].float().cpu())  # (n, FEATURES)
        return torch.cat(found).numpy()


def inception(weights: Path | None, device: str) -> tuple:
    """torch-fidelity's network, which takes uint8 (n, 3, height, width), and its recipe. Raises UsageError."""
    import torch

    from weights.checkpoint import sha256

    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except Exception as e:  # a torchvision that was built for another torch raises RuntimeError
        found = " ".join(str(e).split())[:160]
        raise UsageError(
            f"fid: torch-fidelity cannot be imported ({found}); expected it and the torchvision of this torch: "
            "pip install torch-fidelity"
        ) from e
    if weights is None:
        weights = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        try:  # checked against the hash in its name
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True)
        except Exception as e:
            raise UsageError(f"fid: {WEIGHTS} cannot be downloaded ({e}); expected it as --fid-weights FILE") from e
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # the library would execute what is in it
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    except Exception as e:
        found = " ".join(str(e).split())[:160]
        raise UsageError(f"--fid-weights {weights}: cannot be used ({found}); expected {WEIGHTS}") from e
    told = {"torch-fidelity": torch_fidelity.__version__, "network": "inception-v3-compat", "sha256": sha256(weights)}
    return network.to(device), told


def moments(features) -> tuple:
    """Features (n, d) -> their mean (d,) and a root R (min(n, d), d) of their covariance RᵀR, in float64."""
    import numpy as np

    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError(f"FID of {len(features)} picture(s): has no covariance; expected at least 2, better thousands")
    mean = features.mean(0)
    root = (features - mean) / np.sqrt(len(features) - 1)  # (n, d)
    return mean, np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root


def frechet(one: tuple, other: tuple) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two `moments`.

    With C = RᵀR the last trace is the sum of the singular values of R1 R2ᵀ: exact for singular covariances too, where
    square roots of eigenvalues that are 0 but for rounding are not.
    """
    import numpy as np

    (m1, r1), (m2, r2) = one, other
    shared = np.linalg.svd(r1 @ r2.T, compute_uv=False).sum()
    return max(0.0, float(((m1 - m2) ** 2).sum() + (r1**2).sum() + (r2**2).sum() - 2 * shared))


def features_of(run, scores: list[dict]):
    """The features that some rows of `fid` name, an array (n, FEATURES). Raises ValueError."""
    import numpy as np

    files = {}
    for name in sorted({score["features_file"] for score in scores}):
        path = run.folder / "rows" / name
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; expected the features that `score` wrote: keep the run's whole folder"
            )
        values = np.fromfile(path, "<f4")
        files[name] = values[: len(values) // FEATURES * FEATURES].reshape(-1, FEATURES)  # its last row may be torn
    return np.stack([files[score["features_file"]][score["index"]] for score in scores])  # (n, FEATURES)


def figure(run, rows: list[dict], args: argparse.Namespace) -> dict:
    """Both FIDs of the pictures of one set and method, None where there is nothing to compare or to compare with.

    run: a dag.evaluation.ledger.Run; rows: its rows of these pictures, with those of `fid` merged in.
    Returns {"FID real", "FID SD1.4", "n", "note"}. Raises ValueError, UsageError.
    """
    recipe, found = run.scorers["fid"], {"FID real": None, "FID SD1.4": None}
    notes = [f"{recipe['network']} of torch-fidelity {recipe['torch-fidelity']}, weights {recipe['sha256'][:8]}"]
    if len(rows) < 2:
        return found | {"n": len(rows), "note": "a single picture has no covariance, so no FID"}
    own = moments(features_of(run, rows))
    if args.fid_real:
        mean, root, count, made = reference(args.fid_real)
        agree(args.fid_real, made, recipe)
        found["FID real"] = frechet(own, (mean, root))
        notes.append(f"real: {count} pictures")
    base = run
    if args.fid_base:
        from ..ledger import Run

        base = Run.read(args.fid_base)
        agree(args.fid_base, base.scorers.get("fid"), recipe)
    begin = f"{rows[0]['set']}/"
    unguided = [s for key, s in base.scores("fid").items() if key.startswith(begin) and key.endswith("/none")]
    if len(unguided) > 1:
        found["FID SD1.4"] = frechet(own, moments(features_of(base, unguided)))
        notes.append(f"SD1.4: {len(unguided)} pictures")
    if len(rows) < FEW:
        notes.append(
            f"of {len(rows)} pictures, fewer than {FEW}: too high by an amount that depends on how many, so it"
        )
        notes[-1] += " compares with FIDs of as many pictures only"
    return found | {"n": len(rows), "note": "; ".join(notes)}


def agree(path: Path, made: dict | None, recipe: dict) -> None:
    """Raises ValueError where another FID was made in another way."""
    if made != recipe:
        raise ValueError(
            f"{path}: FID features made with {made}; expected the run's, {recipe}: score one of them again"
        )


def reference(path: Path) -> tuple:
    """A file that `main` made -> mean, root, number of pictures, recipe. Raises UsageError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            told = file.metadata()
            return file.get_tensor("mean"), file.get_tensor("root"), int(told["pictures"]), json.loads(told["recipe"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UsageError(
            f"--fid-real {path}: cannot be read ({e}); expected a file made by python -m dag.evaluation.scorers.fid"
        ) from e


def main(argv: list[str] | None = None) -> int:
    """Make a reference of a folder of pictures, subfolders included."""
    parser = Parser("python -m dag.evaluation.scorers.fid", "Makes a FID reference of a folder of real pictures.")
    parser.add_argument("pictures", type=Path, metavar="FOLDER", help=f"with {', '.join(SUFFIXES)}; any sizes")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="file to write, .safetensors")
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    Scorer.add_arguments(parser)
    args = parser.parse_args(argv)
    args.folder, args.process = args.reference.parent, "reference"  # a scorer has them; nothing is written there
    paths = sorted(path for path in args.pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UsageError(f"{args.pictures}: no pictures in it; expected a folder with {', '.join(SUFFIXES)}")

    import numpy as np
    from safetensors.numpy import save_file
    from tqdm import tqdm

    from weights.files import atomic_write

    scorer = Scorer(args)
    batches = [paths[i : i + Scorer.batch] for i in range(0, len(paths), Scorer.batch)]
    mean, root = moments(np.concatenate([scorer.features(batch) for batch in tqdm(batches, disable=None)]))
    told = {"pictures": str(len(paths)), "recipe": json.dumps(scorer.settings)}
    with atomic_write(args.reference) as temporary:
        save_file({"mean": mean, "root": np.ascontiguousarray(root)}, temporary, told)
    print(f"{args.reference}: {len(paths)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("fid", main, None))
