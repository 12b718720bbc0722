"""Networks of transformers, from a folder or from the hub: everything that goes wrong is one line."""

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import dag.text  # noqa: F401  before transformers, which would take our folder `kernels` for the Hugging Face package
from weights.checkpoint import sha256

from transformers import AutoConfig, AutoProcessor, logging  # isort: skip
from transformers.utils.hub import cached_file, extract_commit_hash  # isort: skip

logging.set_verbosity_error()  # it warns of every image processor that works without torchvision
if not sys.stderr.isatty():
    logging.disable_progress_bar()

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def open_model(
    name: str | Path,
    kinds: Collection[str],
    auto: type,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple:
    """A network and its processor, from a folder or the hub. Nothing in the files is executed. Raises ValueError.

    kinds: the types of model, as config.json has them, that can be used.
    """
    safe, weights = {"trust_remote_code": False}, {"use_safetensors": True, "dtype": dtype}
    some = " or ".join([*kinds][:4]) + (" and others" if len(kinds) > 4 else "")
    own, needed = "its", f"config, processor and model.safetensors of {some}"
    if not Path(name).is_dir():
        if not HUB_NAME.fullmatch(str(name)):
            raise ValueError(f"{name}: no such folder; expected one with {needed}; download it first")
        own = "no such folder, and on the hub its"
        needed += "; download it where there is a network (hf download NAME --local-dir DIR) and pass DIR"
    with readable(f"{name}: {own} config cannot be read", needed):
        kind = AutoConfig.from_pretrained(name, **safe).model_type
    if kind not in kinds:
        raise ValueError(f"{name}: is a model of the kind {kind}; expected {needed}")
    with readable(f"{name}: {own} processor cannot be read", needed):
        processor = AutoProcessor.from_pretrained(name, **safe)
    with readable(f"{name}: {own} weights cannot be read", needed):
        model, told = auto.from_pretrained(name, output_loading_info=True, **weights, **safe)
    if lost := sorted(told["missing_keys"]):  # they would be random
        raise ValueError(f"{name}: weights are missing, {len(lost)}, such as {lost[0]}; download the model again")
    return model.eval().to(device), processor


def identity(name: str | Path) -> dict:
    """What tells which network was opened: a folder's name and its weights' hashes, or the hub's name and revision."""
    if not Path(name).is_dir():
        return {"model": str(name), "revision": extract_commit_hash(cached_file(name, "config.json"), None)}
    files = sorted(file for file in Path(name).iterdir() if file.suffix in (".safetensors", ".bin"))
    return {"model": Path(name).resolve().name, "sha256": {file.name: sha256(file) for file in files}}


@contextmanager
def readable(found: str, expected: str) -> Iterator[None]:
    """Whatever a library raises inside, and they raise many kinds, becomes a ValueError of one line."""
    try:
        yield
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        raise ValueError(f"{found} ({reason}); expected {expected}") from e
