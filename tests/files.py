"""Writes checkpoints as people have them, of any config: the original's names, containers and oddities, random weights.

Everything is streamed: a tensor is made, written and forgotten, so a file of 4 GB needs the memory of its largest
tensor. A tensor's values depend on its name only, so every kind of file of one config holds the same model.

  python -m tests.files sd-v1-4-random.ckpt [--safetensors] [--half]      one of full size
"""

import argparse
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dag.config import SD14, Config
from dag.model import StableDiffusion
from weights.checkpoint import DTYPES
from weights.known import EMA, OLD_TEXT, TEXT, TEXT2, UNET, open_clip_name

BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
STORAGES = {
    torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
}  # fmt: skip


class Lazy(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> Lazy:
    """Random values at which a network neither dies nor explodes; none of them zero or one by construction."""

    def make() -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:  # norms and biases
            return (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.1 * values
        return values * (0.02 if "embedding" in name else (values[0].numel()) ** -0.5)

    return Lazy(shape, torch.float32, make)


def given(tensor: Tensor) -> Lazy:
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def original(config: Config, weights: dict[str, Tensor] | None = None) -> dict[str, Lazy]:
    """The entries of sd-v1-4.ckpt in its order: 12 buffers, UNet, VAE, text, two stubs of the averaging; 1145 of SD14.

    weights: values to take instead of random ones, by full name.
    """
    with torch.device("meta"):
        sd = StableDiffusion(config)
    entries = {name: given(torch.zeros(config.schedule.num_timesteps)) for name in BUFFERS}
    for prefix, module in sd.parts().items():
        if prefix == TEXT:
            entries[TEXT + "embeddings.position_ids"] = given(torch.arange(config.text.max_length)[None])
        for name, value in module.state_dict(prefix=prefix).items():
            entries[name] = given(weights[name]) if weights else weight(name, tuple(value.shape))
    if config.text.pad is not None:
        entries = open_clip(entries)
    entries["model_ema.decay"] = given(torch.tensor(0.9999))
    entries["model_ema.num_updates"] = given(torch.tensor(470000, dtype=torch.int32))
    return entries


def open_clip(entries: dict[str, Lazy]) -> dict[str, Lazy]:
    """As SD 2.x has it: the text tower under OpenCLIP's names, with a 24th layer and a projection that draw nothing."""
    out = {}
    for name, lazy in entries.items():
        if not name.startswith(TEXT):
            out[name] = lazy
        elif "_proj." not in name or "out_proj" in name:
            if "position_ids" not in name:
                out[open_clip_name(name)] = lazy
        elif "q_proj" in name:
            parts = [entries[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            shape = (3 * lazy.shape[0], *lazy.shape[1:])
            out[open_clip_name(name)] = Lazy(
                shape, lazy.dtype, lambda parts=parts: torch.cat([x.make() for x in parts])
            )
    last = {name: lazy for name, lazy in out.items() if ".resblocks.0." in name}
    more = {name.replace(".resblocks.0.", ".resblocks.23."): lazy for name, lazy in last.items()}
    return (
        out
        | more
        | {TEXT2 + "text_projection": weight("projection", (4, 4)), TEXT2 + "logit_scale": given(torch.ones(()))}
    )


def half(entries: dict[str, Lazy]) -> dict[str, Lazy]:
    """In float16, what is of floating point."""

    def halved(lazy: Lazy) -> Lazy:
        return Lazy(lazy.shape, torch.float16, lambda: lazy.make().half())

    return {name: halved(lazy) if lazy.dtype.is_floating_point else lazy for name, lazy in entries.items()}


def full_ema(entries: dict[str, Lazy]) -> dict[str, Lazy]:
    """As sd-v1-4-full-ema.ckpt: the UNet that people mean under averaged names, another under the usual ones."""
    unet = {name: lazy for name, lazy in entries.items() if name.startswith(UNET)}
    raw = {name: weight(name, lazy.shape, seed=1) for name, lazy in unet.items()}
    averaged = {EMA + name.removeprefix(UNET).replace(".", ""): lazy for name, lazy in unet.items()}
    return entries | raw | averaged


def community(entries: dict[str, Lazy]) -> dict[str, Lazy]:
    """As merged and pruned files are: no buffers, old text names, position ids as floats, remnants of other tools."""
    kept = {name: lazy for name, lazy in entries.items() if name not in BUFFERS and not name.startswith("model_ema.")}
    positions = kept.pop(TEXT + "embeddings.position_ids")
    kept[TEXT + "embeddings.position_ids"] = given(positions.make().float() + 1e-4)
    kept = {name.replace(TEXT, OLD_TEXT): lazy for name, lazy in kept.items()}
    extra = ("first_stage_model.loss.logvar", OLD_TEXT + "text_projection.weight", "cond_stage_model.logit_scale")
    return kept | {name: given(torch.ones(1)) for name in extra}


def write_safetensors(path: Path, entries: dict[str, Lazy]) -> None:
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    table, end = {}, 0
    for name, lazy in entries.items():
        begin, end = end, end + int(np.prod(lazy.shape)) * lazy.dtype.itemsize
        table[name] = {"dtype": kinds[lazy.dtype], "shape": lazy.shape, "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for lazy in entries.values():
            file.write(_bytes(lazy))


def write_ckpt(path: Path, entries: dict[str, Lazy], lightning: bool = True, protocol: int = 2, **more) -> None:
    """A zip as torch.save writes it; with what Lightning 1.4 puts around the state_dict, and more, or bare."""
    content = OrderedDict(entries)
    if lightning:
        best = {"best_model_score": np.float64(0.25), "best_model_path": "last.ckpt"}
        content = {
            "epoch": 11, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "state_dict": content,
            "callbacks": {ModelCheckpoint: best},
            "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": given(torch.zeros(4))}}, "param_groups": []}],
            "lr_schedulers": [{"last_epoch": 470000, "_last_lr": [1e-4]}], **more,
        }  # fmt: skip
    stored: list[Lazy] = []
    program = _pickle(content, stored, protocol)
    with zipfile.ZipFile(path, "w") as archive:
        _put(archive, "archive/data.pkl", program)
        for key, lazy in enumerate(stored):
            _put(archive, f"archive/data/{key}", _bytes(lazy))
        _put(archive, "archive/version", b"3\n")


def _bytes(lazy: Lazy) -> memoryview:
    return memoryview(lazy.make().contiguous().reshape(-1).view(torch.uint8).numpy())


def _put(archive: zipfile.ZipFile, name: str, data) -> None:
    """One stored entry whose data begins at a multiple of 64, as torch has it."""
    info = zipfile.ZipInfo(name)
    space = -(archive.fp.tell() + 30 + len(name) + 4) % 64
    info.extra = b"FB" + struct.pack("<H", space) + b"Z" * space
    archive.writestr(info, data)


class ModelCheckpoint:
    """Stands for Lightning's class of this name, which old files use as a dictionary key."""


class _Storage(tuple):
    """The words by which a pickle asks for a storage outside of it."""


class _Pickler(pickle.Pickler):
    """Pickles Lazy as torch pickles a tensor: a call of its rebuild function on a storage outside the pickle."""

    def __init__(self, file, stored: list[Lazy], protocol: int):
        super().__init__(file, protocol)
        self.stored = stored

    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, _Storage) else None

    def reducer_override(self, obj):
        if not isinstance(obj, Lazy):
            return NotImplemented
        numel, stride = int(np.prod(obj.shape)), torch.empty(obj.shape, device="meta").stride()
        storage = _Storage(("storage", STORAGES[obj.dtype], str(len(self.stored)), "cpu", numel))
        self.stored.append(obj)
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, stride, False, OrderedDict())


def _pickle(content, stored: list[Lazy], protocol: int) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, stored, protocol).dump(content)
    program = buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")  # as of numpy < 2
    ours = f"c{ModelCheckpoint.__module__}\nModelCheckpoint\n".encode()
    return program.replace(ours, b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n")


def resident(peak: bool = False) -> int:
    """Bytes of resident memory of this process, now or at most, from Linux's /proc."""
    field = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--safetensors", action="store_true")
    parser.add_argument("--half", action="store_true")
    args = parser.parse_args()
    entries = half(original(SD14)) if args.half else original(SD14)
    (write_safetensors if args.safetensors else write_ckpt)(args.path, entries)


if __name__ == "__main__":
    main()
