"""Hostile, broken and foreign files, and what is said of each. `python -m tests.measure.hostile` prints the table.

Every entry of FILES makes one file and names a part of the line it must get. Payloads, were they ever run, would leave
a file called `executed` in the working directory.
"""

import io
import json
import os
import pickle
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

import dag
from dag.config import SHAPES
from tests.files import given, original, write_ckpt, write_safetensors
from weights.checkpoint import CheckpointError
from weights.known import EMA, FIRST, KEY, TEXT, UNET, VAE

PKL = "archive/data.pkl"
CUTS = 20  # places at which a .ckpt and a .safetensors are cut
NO_TABLE, NO_DIRECTORY = "its pickle is no table of tensors", "its zip directory cannot be read"
MISPLACED, BAD_HEADER = "is not where the zip directory says", "damaged .safetensors header"
Make = Callable[[Path], object]  # writes the file


def said(make: Make, path: Path) -> str:
    """What loading says of a file; LOADED if it does not refuse it."""
    make(path)
    try:
        dag.load(path)
    except CheckpointError as e:
        return str(e)
    return "LOADED"


def plain(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def saved(**options) -> bytes:
    """A small file of torch.save."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4, 4), "b": torch.ones(16)}, buffer, **options)
    return buffer.getvalue()


# --- zips


def archive(content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Make:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in content.items():
                file.writestr(name, data)

    return make


def zipped(change: Callable[[dict[str, bytes]], dict[str, bytes]], method: int = zipfile.ZIP_STORED) -> Make:
    """A small .ckpt packed again after a change to its {name: content}."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(saved())) as file:
            content = {name: file.read(name) for name in file.namelist()}
        archive(change(content), method)(path)

    return make


def overwritten(mark: bytes, offset: int, value: bytes) -> Make:
    """A small .ckpt with this value so many bytes behind the last place where the mark is."""

    def make(path: Path) -> None:
        zipped(lambda content: content)(path)
        data = path.read_bytes()
        k = data.rindex(mark) + offset
        path.write_bytes(data[:k] + value + data[k + len(value) :])

    return make


def directory(name: bytes, offset: int, value: bytes) -> Make:
    """The same for a field of an entry of the zip's directory, which is at the end of the file."""
    return overwritten(b"archive/" + name, offset - 46, value)


def overlapping(path: Path) -> None:
    """Two entries of the directory, the second one's local header inside the data of the first."""
    archive({"archive/data/1": bytes(64)})(path)
    hidden = path.read_bytes()[: 30 + 14 + 64]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(PKL, pickle.dumps({}, 2))
        file.writestr("archive/data/0", hidden)
        info = zipfile.ZipInfo("archive/data/1")
        info.file_size = info.compress_size = 64
        info.CRC = zipfile.crc32(bytes(64))
        info.header_offset = file.infolist()[1].header_offset + 30 + 14
        file.filelist.append(info)


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            file.writestr(PKL, pickle.dumps({}, 2))


# --- pickles


def program(code: bytes) -> Make:
    """A .ckpt with this pickle and one storage of 16 floats, "0"."""
    return archive({PKL: code, "archive/data/0": bytes(64), "archive/version": b"3\n"})


def payload(function, *args) -> object:
    """What calls a function while it is unpickled."""
    return type("Payload", (), {"__reduce__": lambda self: (function, args)})()


def calls(function, *args, protocol: int = 2) -> Make:
    """A .ckpt with a payload for its only tensor."""
    return program(pickle.dumps({"state_dict": {"a": payload(function, *args)}}, protocol))


def needs(value) -> Make:
    """The miniature, with this in the place of a weight."""
    return lambda path: write_ckpt(path, original(SHAPES) | {OUT: value})


def push(value) -> bytes:
    """Instructions that put a value on the stack."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(push, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def storage(kind=b"ctorch\nFloatStorage\n", key=b"X\x01\0\0\x000", numel=1) -> bytes:
    """Instructions that put a storage there; those for its class and its key may be others."""
    return b"(" + push("storage") + kind + key + push("cpu") + push(numel) + b"tQ"


def tensor(first=0, shape=(4,), stride=(1,), numel=16, key="0", kind="FloatStorage") -> Make:
    """A .ckpt of one tensor "a" described by these numbers."""
    found = storage(f"ctorch\n{kind}\n".encode(), push(key), numel)
    args = b"(" + found + push(first) + push(shape) + push(stride) + b"\x89}t"
    return program(b"\x80\x02}" + push("a") + b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"Rs.")


def doubling(depth: int) -> bytes:
    """A tuple of 2**depth parts, which takes as many steps to hash or to write out."""
    return b")" + b"q\x00h\x00\x86" * depth


def repeated(nbytes: int, count: int) -> bytes:
    """A class of a long name, asked for many times."""
    return push("x" * nbytes) + b"\x94" + b"h\0h\0\x93" * count


def colliding(count: int) -> bytes:
    """A dictionary of integers that Python hashes to 0, all compared with all."""
    keys = (k * ((1 << 61) - 1) for k in range(1, count + 1))
    return b"\x80\x02}(" + b"".join(b"\x8a\x0a" + k.to_bytes(10, "little") + b"N" for k in keys) + b"u."


# --- .safetensors


def header(text: str | bytes, data: bytes = bytes(64), length: int | None = None) -> Make:
    text = text.encode() if isinstance(text, str) else text
    return plain(struct.pack("<Q", len(text) if length is None else length) + text + data)


def one(dtype="F32", shape=(4, 4), offsets=(0, 64), data: bytes = bytes(64), **more: tuple) -> Make:
    """A .safetensors of one tensor "a" described by these values, and of more such tensors at other offsets."""
    places = {"a": offsets} | more
    return header(json.dumps({k: {"dtype": dtype, "shape": shape, "data_offsets": v} for k, v in places.items()}), data)


# --- other models


def names(write: Callable = write_safetensors, **shapes) -> Make:
    return lambda path: write(path, {k: given(torch.zeros(v)) for k, v in shapes.items()})


def unet(channels: int = 4, width: int = 768, **more) -> Make:
    """The names and shapes by which a UNet of the original layout is told, and more."""
    return names(**{FIRST: (320, channels, 3, 3), KEY: (320, width), VAE + "quant_conv.bias": (8,)}, **more)


def without(*gone: str) -> Make:
    return lambda path: write_safetensors(path, {k: v for k, v in original(SHAPES).items() if not k.startswith(gone)})


def plus(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Make:
    return lambda path: write_safetensors(path, original(SHAPES) | {name: given(torch.zeros(shape, dtype=dtype))})


def cut(write: Callable, k: int) -> Make:
    """The whole file up to the share (k + 1/2) / CUTS of it; the first cut comes earlier, inside the header."""

    def make(path: Path) -> None:
        write(path, original(SHAPES))
        size = path.stat().st_size
        os.truncate(path, 30 if k == 0 else int(size * (k + 0.5) / CUTS))

    return make


OUT = UNET + "out.2.weight"

FILES: dict[str, tuple[Make, str]] = {
    # not checkpoints at all
    "no file": (lambda p: None, "no such file"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "no such file"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "diffusers folder": (
        lambda p: (p.mkdir(), (p / "model_index.json").write_text("{}")),
        "is a diffusers-format folder",
    ),
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
    "old torch file": (plain(saved(_use_new_zipfile_serialization=False)), "a bare pickle (an old torch file"),
    "pickle that calls os.system": (plain(pickle.dumps(payload(os.system, "touch executed"))), "a bare pickle"),
    # programs in pickles
    "calls os.system": (calls(os.system, "touch executed"), "calls 'posix.system' for a tensor, nothing was executed"),
    "same, protocol 4": (calls(os.system, "touch executed", protocol=4), "calls 'posix.system'"),
    "same, protocol 0": (calls(os.system, "touch executed", protocol=0), NO_TABLE),
    "calls eval": (calls(eval, "open('executed', 'w')"), "calls '__builtin__.eval'"),
    "calls exec": (calls(exec, "open('executed', 'w')", protocol=4), "calls 'builtins.exec'"),
    "calls open": (calls(open, "executed", "w"), "calls 'io.open'"),
    "calls getattr": (calls(getattr, "", "join", protocol=4), "calls 'builtins.getattr'"),
    "calls torch.load": (calls(torch.load, "other.ckpt"), "calls 'torch.serialization.load'"),
    "calls torch.zeros": (program(b"\x80\x02ctorch\nzeros\nJ\xff\xff\xff\x7f\x85R."), "calls 'torch.zeros'"),
    "calls bytearray of a terabyte": (calls(bytearray, 10**12, protocol=4), "calls 'builtins.bytearray'"),
    "names a class in a string": (program(b"\x80\x02X\x0c\0\0\0posix.systemX\x0e\0\0\0touch executed\x85R."), NO_TABLE),
    "INST of os.system": (program(b"\x80\x02(X\x0e\0\0\0touch executediposix\nsystem\n."), NO_TABLE),
    "OBJ of os.system": (program(b"\x80\x02(cposix\nsystem\nX\x0e\0\0\0touch executedo."), NO_TABLE),
    "a weight by os.system": (needs(payload(os.system, "touch executed")), "calls 'posix.system' for a tensor"),
    "a weight that is a function": (needs(os.system), "calls 'posix.system' for a tensor"),
    "weights in a class of their own": (
        program(b"\x80\x02}" + push("state_dict") + b"cmy\nDict\n)\x81" + push("a") + b"K\0ss."),
        "calls 'my.Dict' for a tensor",
    ),
    "everything in a class of its own": (program(b"\x80\x02cmy\nModule\n)\x81}b."), "calls 'my.Module' for a tensor"),
    "weight of an unlisted shape": (
        program(
            b"\x80\x02}" + push("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\0cmy\nSize\n))tRs."
        ),
        "calls 'my.Size' for a tensor",
    ),
    "extension registry": (program(b"\x80\x02\x82\x01."), NO_TABLE),
    "name with a line break": (program(b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93."), "calls 'a\\nb.c'"),
    "key that takes forever to hash": (program(b"\x80\x02}" + doubling(60) + b"K\0s."), "holds no named tensors"),
    "storage class that takes forever to hash": (program(storage(doubling(60)) + b"."), NO_TABLE),
    "storage key nested deeper than C's stack": (program(storage(key=b")" + b"\x85" * 400_000) + b"."), NO_TABLE),
    "name that takes forever to write out": (program(b"\x80\x04" + doubling(40) + b"\x8c\x01a\x93."), NO_TABLE),
    "keys that all have one hash": (program(colliding(100_000)), "holds no named tensors"),
    "a name of 2 MB, 20,000 times": (
        program(b"\x80\x04" + repeated(2 << 20, 20_000) + b"}."),
        "holds no named tensors",
    ),
    "no end": (program(b"\x80\x02}"), NO_TABLE),
    "unknown instruction": (program(b"\x80\x02}\xfe."), NO_TABLE),
    "string longer than the file": (program(b"\x80\x02X\xff\xff\xff\x7fa."), NO_TABLE),
    "memo that was never put": (program(b"\x80\x02h\x07."), NO_TABLE),
    "pop from an empty stack": (program(b"\x80\x02R."), NO_TABLE),
    "tuple of more than there is": (program(b"\x80\x02K\0\x87}."), NO_TABLE),
    "tuple over a mark": (program(b"\x80\x02K\0(\x85}."), NO_TABLE),
    "end right behind a mark": (program(b"\x80\x02}(."), NO_TABLE),
    "list without a mark": (program(b"\x80\x02]K\0e}."), NO_TABLE),
    "list below a mark": (program(b"\x80\x02](K\0a}."), NO_TABLE),
    "attributes of nothing": (program(b"\x80\x02Nb}."), NO_TABLE),
    "arguments that are a list": (program(b"\x80\x02ccollections\nOrderedDict\n]R."), NO_TABLE),
    "items added to no set": (program(b"\x80\x04}](K\0\x90."), NO_TABLE),
    "protocol 6": (program(b"\x80\x06}."), NO_TABLE),
    "frame longer than the program": (program(b"\x80\x04\x95" + struct.pack("<Q", 9) + b"}."), NO_TABLE),
    "frame that ends where it says": (
        program(b"\x80\x04\x95" + struct.pack("<Q", 2) + b"}."),
        "holds no named tensors",
    ),
    "pickle with a wrong checksum": (directory(b"data.pkl", 16, b"crc!"), "'archive/data.pkl' is not what was written"),
    "byte order with a wrong checksum": (directory(b"byteorder", 16, b"crc!"), "'archive/byteorder' is not what was"),
    "a list": (program(pickle.dumps([1, 2], 2)), NO_TABLE),
    "state_dict that is a list": (program(pickle.dumps({"state_dict": [1]}, 2)), NO_TABLE),
    "no tensors": (program(pickle.dumps({"epoch": 1}, 2)), "holds no named tensors"),
    "pickle of 5 MB": (program(b"\x80\x02" + b"N0" * 2_500_000 + b"N."), "expected at most 4194304"),
    "a million dictionaries": (program(b"\x80\x02(" + b"}" * 1_000_000 + b"t."), NO_TABLE),
    "a million tuples in each other": (program(b"\x80\x02)" + b"\x85" * 1_000_000 + b"."), NO_TABLE),
    # tensors that are not in their file
    "tensor beyond its storage": (tensor(shape=(17,)), NO_TABLE),
    "tensor that starts behind": (tensor(first=14), NO_TABLE),
    "stride out of the storage": (tensor(stride=(6,)), NO_TABLE),
    "negative offset": (tensor(first=-1), NO_TABLE),
    "negative stride": (tensor(stride=(-1,)), NO_TABLE),
    "negative shape": (tensor(shape=(-4,)), NO_TABLE),
    "shape of text": (tensor(shape=("4",)), NO_TABLE),
    "shape that is a dictionary": (tensor(shape={4: None}), NO_TABLE),
    "stride that is a list": (tensor(stride=[1]), NO_TABLE),
    "more strides than sides": (tensor(stride=(1, 1)), NO_TABLE),
    "storage longer than its entry": (tensor(numel=17), NO_TABLE),
    "storage of 2**60 elements": (tensor(numel=1 << 60), NO_TABLE),
    "storage that is not there": (tensor(key="7"), NO_TABLE),
    "storage outside the folder": (tensor(key="../data.pkl"), NO_TABLE),
    "storage of complex numbers": (tensor(kind="ComplexFloatStorage"), "calls 'torch.ComplexFloatStorage'"),
    "a view as large as you like": (tensor(shape=(1 << 40,), stride=(0,)), "no UNet of Stable Diffusion 1.x"),
    # zips
    "plain zip": (archive({"a.txt": b"hello"}), "a zip archive but no .ckpt"),
    "empty zip": (archive({}), "an empty zip archive"),
    "zip of a .ckpt": (archive({"sd-v1-4.ckpt": saved()}), "it holds 1 files ('sd-v1-4.ckpt', ...): unpack it"),
    "data.pkl one folder deeper": (zipped(lambda c: {f"deep/{k}": c[k] for k in c}), "a zip archive but no .ckpt"),
    "two data.pkl": (zipped(lambda c: c | {"b/data.pkl": c[PKL]}), "a zip archive but no .ckpt"),
    "data.pkl in it twice": (twice, "'archive/data.pkl' is in it twice"),
    "TorchScript": (zipped(lambda c: c | {"archive/code/a.py": b"open('executed', 'w')"}), "a TorchScript archive"),
    "big-endian": (zipped(lambda c: c | {"archive/byteorder": b"big"}), "written by a big-endian machine"),
    "compressed": (zipped(lambda c: c, zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "a pickle of 200 MB in 200 kB": (
        zipped(lambda c: c | {PKL: bytes(200 << 20)}, zipfile.ZIP_DEFLATED),
        f"'{PKL}' is compressed or encrypted",
    ),
    "encrypted": (directory(b"data/0", 8, b"\x01\0"), "is compressed or encrypted"),
    "entry outside the file": (directory(b"data/0", 42, struct.pack("<I", 1 << 30)), "damaged"),
    "entry at another one's place": (directory(b"data/1", 42, bytes(4)), MISPLACED),
    "entry longer than the file": (directory(b"data/1", 20, 2 * struct.pack("<I", 1 << 30)), MISPLACED),
    "entry longer than its place": (directory(b"data/0", 20, 2 * struct.pack("<I", 80)), "overlaps"),
    "entry inside another": (overlapping, "'archive/data/1' overlaps 'archive/data/0'"),
    "renamed entry": (overwritten(b"archive/data/0", 13, b"9"), MISPLACED),
    "lost storage": (zipped(lambda c: {k: v for k, v in c.items() if k != "archive/data/1"}), NO_TABLE),
    "damaged directory": (overwritten(b"PK\x01\x02", 0, b"Q"), NO_DIRECTORY),
    "directory of 4 GB": (overwritten(b"PK\x05\x06", 12, struct.pack("<I", 0xFFFFFFF0)), NO_DIRECTORY),
    "directory of 5 MB": (archive({f"archive/data/{k:05000d}": b"" for k in range(1000)}), NO_DIRECTORY),
    # .safetensors
    "header beyond the file": (header("{}", length=1 << 20), "end inside the header"),
    "header of 2**63 bytes": (header("{}", length=1 << 63), "end inside the header"),
    "header of 5 MB": (header(b'{"a":"' + bytes(5 << 20) + b'"}'), "expected at most 4194304"),
    "header that is no JSON": (header('{"a": ['), BAD_HEADER),
    "header that is no text": (header(b'{"\xff\xfe'), BAD_HEADER),
    "a million lists in each other": (header(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"), "damaged .safetensors"),
    "a number of a million digits": (header(b'{"a":' + b"9" * 10**6 + b"}"), BAD_HEADER),
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
    "name with escapes, of 5 MB": (archive({"\n\x1b[31m/data.pkl": bytes(5_000_000)}), "expected at most 4194304"),
    "unknown type": (one(dtype="F4"), "'a' is of type 'F4'; expected F64, F32"),
    "overlapping tensors": (one(shape=[8], offsets=(0, 32), b=(16, 48)), "'b' overlaps 'a'"),
    "offsets out of the file": (one(shape=[8], offsets=(0, 32), b=(64, 96)), "truncated"),
    "bytes too many": (one(data=bytes(65)), "damaged, its header tells of"),
    "metadata that is no text": (
        header(r'{"__metadata__":{"config":[]},"\ud800\u0000":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'),
        "found 1 tensors (\\ud800\\x00)",
    ),
    "metadata that is a list": (header('{"__metadata__": [], "a": 1}'), "damaged .safetensors header at 'a'"),
    "no tensors in .safetensors": (header('{"__metadata__": {"a": "b"}}', b""), "holds no tensors"),
    # other models
    "SD 2.x": (unet(width=1024), "an SD 2.x checkpoint, and nothing in it tells what its UNet predicts"),
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
    "VAE in a .ckpt": (names(write_ckpt, **{"decoder.up.0.block.0.norm1.bias": (128,)}), "this is a VAE alone"),
    "text encoder": (names(**{"text_model.final_layer_norm.bias": (768,)}), "this is a text encoder alone"),
    "UNet": (without(VAE, TEXT, "betas", "alphas", "sqrt", "log", "post", "model_ema"), "a UNet alone"),
    "UNet without a prefix": (names(**{"input_blocks.0.0.weight": (320, 4, 3, 3)}), "this is a UNet alone"),
    "LoRA": (names(**{"lora_unet_down_blocks_0_proj_in.lora_down.weight": (4, 320)}), "this is a LoRA or the like"),
    "diffusers LoRA": (names(**{"unet.down_blocks.0.proj_in.lora.up.weight": (320, 4)}), "this is a LoRA"),
    "diffusers UNet": (names(**{"down_blocks.0.resnets.0.conv1.bias": (320,)}), "this is a diffusers-format UNet"),
    "diffusers VAE": (names(**{"encoder.down_blocks.0.resnets.0.conv1.bias": (8,)}), "this is a diffusers-format VAE"),
    "guideline tokens": (names(embedding=(2, 768)), "this is a file of guideline tokens, which go to --tokens"),
    "textual inversion": (names(emb_params=(2, 768)), "this is a textual-inversion embedding"),
    "language model": (names(**{"model.layers.0.mlp.up_proj.weight": (8, 8)}), "no UNet of Stable Diffusion 1.x"),
    "other widths": (plus(FIRST, 48, 4, 3, 3), "a UNet of 48 channels, 4 input channels and text width 128"),
    # nearly right
    "missing tensors": (without(UNET + "out.2", VAE + "quant_conv"), "tensors missing: 4 ("),
    "no text encoder": (without(TEXT), "tensors missing: 36 ("),
    "half an averaged UNet": (plus(EMA + "out2bias", 4), f"tensors missing: 685 ({EMA}"),
    "wrong shape": (plus(OUT, 4, 4), f"of wrong shape: 1 ({OUT} (4, 4) instead of (4, 32, 3, 3))"),
    "weights of whole numbers": (plus(OUT, 4, 32, 3, 3, dtype=torch.int32), f"not of floating point: 1 ({OUT})"),
    "a stranger": (names(a=(1,)), "no UNet of Stable Diffusion 1.x in it; found 1 tensors (a)"),
    **{f".ckpt cut at {(k + 0.5) / CUTS:.1%}": (cut(write_ckpt, k), "damaged or truncated .ckpt") for k in range(CUTS)},
    **{f".safetensors cut at {(k + 0.5) / CUTS:.1%}": (cut(write_safetensors, k), "truncated") for k in range(CUTS)},
}


def main() -> int:
    """Make every file, try to load it, and print what was said as a Markdown table."""
    wrong, executed = 0, False
    print("| file | line |\n|---|---|")
    for name, (make, message) in FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            line = said(make, Path("x.ckpt"))
            executed |= Path("executed").exists()
        wrong += message not in line
        print(f"| {name} | `{line}` |")
    print(f"\n{len(FILES)} files, {wrong} with another line than expected; code executed: {executed}")
    return int(wrong > 0 or executed)


if __name__ == "__main__":
    sys.exit(main())
