"""Reads Stable Diffusion checkpoints in their original layout, .ckpt or .safetensors, without executing anything.

A .ckpt is a zip of a pickle and raw tensors. torch's restricted unpickler builds tensors and plain containers and
refuses all else; the few harmless globals of old Lightning files are replaced by stubs, so Lightning is not needed.
Tensors are memory-mapped: what is not used is not read. This module knows nothing of the model.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FOREIGN = {  # first bytes -> what the file is
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"<": "a web page or XML file (a failed download?)",
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to (run `git lfs pull`)",
    b"\x1f\x8b": "a gzip archive",
    b"GGUF": "a GGUF file",
    b"\x80": "a bare pickle (an old torch file or something else); re-save it as .safetensors",
}


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint. The message is one line: what, found, expected, what to do."""


class _Stub:
    """Stands for pytorch_lightning's ModelCheckpoint, which old files use as a dictionary key."""


def _scalar(*args) -> None:
    """Stands for numpy's scalar, which old files use for the best validation score."""


SAFE_GLOBALS = [
    (_Stub, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
]


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, memory-mapped on the CPU, and the metadata of a .safetensors file ({} for a .ckpt).

    The kind is told by the first bytes, not by the name. Raises CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; expected a .ckpt or .safetensors checkpoint of Stable Diffusion 1.x"
        )
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; expected one .ckpt or .safetensors file of the original layout")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e
    if not head:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if head.startswith(b"PK\x03\x04"):
        return _read_ckpt(path), {}
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 100_000_000:
        if length + 8 > size:
            raise CheckpointError(f"{path}: truncated, {size} bytes end inside the header; download it again")
        return _read_safetensors(path)
    kind = next((what for magic, what in FOREIGN.items() if head.lstrip().startswith(magic)), "of no known kind")
    raise CheckpointError(f"{path}: the file is {kind}; expected a .ckpt or .safetensors checkpoint")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path}: damaged or truncated .safetensors ({_line(e)}); download it again") from e


def _read_ckpt(path: Path) -> dict[str, Tensor]:
    try:
        zipfile.ZipFile(path).close()
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a damaged pickle can raise anything
        if bad := _unsafe(path):
            raise CheckpointError(
                f"{path}: its pickle calls {', '.join(bad[:3])}, nothing was executed; expected tensors only: "
                "get a .safetensors copy"
            ) from e
        raise CheckpointError(
            f"{path}: damaged or truncated .ckpt, or its pickle holds more than tensors; nothing was executed: "
            "download it again"
        ) from e
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no named tensors; expected a state_dict of Stable Diffusion 1.x")
    return tensors


def _unsafe(path: Path) -> list[str]:
    """Names a pickle wants to import or call that are not on the list; empty if it cannot be told."""
    harmless = {name for entry in SAFE_GLOBALS if isinstance(entry, tuple) for name in entry[1:]}
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # damaged
        return []
    return [name for name in found if name not in harmless and not name.startswith("numpy.dtype")]


def _line(error: Exception) -> str:
    """The first line of an error's text, cut to a length a terminal shows."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
