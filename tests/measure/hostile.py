"""Hostile, broken and foreign files, and what is said of each. `python -m tests.hostile` prints the table.

Every entry of FILES makes one file and names a part of the line it must get. Payloads, were they ever run, would leave
a file called `executed` in the working directory.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from dag.config import SHAPES
from dag.model import TEXT, UNET, VAE
from tests.files import given, original, write_ckpt, write_safetensors

CUTS = 20  # places at which a .ckpt and a .safetensors are cut
SMALL = {"a": torch.ones(4, 4), "b": torch.ones(16)}


def plain(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)


# --- pickles


def program(code: bytes, storage: bytes = bytes(64)) -> Callable[[Path], None]:
    """A .ckpt with this pickle and one storage, "0"."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            archive.writestr("archive/data/0", storage)
            archive.writestr("archive/version", "3\n")

    return make


def calls(function, *args, protocol: int = 2) -> Callable[[Path], None]:
    """A .ckpt whose pickle calls a function while it is loaded."""
    cls = type("Payload", (), {"__reduce__": lambda self: (function, args)})
    return program(pickle.dumps({"state_dict": {}, "callbacks": cls()}, protocol))


def tensor(first=0, shape=(4,), stride=(1,), numel=16, key="0", kind="FloatStorage") -> Callable[[Path], None]:
    """A .ckpt of one tensor "a" described by these numbers; the storage has room for 16 floats."""

    def push(value) -> bytes:
        if isinstance(value, tuple):
            return b"(" + b"".join(map(push, value)) + b"t"
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(" + push("storage") + f"ctorch\n{kind}\n".encode() + push(key) + push("cpu") + push(numel) + b"tQ"
    args = b"(" + storage + push(first) + push(shape) + push(stride) + b"\x89}t"
    return program(b"\x80\x02}" + push("a") + b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"Rs.")


def tuples_in_tuples(depth: int) -> bytes:
    """A dictionary whose key takes 2**depth steps to hash."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * depth + b"K\x00s."


def doubling(depth: int) -> bytes:
    """A tuple of 2**depth parts."""
    return b")" + b"q\x00h\x00\x86" * depth


def colliding(count: int) -> bytes:
    """A dictionary of integers that Python hashes to 0, all compared with all."""
    keys = (k * ((1 << 61) - 1) for k in range(1, count + 1))
    return b"\x80\x02}(" + b"".join(b"\x8a\x0a" + k.to_bytes(10, "little") + b"N" for k in keys) + b"u."


# --- zips


def zipped(change: Callable[[dict[str, bytes]], dict[str, bytes]], method: int = zipfile.ZIP_STORED):
    """A small .ckpt packed again after a change to its {name: content}."""

    def make(path: Path) -> None:
        torch.save(SMALL, path)
        with zipfile.ZipFile(path) as archive:
            content = {info.filename: archive.read(info) for info in archive.infolist()}
        root = next(iter(content)).split("/")[0]
        content = change({name.replace(root, "archive", 1): data for name, data in content.items()})
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in content.items():
                archive.writestr(name, data)

    return make


def patched(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """A small .ckpt with some bytes changed."""

    def make(path: Path) -> None:
        zipped(lambda content: content)(path)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return make


def directory(name: bytes, offset: int, value: bytes) -> Callable[[Path], None]:
    """Change a field, `offset` bytes into an entry of the zip's directory."""

    def change(data: bytearray) -> None:
        k = data.rindex(b"archive/" + name) - 46  # the directory is at the end
        data[k + offset : k + offset + len(value)] = value

    return patched(change)


def local_name(data: bytearray) -> None:
    k = data.index(b"archive/data/0")
    data[k : k + 14] = b"archive/data/9"


def directory_signature(data: bytearray) -> None:
    data[data.index(b"PK\x01\x02")] ^= 1


def huge_directory(data: bytearray) -> None:
    """The end record tells of a directory of 4 GB in a file made to seem as long."""
    k = data.rindex(b"PK\x05\x06")
    data[k + 12 : k + 16] = struct.pack("<I", 0xFFFFFFF0)


def long_directory(path: Path) -> None:
    """A directory that is really there and really long."""
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(1000):
            archive.writestr(f"archive/data/{k:05000d}", b"")


def overlapping(path: Path) -> None:
    """Two entries of the directory, the second one's local header inside the data of the first."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("archive/data/1", bytes(64))
    hidden = inner.getvalue()[: 30 + 14 + 64]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", hidden)
        info = zipfile.ZipInfo("archive/data/1")
        info.file_size = info.compress_size = 64
        info.CRC = zipfile.crc32(bytes(64))
        info.header_offset = archive.infolist()[1].header_offset + 30 + 14
        archive.filelist.append(info)


def twice(path: Path) -> None:
    import warnings

    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("archive/data.pkl", pickle.dumps({}, 2))


def zip_of_a_ckpt(path: Path) -> None:
    torch.save(SMALL, path.with_name("inner"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_name("inner"), "sd-v1-4.ckpt")


# --- .safetensors


def header(text: str | bytes, data: bytes = bytes(64), length: int | None = None) -> Callable[[Path], None]:
    text = text.encode() if isinstance(text, str) else text
    return plain(struct.pack("<Q", len(text) if length is None else length) + text + data)


def one(dtype="F32", shape=(4, 4), offsets=(0, 64), data: bytes = bytes(64)) -> Callable[[Path], None]:
    """A .safetensors of one tensor "a" described by these values."""
    return header(json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}), data)


def two(first: tuple[int, int], second: tuple[int, int]) -> Callable[[Path], None]:
    """A .safetensors of two vectors of 8 floats at these places."""
    places = {"a": first, "b": second}
    return header(json.dumps({k: {"dtype": "F32", "shape": [8], "data_offsets": v} for k, v in places.items()}))


# --- other models


def names(**shapes) -> Callable[[Path], None]:
    return lambda path: write_safetensors(path, {k: given(torch.zeros(v)) for k, v in shapes.items()})


def unet(channels: int = 4, width: int = 768, **more) -> Callable[[Path], None]:
    """The names and shapes by which a UNet of the original layout is told, and more."""
    first, key = "input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return names(
        **{UNET + first: (320, channels, 3, 3), UNET + key: (320, width), VAE + "quant_conv.bias": (8,)}, **more
    )


def miniature(change: Callable[[dict], dict], metadata: dict | None = None) -> Callable[[Path], None]:
    return lambda path: write_safetensors(path, change(original(SHAPES)), metadata)


def without(*gone: str) -> Callable[[dict], dict]:
    return lambda entries: {k: v for k, v in entries.items() if not k.startswith(gone)}


def cut(write, k: int) -> Callable[[Path], None]:
    """The whole file up to the share (k + 1/2) / CUTS of it; the first cut comes earlier, inside the header."""

    def make(path: Path) -> None:
        write(path, original(SHAPES))
        size = path.stat().st_size
        os.truncate(path, 30 if k == 0 else int(size * (k + 0.5) / CUTS))

    return make


def diffusers_folder(path: Path) -> None:
    path.mkdir()
    (path / "model_index.json").write_text("{}")


OUT, NEW = UNET + "out.2.weight", {"stranger\n\x1b[31m": given(torch.zeros(1))}
LORA = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}

FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    # not checkpoints at all
    "no file": (lambda p: None, "no such file"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "no such file"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "diffusers folder": (diffusers_folder, "is a diffusers-format folder"),
    "pipe": (os.mkfifo, "is not a regular file"),
    "empty": (plain(b""), "the file is empty"),
    "JPEG": (plain(b"\xff\xd8\xff\xe0" + bytes(100)), "a JPEG picture"),
    "PNG": (plain(b"\x89PNG\r\n\x1a\n" + bytes(100)), "a PNG picture"),
    "web page": (plain(b"\n  <!DOCTYPE html><html>"), "a web page"),
    "LFS pointer": (plain(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "a Git LFS pointer"),
    "gzip": (plain(b"\x1f\x8b\x08" + bytes(50)), "a gzip archive"),
    "bzip2": (plain(b"BZh91AY" + bytes(50)), "a bzip2 archive"),
    "7z": (plain(b"7z\xbc\xaf\x27\x1c" + bytes(50)), "a 7z archive"),
    "RAR": (plain(b"Rar!\x1a\x07" + bytes(50)), "a RAR archive"),
    "GGUF": (plain(b"GGUF\x03" + bytes(50)), "a GGUF file"),
    "HDF5": (plain(b"\x89HDF\r\n\x1a\n" + bytes(50)), "an HDF5 file"),
    "numpy": (plain(b"\x93NUMPY\x01" + bytes(50)), "a numpy array"),
    "JSON": (plain(b'{"sd": 1.4, "a": [1, 2, 3], "b": []}'), "JSON text"),
    "noise": (plain(bytes(range(16)) * 9), "of no known kind"),
    "zeros": (plain(bytes(1000)), "of no known kind"),
    "seven bytes": (plain(b"\x10\0\0\0\0\0\0"), "of no known kind"),
    "old torch file": (
        lambda p: torch.save(SMALL, p, _use_new_zipfile_serialization=False),
        "a bare pickle (an old torch file",
    ),
    "pickle that calls os.system": (
        plain(pickle.dumps(type("P", (), {"__reduce__": lambda self: (os.system, ("touch executed",))})())),
        "a bare pickle",
    ),
    # programs in pickles
    "calls os.system": (calls(os.system, "touch executed"), "calls 'posix.system', nothing was executed"),
    "same, protocol 4": (calls(os.system, "touch executed", protocol=4), "calls 'posix.system'"),
    "same, protocol 0": (calls(os.system, "touch executed", protocol=0), "its pickle is no table of tensors"),
    "calls eval": (calls(eval, "open('executed', 'w')"), "calls '__builtin__.eval'"),
    "calls exec": (calls(exec, "open('executed', 'w')", protocol=4), "calls 'builtins.exec'"),
    "calls open": (calls(open, "executed", "w"), "calls 'io.open'"),
    "calls getattr": (calls(getattr, "", "join", protocol=4), "calls 'builtins.getattr'"),
    "calls torch.load": (calls(torch.load, "other.ckpt"), "calls 'torch.serialization.load'"),
    "calls torch.zeros": (program(b"\x80\x02ctorch\nzeros\nJ\xff\xff\xff\x7f\x85R."), "calls 'torch.zeros'"),
    "calls bytearray of a terabyte": (
        program(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R."),
        "calls 'builtins.bytearray'",
    ),
    "names a class in a string": (
        program(b"\x80\x02X\x0c\0\0\0posix.systemX\x0e\0\0\0touch executed\x85R."),
        "its pickle is no table of tensors",
    ),
    "INST of os.system": (
        program(b"\x80\x02(X\x0e\0\0\0touch executediposix\nsystem\n."),
        "its pickle is no table of tensors",
    ),
    "OBJ of os.system": (
        program(b"\x80\x02(cposix\nsystem\nX\x0e\0\0\0touch executedo."),
        "calls 'posix.system'",
    ),
    "extension registry": (program(b"\x80\x02\x82\x01."), "its pickle is no table of tensors"),
    "name with a line break": (program(b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93."), "calls 'a\\nb.c'"),
    "key that takes forever to hash": (program(tuples_in_tuples(60)), "its pickle is no table of tensors"),
    "storage class that takes forever to hash": (
        program(b"\x80\x02(X\x07\0\0\0storage" + doubling(60) + b"X\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x01tQ."),
        "its pickle is no table of tensors",
    ),
    "storage key nested deeper than C's stack": (
        program(b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n)" + b"\x85" * 400_000 + b"X\x03\0\0\0cpuK\x01tQ."),
        "its pickle is no table of tensors",
    ),
    "name that takes forever to write out": (
        program(b"\x80\x04" + doubling(40) + b"\x8c\x01a\x93."),
        "its pickle is no table of tensors",
    ),
    "keys that all have one hash": (program(colliding(100_000)), "its pickle is no table of tensors"),
    "no end": (program(b"\x80\x02}"), "its pickle is no table of tensors"),
    "unknown instruction": (program(b"\x80\x02}\xfe."), "its pickle is no table of tensors"),
    "string longer than the file": (program(b"\x80\x02X\xff\xff\xff\x7fa."), "its pickle is no table of tensors"),
    "memo that was never put": (program(b"\x80\x02h\x07."), "its pickle is no table of tensors"),
    "pop from an empty stack": (program(b"\x80\x02R."), "its pickle is no table of tensors"),
    "a list": (program(pickle.dumps([1, 2], 2)), "its pickle is no table of tensors"),
    "state_dict that is a list": (program(pickle.dumps({"state_dict": [1]}, 2)), "its pickle is no table of tensors"),
    "no tensors": (program(pickle.dumps({"epoch": 1}, 2)), "holds no named tensors"),
    "pickle of 5 MB": (program(b"\x80\x02" + b"N0" * 2_500_000 + b"N."), "expected at most 4194304"),
    "a million dictionaries": (
        program(b"\x80\x02(" + b"}" * 1_000_000 + b"t."),
        "its pickle is no table of tensors",
    ),
    "a million tuples in each other": (
        program(b"\x80\x02" + b")" + b"\x85" * 1_000_000 + b"."),
        "is no table of tensors",
    ),
    # tensors that are not in their file
    "tensor beyond its storage": (tensor(shape=(17,)), "its pickle is no table of tensors"),
    "tensor that starts behind": (tensor(first=14), "its pickle is no table of tensors"),
    "stride out of the storage": (tensor(stride=(6,)), "its pickle is no table of tensors"),
    "negative offset": (tensor(first=-1), "its pickle is no table of tensors"),
    "negative stride": (tensor(stride=(-1,)), "its pickle is no table of tensors"),
    "negative shape": (tensor(shape=(-4,)), "its pickle is no table of tensors"),
    "shape of text": (tensor(shape=("4",)), "its pickle is no table of tensors"),
    "shape that is a dictionary": (tensor(shape={4: None}), "its pickle is no table of tensors"),
    "stride that is a list": (tensor(stride=[1]), "its pickle is no table of tensors"),
    "more strides than sides": (tensor(stride=(1, 1)), "its pickle is no table of tensors"),
    "storage longer than its entry": (tensor(numel=17), "its pickle is no table of tensors"),
    "storage of 2**60 elements": (tensor(numel=1 << 60), "its pickle is no table of tensors"),
    "storage that is not there": (tensor(key="7"), "its pickle is no table of tensors"),
    "storage outside the folder": (tensor(key="../data.pkl"), "its pickle is no table of tensors"),
    "storage of complex numbers": (tensor(kind="ComplexFloatStorage"), "calls 'torch.ComplexFloatStorage'"),
    "a view as large as you like": (tensor(shape=(1 << 40,), stride=(0,)), "no UNet of Stable Diffusion 1.x"),
    # zips
    "plain zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "hello"), "a zip archive but no .ckpt"),
    "empty zip": (lambda p: zipfile.ZipFile(p, "w").close(), "an empty zip archive"),
    "zip of a .ckpt": (zip_of_a_ckpt, "it holds 1 files ('sd-v1-4.ckpt', ...): unpack it"),
    "data.pkl one folder deeper": (
        zipped(lambda c: {f"deep/{name}": data for name, data in c.items()}),
        "a zip archive but no .ckpt",
    ),
    "two data.pkl": (zipped(lambda c: c | {"b/data.pkl": c["archive/data.pkl"]}), "a zip archive but no .ckpt"),
    "data.pkl in it twice": (twice, "'archive/data.pkl' is in it twice"),
    "TorchScript": (zipped(lambda c: c | {"archive/code/a.py": b"open('executed', 'w')"}), "a TorchScript archive"),
    "big-endian": (zipped(lambda c: c | {"archive/byteorder": b"big"}), "written by a big-endian machine"),
    "compressed": (zipped(lambda c: c, zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "a pickle of 200 MB in 200 kB": (
        zipped(lambda c: c | {"archive/data.pkl": bytes(200 << 20)}, zipfile.ZIP_DEFLATED),
        "'archive/data.pkl' is compressed or encrypted",
    ),
    "encrypted": (directory(b"data/0", 8, b"\x01\0"), "is compressed or encrypted"),
    "entry outside the file": (directory(b"data/0", 42, struct.pack("<I", 1 << 30)), "damaged"),
    "entry at another one's place": (directory(b"data/1", 42, bytes(4)), "is not where the zip directory says"),
    "entry longer than the file": (
        directory(b"data/1", 20, struct.pack("<II", 1 << 30, 1 << 30)),
        "is not where the zip directory says",
    ),
    "entry longer than its place": (directory(b"data/0", 20, struct.pack("<II", 80, 80)), "overlaps"),
    "entry inside another": (overlapping, "'archive/data/1' overlaps 'archive/data/0'"),
    "renamed entry": (patched(local_name), "is not where the zip directory says"),
    "lost storage": (
        zipped(lambda c: {k: v for k, v in c.items() if k != "archive/data/1"}),
        "its pickle is no table of tensors",
    ),
    "damaged directory": (patched(directory_signature), "its zip directory cannot be read"),
    "directory of 4 GB": (patched(huge_directory), "its zip directory cannot be read"),
    "directory of 5 MB": (long_directory, "its zip directory cannot be read"),
    # .safetensors
    "header beyond the file": (header("{}", length=1 << 20), "end inside the header"),
    "header of 2**63 bytes": (header("{}", length=1 << 63), "end inside the header"),
    "header of 5 MB": (header(b'{"a":"' + bytes(5 << 20) + b'"}'), "expected at most 4194304"),
    "header that is no JSON": (header('{"a": ['), "damaged .safetensors header"),
    "header that is no text": (header(b'{"\xff\xfe'), "damaged .safetensors header"),
    "a million lists in each other": (header(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"), "damaged .safetensors"),
    "a number of a million digits": (header(b'{"a":' + b"9" * 10**6 + b"}"), "damaged .safetensors header"),
    "name in it twice": (header('{"a": 1, "a": 2}'), "a name twice"),
    "tensor that is a number": (header('{"a": 1}'), "damaged .safetensors header at 'a'"),
    "no offsets": (header('{"a": {"dtype": "F32", "shape": [1]}}'), "damaged .safetensors header at 'a'"),
    "three offsets": (one(offsets=(0, 32, 64)), "damaged .safetensors header at 'a'"),
    "negative offsets": (one(offsets=(-64, 0)), "damaged .safetensors header at 'a'"),
    "end before begin": (one(offsets=(64, 0)), "damaged .safetensors header at 'a'"),
    "offsets that do not fit the shape": (one(offsets=(0, 60)), "60 bytes for 64 of data"),
    "side of 2**40": (one(shape=(1 << 40,)), "64 bytes for 4398046511104 of data"),
    "side of 10**30": (one(shape=(10**30,)), "damaged .safetensors header at 'a'"),
    "half a side": (one(shape=(1.5, 4)), "damaged .safetensors header at 'a'"),
    "side that is true": (one(shape=(True, 16)), "damaged .safetensors header at 'a'"),
    "a thousand sides": (one(shape=(1,) * 1000, offsets=(0, 4)), "damaged .safetensors header at 'a'"),
    "type that is a list": (one(dtype=[]), "'a' is of type '[]'; expected F64, F32"),
    "name with escapes, of 5 MB": (
        lambda p: zipfile.ZipFile(p, "w").writestr("\n\x1b[31m/data.pkl", bytes(5_000_000)),
        "expected at most 4194304",
    ),
    "unknown type": (one(dtype="F4"), "'a' is of type 'F4'; expected F64, F32"),
    "overlapping tensors": (two((0, 32), (16, 48)), "'b' overlaps 'a'"),
    "offsets out of the file": (two((0, 32), (64, 96)), "truncated"),
    "bytes too many": (one(data=bytes(65)), "damaged, its header tells of"),
    "metadata that is no text": (
        header(
            '{"__metadata__": {"config":[]},"\\ud800\\u0000": {"dtype":"U8","shape":[64], "data_offsets": [0, 64]}}'
        ),
        "found 1 tensors (\\ud800\\x00)",
    ),
    "metadata that is a list": (header('{"__metadata__": [], "a": 1}'), "damaged .safetensors header at 'a'"),
    "no tensors in .safetensors": (header('{"__metadata__": {"a": "b"}}', b""), "holds no tensors"),
    # other models
    "SD 2.x": (unet(width=1024), "this is an SD 2.x checkpoint"),
    "SD 2.x by its text encoder": (
        names(**{"cond_stage_model.model.ln_final.bias": (1024,), UNET + "out.2.bias": (4,)}),
        "this is an SD 2.x checkpoint",
    ),
    "SD 2.x inpainting": (unet(9, 1024), "this is an inpainting checkpoint of SD 2.x"),
    "inpainting": (unet(9), "this is an inpainting checkpoint (9 input channels)"),
    "InstructPix2Pix": (unet(8), "this is an InstructPix2Pix (8 input channels)"),
    "depth-to-image": (unet(5, 1024), "this is a depth-to-image checkpoint of SD 2.x"),
    "upscaler": (unet(7, 1024), "this is an upscaler of SD 2.x"),
    "SDXL": (names(**{"conditioner.embedders.1.model.ln_final.bias": (1280,)}), "this is an SDXL checkpoint"),
    "SDXL refiner": (names(**{"conditioner.embedders.0.model.ln_final.bias": (1280,)}), "this is an SDXL refiner"),
    "SD 3": (names(**{UNET + "joint_blocks.0.x_block.attn.qkv.bias": (8,)}), "this is an SD 3 checkpoint"),
    "FLUX": (names(**{"double_blocks.0.img_mod.lin.bias": (8,)}), "this is a FLUX checkpoint"),
    "ControlNet": (unet(**{"control_model.zero_convs.0.0.bias": (320,)}), "this is a ControlNet"),
    "VAE": (names(**{"encoder.down.0.block.0.norm1.bias": (128,)}), "this is a VAE alone"),
    "VAE in a .ckpt": (
        lambda p: write_ckpt(p, {"decoder.up.0.block.0.norm1.bias": given(torch.zeros(128))}),
        "this is a VAE alone",
    ),
    "text encoder": (names(**{"text_model.final_layer_norm.bias": (768,)}), "this is a text encoder alone"),
    "UNet": (miniature(without(VAE, TEXT, "betas", "alphas", "sqrt", "log", "post", "model_ema")), "a UNet alone"),
    "UNet without a prefix": (names(**{"input_blocks.0.0.weight": (320, 4, 3, 3)}), "this is a UNet alone"),
    "LoRA": (names(**LORA), "this is a LoRA or the like"),
    "diffusers LoRA": (names(**{"unet.down_blocks.0.proj_in.lora.up.weight": (320, 4)}), "this is a LoRA"),
    "diffusers UNet": (names(**{"down_blocks.0.resnets.0.conv1.bias": (320,)}), "this is a diffusers-format UNet"),
    "diffusers VAE": (names(**{"encoder.down_blocks.0.resnets.0.conv1.bias": (8,)}), "this is a diffusers-format VAE"),
    "guideline tokens": (names(embedding=(2, 768)), "this is a file of guideline tokens, which go to --tokens"),
    "textual inversion": (names(emb_params=(2, 768)), "this is a textual-inversion embedding"),
    "language model": (names(**{"model.layers.0.mlp.up_proj.weight": (8, 8)}), "no UNet of Stable Diffusion 1.x"),
    "other widths": (
        miniature(lambda e: e | {UNET + "input_blocks.0.0.weight": given(torch.zeros(48, 4, 3, 3))}),
        "a UNet of 48 channels, 4 input channels and text width 128",
    ),
    # nearly right
    "missing tensors": (miniature(without(UNET + "out.2", VAE + "quant_conv")), "tensors missing: 4 ("),
    "no text encoder": (miniature(without(TEXT)), "tensors missing: 36 ("),
    "half an averaged UNet": (
        miniature(lambda e: e | {"model_ema.diffusion_modelout2bias": given(torch.zeros(4))}),
        "tensors missing: 685 (model_ema.diffusion_model",
    ),
    "unexpected tensor": (miniature(lambda e: e | NEW), "unexpected: 1 (stranger\\n\\x1b[31m)"),
    "wrong shape": (
        miniature(lambda e: e | {OUT: given(torch.zeros(4, 4))}),
        "of wrong shape: 1 (model.diffusion_model.out.2.weight (4, 4) instead of (4, 32, 3, 3))",
    ),
    "weights of whole numbers": (
        miniature(lambda e: e | {OUT: given(torch.zeros(4, 32, 3, 3, dtype=torch.int32))}),
        "not of floating point: 1 (model.diffusion_model.out.2.weight)",
    ),
    "a stranger": (names(a=(1,)), "no UNet of Stable Diffusion 1.x in it; found 1 tensors (a)"),
    **{f".ckpt cut at {(k + 0.5) / CUTS:.1%}": (cut(write_ckpt, k), "damaged or truncated .ckpt") for k in range(CUTS)},
    **{f".safetensors cut at {(k + 0.5) / CUTS:.1%}": (cut(write_safetensors, k), "truncated") for k in range(CUTS)},
}


def main() -> None:
    """Make every file, try to load it, and print what was said as a Markdown table."""
    import tempfile

    import dag
    from weights.checkpoint import CheckpointError

    print("| file | line |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, (make, _) in FILES.items():
            path = Path("x.ckpt")
            make(path)
            try:
                dag.load(path)
                line = "LOADED"
            except CheckpointError as e:
                line = str(e)
            print(f"| {name} | `{line}` |")
            if path.is_dir():
                (path / "model_index.json").unlink(missing_ok=True)
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        print(f"\n{len(FILES)} files; code executed: {Path('executed').exists()}")


if __name__ == "__main__":
    main()
