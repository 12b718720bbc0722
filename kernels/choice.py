"""Which implementation of the main attention with maps a run uses: plain PyTorch or the fused kernel.

"auto" takes the kernel where a trial on this GPU says that it is right and not slower, plain PyTorch everywhere else.
The trial is a process of its own, because a kernel that reads where it must not takes every later CUDA call of its
process with it. A verdict is for one GPU, driver, torch, triton, source of the kernel and of what it stands for, dtype,
head width and split of the guideline rows; it is remembered in the user's cache folder.
"""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from dag.attention import NO_ROWS, CrossAttention
from dag.cam import AttentionWithMaps, Probe, layers_of
from dag.config import ATTENTIONS
from dag.model import StableDiffusion
from dag.tokens import GuidelineTokens
from weights.files import atomic_write

HERE = Path(__file__).parent
PATIENCE = 180  # seconds for a trial; it compiles a kernel for every head width


@dataclass(frozen=True)
class Verdict:
    """Whether a run should use the kernel, and why or why not."""

    fused: bool
    why: str

    @classmethod
    def of(cls, rows: list[dict]) -> "Verdict":
        """From results of `tried` in kernels/bench.py at one head width."""
        if wrong := [row for row in rows if not row["right"]]:
            return cls(False, f"the kernel is wrong on this GPU, error of limit {wrong[0]['errors']}")
        for what in ("", "_sent"):  # by the GPU, to send: which of them a run waits for depends on its batch
            for ours, plain in ((row[f"fused{what}"], row[f"plain{what}"]) for row in rows):
                if ours > plain:
                    return cls(False, f"the kernel is slower on this GPU, {ours:.0f} against {plain:.0f} us")
        ratio = sum(row["fused"] for row in rows) / sum(row["plain"] for row in rows)
        return cls(True, f"the kernel is right on this GPU and takes {ratio:.2f} of plain PyTorch's time")

    def __str__(self) -> str:
        return f"{'fused' if self.fused else 'plain'}: {self.why}"


def for_run(
    choice: str, sd: StableDiffusion, tokens: Sequence[GuidelineTokens]
) -> tuple[AttentionWithMaps | None, str]:
    """The fused kernel, or None for plain PyTorch, and one line of why: one choice for all methods of a run.

    tokens: what the run reads. Raises ValueError for an unknown choice, or where "fused" cannot run; "auto" never.
    """
    if choice not in ATTENTIONS:
        raise ValueError(f"attention is '{choice}', expected {', '.join(ATTENTIONS)}")
    if choice == "plain":
        return None, "plain, as asked"
    layers = [layer for c in tokens for layer in layers_of(sd.unet, c.reading)]
    widths: dict[int, int] = {}  # head width -> factor of the finest grid that has it
    for layer in layers:
        d = layer.to_v.out_features // layer.num_heads
        widths[d] = min(widths.get(d, layer.factor), layer.factor)
    try:
        from . import cross_attention as kernel  # here: it needs triton, the plain one does not

        rows = max((c.embedding.shape[-2] for c in tokens), default=2)
        obstacle = kernel.obstacle(sd.device, sd.dtype, max(widths, default=16), rows)
    except ImportError as e:
        obstacle = f"kernels/cross_attention.py cannot be imported ({e})"
    if pooled := [c.reading.heads for c in tokens if c.reading.heads != "mean"]:
        obstacle = obstacle or f"it takes the mean over heads, these tokens their {pooled[0]}"
    if choice == "fused":
        if obstacle is not None:
            raise ValueError(f"the fused kernel cannot run: {obstacle}; use auto or plain")
        return kernel.cross_attention_with_maps, "fused, as asked"
    if obstacle is not None or not layers:
        return None, f"plain: {obstacle or 'no maps are read'}"
    side = sd.config.size // sd.config.vae.factor
    grids = {d: (side // factor) ** 2 for d, factor in widths.items()}
    split = [rows for c in tokens for rows in c.split]
    try:
        verdict = judged(sd.device, sd.dtype, layers[0].num_heads, split, grids)
    except Exception as e:  # whatever it is, there is plain PyTorch
        verdict = Verdict(False, f"no trial could be made ({type(e).__name__}: {e})")
    return kernel.cross_attention_with_maps if verdict.fused else None, str(verdict)


def judged(device: torch.device, dtype: torch.dtype, h: int, split: list[int], grids: dict[int, int]) -> Verdict:
    """The verdict for queries of some head widths (grids: head width d -> pixels n), remembered or from a trial."""
    kind = str(dtype).removeprefix("torch.")
    files = HERE / "cross_attention.py", HERE.parent / "dag" / "attention.py", HERE.parent / "dag" / "cam.py"
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    gpu = torch.cuda.get_device_name(device), f"driver {driver()}"
    common = *gpu, f"torch {torch.__version__}", f"triton {version('triton')}", f"kernel {source}", kind
    keys = {d: ", ".join((*common, f"d {d}", f"split {split}")) for d in grids}
    known = remembered()
    if missing := [d for d in grids if keys[d] not in known]:
        rows, surprise = trial(device, kind, h, split, [(grids[d], d) for d in missing])
        for d in missing:
            own = [row for row in rows if row["d"] == d]
            known[keys[d]] = Verdict.of(own) if own else Verdict(False, surprise)
        if not any(words in surprise.lower() for words in ("out of memory", "did not end")):  # another time it may do
            remember(known)
    verdicts = [known[key] for key in keys.values()]
    return next((verdict for verdict in verdicts if not verdict.fused), verdicts[0])


def driver() -> int:
    """The version of CUDA that the driver speaks, 13000 for 13.0."""
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    return found.value


def trial(
    device: torch.device, dtype: str, h: int, split: list[int], grids: list[tuple[int, int]]
) -> tuple[list[dict], str]:
    """Results of `tried` in kernels/bench.py for each (n, d), and what went wrong with those that are missing."""
    index = torch.cuda.current_device() if device.index is None else device.index
    command = [sys.executable, "-m", "kernels.bench", str(index), dtype, "2", str(h), ",".join(map(str, split))]
    command += [f"{n}x{d}" for n, d in grids]
    print("trying the fused kernel on this GPU, once; this takes some 20 seconds", file=sys.stderr)
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as e:
        return [], f"the trial of the kernel did not end ({type(e).__name__})"
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    said = [line for line in done.stderr.splitlines() if "Error" in line] or [f"exit status {done.returncode}"]
    return rows, f"the trial of the kernel failed: {said[-1].strip()[:200]}"


def memory() -> Path:
    """The file of verdicts: one JSON object."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "detect-and-guide", "attention.json")


def remembered() -> dict[str, Verdict]:
    """All verdicts so far; none where the file is missing or damaged."""
    try:
        return {key: Verdict(**entry) for key, entry in json.loads(memory().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError):  # RuntimeError: there is no home
        return {}


def remember(verdicts: dict[str, Verdict]) -> None:
    """Write them down, where that is possible."""
    try:
        memory().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(memory()) as temporary:
            entries = {key: asdict(verdict) for key, verdict in verdicts.items()}
            temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    except (OSError, RuntimeError):  # a home that cannot be written to costs a trial at every start
        pass


class WithoutMaps(Probe):
    """The hook of a run's methods that read no maps, where the others use the kernel.

    It runs the same compiled kernel with no rows selected, so that a picture in which nothing is found stays bit for
    bit the unguided one beside it.
    """

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer not in self.k_g or self.call.cond == NO_ROWS:
            return None
        out, _ = self.fused(q, k, v, self.k_g[layer], self.split, [])
        return out
