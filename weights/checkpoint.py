"""Reads Stable Diffusion checkpoints in their original layout, .ckpt or .safetensors, without executing anything.

Both kinds are raw tensors and a table that says where each lies: JSON in a .safetensors, a zip directory and a pickle
in a .ckpt (weights/pickled.py runs it). The table is checked against the file before a tensor is touched; then tensors
are read one at a time, or memory-mapped where nothing has to be converted: a read of 1.2 GB of float32 would take one
to three seconds, the map takes none. This module knows nothing of the model.
"""

import hashlib
import io
import json
import math
import mmap
import os
import signal
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import pickled
from .pickled import Entry, Placeholder

try:
    from fcntl import F_RDLCK, F_SETLEASE, fcntl
except ImportError:  # not Linux
    fcntl = None

FOREIGN = {  # first bytes -> what the file is
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"<": "a web page or XML file (a failed download?)",
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to (run `git lfs pull`)",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"GGUF": "a GGUF file",
    b"PK\x05\x06": "an empty zip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a numpy array",
    b"{": "JSON text",
    b"\x80": "a bare pickle (an old torch file or something else); re-save it as .safetensors",
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
STORED = 0  # the zip format's number for "not compressed"
TABLE = 4 << 20  # bytes a table of tensors may take; SD 1.4's takes 0.2 MB, so more is an attack on memory
CHUNK = 1 << 20  # bytes hashed at a time


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint. The message is one line: what, found, expected, what to do."""


class File(io.FileIO):
    """An open file that knows whether it has changed, and reads TABLE bytes at most: no zip directory fills memory."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.path, self.size, self._opened = path, os.fstat(self.fileno()).st_size, self._state()

    def __del__(self):  # nothing is left to be read
        self.close()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self.fileno())
        return found.st_size, found.st_mtime_ns

    def read(self, n: int = -1) -> bytes:
        return super().read(min(n, TABLE) if n >= 0 else TABLE)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file is not what it was when it was opened."""
        if self._state() != self._opened:
            raise CheckpointError(f"{self.path}: was changed while it was read; start again when it is complete")


@dataclass
class Checkpoint:
    """An open checkpoint: the table of its tensors, and access to them one by one."""

    file: File
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)  # of a .safetensors; a .ckpt has none
    foreign: dict[str, str] = field(default_factory=dict)  # names of a .ckpt that are no tensors -> what makes them

    @property
    def path(self) -> Path:
        return self.file.path

    @cached_property
    def _map(self) -> mmap.mmap:
        self.file.check_unchanged()
        content = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: writes never reach the file
        _MAPPED[content] = self.path
        own = signal.getsignal(signal.SIGIO) in (signal.SIG_DFL, _stop) if fcntl else False
        if own and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGIO, _stop)
            with suppress(OSError):  # another user's file, or a file system without leases
                fcntl(self.file.fileno(), F_SETLEASE, F_RDLCK)
        return content

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Raises CheckpointError if one of these entries would have to be made by calling what is not listed."""
        if called := next((self.foreign[name] for name in names if name in self.foreign), None):
            raise CheckpointError(
                f"{self.path}: its pickle calls {called!r} for a tensor, nothing was executed; expected tensors as "
                "torch.save writes them: get a .safetensors copy"
            )

    def tensor(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in a dtype (None: the file's) and on a device.

        What the CPU can use as it lies in the file is mapped and costs nothing until it is touched. Linux then holds
        back whoever wants to write to the file and tells us first (a lease, if the file is our own); elsewhere it must
        stay unchanged as long as the tensor lives. Anything else is read and converted, and only the result stays.
        Raises CheckpointError if the file has changed since it was opened.
        """
        dtype_, shape, stride, offset = entry = self.entries[name]
        nbytes = entry.span * dtype_.itemsize
        as_it_lies = torch.device(device).type == "cpu" and dtype in (None, dtype_) and offset % dtype_.itemsize == 0
        if as_it_lies and nbytes:
            flat = torch.frombuffer(self._map, dtype=dtype_, count=entry.span, offset=offset)
            self.file.check_unchanged()
            return flat.as_strided(shape, stride)
        raw = torch.empty(nbytes, dtype=torch.uint8)
        self.file.seek(offset)
        complete = self.file.readinto(raw.numpy()) == nbytes
        self.file.check_unchanged()
        if not complete:
            raise CheckpointError(f"{self.path}: {name[:80]!r} cannot be read in full; download it again")
        return raw.view(dtype_).as_strided(shape, stride).to(device, dtype)


_MAPPED = WeakKeyDictionary()  # mapping -> the file's path, as long as a tensor needs it


def _stop(*_) -> None:
    """Linux waits for us before it lets a mapped file be cut or written over; with the weights gone, we would crash."""
    files = " or ".join(sorted(set(map(str, _MAPPED.values()))))
    raise CheckpointError(f"{files}: is being changed while its weights are in use; start again")


def read(path: str | Path) -> Checkpoint:
    """Open a checkpoint and check its table. The kind is told by the first bytes, not by the name.

    Raises CheckpointError.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(
                f"{path}: no such file; expected a .ckpt or .safetensors checkpoint of Stable Diffusion 1.x"
            )
        if path.is_dir():
            kind = "a diffusers-format folder" if (path / "model_index.json").exists() else "a folder"
            raise CheckpointError(f"{path}: is {kind}; expected one .ckpt or .safetensors file of the original layout")
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file; expected a .ckpt or .safetensors checkpoint")
        file = File(path)
        try:
            head = file.read(32)
            if not head:
                raise CheckpointError(f"{path}: the file is empty; download it again")
            if head.startswith(b"PK\x03\x04"):
                return _ckpt(path, file)
            if head[8:9] == b"{":
                return _safetensors(path, file, int.from_bytes(head[:8], "little"))
            kind = next(
                (what for magic, what in FOREIGN.items() if head.lstrip().startswith(magic)), "of no known kind"
            )
            raise CheckpointError(f"{path}: the file is {kind}; expected a .ckpt or .safetensors checkpoint")
        except BaseException:
            file.close()
            raise
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e


def _ckpt(path: Path, file: File) -> Checkpoint:
    """A .ckpt: a zip of a pickle, `NAME/data.pkl`, and of raw tensors, `NAME/data/KEY`."""
    try:
        with zipfile.ZipFile(file) as archive:
            places = _places(path, file, archive)
            sums = {info.orig_filename: info.CRC for info in archive.infolist()}
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as e:
        raise CheckpointError(
            f"{path}: damaged or truncated .ckpt, its zip directory cannot be read; download it again"
        ) from e
    pickles = [name for name in places if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        some = ", ".join(map(repr, list(places)[:3]))[:120]
        raise CheckpointError(
            f"{path}: a zip archive but no .ckpt, it holds {len(places)} files ({some}, ...): unpack it"
        )
    root = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(root + "code/") for name in places):
        raise CheckpointError(f"{path}: a TorchScript archive, which is a program; expected a checkpoint of tensors")

    def content(name: str) -> bytes:
        begin, end = places[name]
        if end - begin > TABLE:
            raise CheckpointError(
                f"{path}: {name[-80:]!r} of {end - begin} bytes, expected at most {TABLE}; download it again"
            )
        file.seek(begin)
        read = file.read(end - begin)
        if sums[name] not in (0, zlib.crc32(read)):  # 0: torch.save was told to leave it out
            raise CheckpointError(f"{path}: damaged .ckpt, {name[-80:]!r} is not what was written; download it again")
        return read

    if root + "byteorder" in places and content(root + "byteorder") != b"little":
        raise CheckpointError(f"{path}: written by a big-endian machine; re-save it as .safetensors")
    program = content(pickles[0])
    try:
        made = pickled.run(program, {k.removeprefix(root + "data/"): v for k, v in places.items()})
        state = {"": made} if isinstance(made, Placeholder) else made.get("state_dict", made)
        state = {"state_dict": state} if isinstance(state, Placeholder) else state
        entries = {k: v for k, v in state.items() if isinstance(v, Entry)}
        foreign = {k: v.name for k, v in state.items() if isinstance(v, Placeholder)}
    except Exception as e:  # a damaged program can fail in any way
        raise CheckpointError(f"{path}: damaged .ckpt, its pickle is no table of tensors; nothing was executed") from e
    found = Checkpoint(file, entries, foreign=foreign)
    if not entries:
        found.refuse_foreign(foreign)
        raise CheckpointError(f"{path}: holds no named tensors; expected a state_dict of Stable Diffusion 1.x")
    return found


def _places(path: Path, file: File, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Name -> (begin, end) of each entry's bytes. One rule: stored entries, inside the file, each where it says."""
    places, headers = {}, {}
    for info in archive.infolist():
        if info.compress_type != STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: {info.filename[:80]!r} is compressed or encrypted; expected stored entries: unpack it, or "
                "get a .safetensors copy"
            )
        if not 0 <= info.header_offset < archive.start_dir:
            raise CheckpointError(
                f"{path}: damaged .ckpt, {info.filename[:80]!r} is outside of the file; download it again"
            )
        file.seek(info.header_offset)
        head = file.read(30)  # local header: signature, ..., lengths of the name and of the extra field
        length, extra = struct.unpack("<HH", head[26:30])
        name = file.read(length).decode("utf-8" if info.flag_bits & 0x800 else "cp437")
        begin = info.header_offset + 30 + length + extra
        end = begin + info.file_size
        if head[:4] != b"PK\x03\x04" or name != info.orig_filename or end > archive.start_dir:
            raise CheckpointError(
                f"{path}: damaged .ckpt, {info.filename[:80]!r} is not where the zip directory says; download it again"
            )
        if name in places:
            raise CheckpointError(f"{path}: {name[:80]!r} is in it twice; download it again")
        places[name], headers[name] = (begin, end), info.header_offset
    apart(path, [(headers[name], end, name) for name, (_, end) in places.items()], 0)
    return places


def _safetensors(path: Path, file: File, length: int) -> Checkpoint:
    """A .safetensors: 8 bytes of length, a table in JSON, and behind it the tensors."""
    if length + 8 > file.size:
        raise CheckpointError(f"{path}: truncated, {file.size} bytes end inside the header; download it again")
    if length > TABLE:
        raise CheckpointError(f"{path}: a header of {length} bytes, expected at most {TABLE}; download it again")
    file.seek(8)
    try:
        content = json.loads(file.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: damaged .safetensors header (not JSON, or a name twice)") from e
    metadata = content.pop("__metadata__", {})
    entries, places = {}, []
    for name, info in content.items():
        entries[name], place = _entry(path, name, info, 8 + length)
        places.append((*place, name))
    if not entries:
        raise CheckpointError(f"{path}: holds no tensors; expected a checkpoint of Stable Diffusion 1.x")
    end = apart(path, places, 8 + length)
    if end != file.size:
        what = "truncated" if file.size < end else "damaged"
        raise CheckpointError(f"{path}: {what}, its header tells of {end} bytes, found {file.size}; download it again")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return Checkpoint(file, entries, {key: value for key, value in texts if isinstance(value, str)})


def _once(pairs: list[tuple]) -> dict:
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _entry(path: Path, name: str, info, start: int) -> tuple[Entry, tuple[int, int]]:
    """One line of the JSON table, and from where to where its bytes lie in the file."""
    try:
        dtype, shape, (begin, end) = str(info["dtype"]), tuple(info["shape"]), info["data_offsets"]
        numbers = [*shape, begin, end]
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: damaged .safetensors header at {name[:80]!r}; download it again") from e
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name[:80]!r} is of type {dtype!r:.20}; expected {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        found = f"{end - begin} bytes for {nbytes} of data"
        raise CheckpointError(f"{path}: damaged .safetensors header at {name[:80]!r}, {found}; download it again")
    return Entry(DTYPES[dtype], shape, contiguous(shape), start + begin), (start + begin, start + end)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor without gaps."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def apart(path: Path, places: list[tuple[int, int, str]], start: int) -> int:
    """The end of the last of places (begin, end, name), which must begin at `start` or later and not overlap."""
    last, before = start, "the table"
    for begin, end, name in sorted(places):
        if begin < last:
            raise CheckpointError(f"{path}: damaged, {name[:80]!r} overlaps {before[:80]!r}; download it again")
        last, before = end, name
    return last


def sha256(path: str | Path, progress=lambda n: None) -> str:
    """The hash of a file, in hexadecimal; `progress` is told the bytes of each chunk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
