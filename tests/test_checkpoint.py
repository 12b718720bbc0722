"""Reading checkpoints: what must load, and the one line each broken or foreign file gets."""

import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dag
from dag.config import SD14
from dag.model import MINIATURE, TEXT, UNET, VAE, StableDiffusion
from weights.checkpoint import CheckpointError, read


@pytest.fixture(scope="session")
def tensors():
    return load_file(MINIATURE)


@pytest.fixture(scope="module")
def ckpt(tensors, tmp_path_factory):
    """A .ckpt as the original's: Lightning entries, schedule buffers, position ids."""
    path = tmp_path_factory.mktemp("ckpt") / "model.ckpt"
    extra = {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
    extra[TEXT + "embeddings.position_ids"] = torch.arange(24)[None]
    content = {"epoch": 3, "state_dict": tensors | extra, "best": np.float64(0.5), "optimizer_states": [{"lr": 1e-4}]}
    torch.save(content, path)
    return path


def test_full_size_names_and_sizes():
    """686 + 248 + 196 tensors and the parameter counts of the published file."""
    with torch.device("meta"):
        sd = StableDiffusion(SD14)
    count = lambda m: (len(m.state_dict()), sum(p.numel() for p in m.parameters()))  # noqa: E731
    assert count(sd.unet) == (686, 859_520_964)
    assert count(sd.vae) == (248, 83_653_863)
    assert count(sd.text.transformer) == (196, 123_060_480)
    layers = [factor for factor, _ in sd.unet.cross_attention()]
    assert layers == [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]


def test_ckpt_and_safetensors_give_the_same_model(ckpt, shapes):
    sd = dag.load(ckpt)
    assert set(sd.ignored) == {"betas", "model_ema.decay", TEXT + "embeddings.position_ids"}
    for (name, a), (_, b) in zip(sd.state_dict().items(), shapes.state_dict().items(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b), name
    assert torch.equal(sd.text.encode(["a red circle"]), shapes.text.encode(["a red circle"]))


def test_no_state_dict_wrapper(tensors, tmp_path):
    torch.save(tensors, tmp_path / "flat.ckpt")
    assert dag.load(tmp_path / "flat.ckpt").ignored == []


def test_a_link_is_fine(ckpt, tmp_path):
    (tmp_path / "link").symlink_to(ckpt)
    assert len(read(tmp_path / "link")[0]) > 1000 // 3


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def evil(path):
    torch.save({"state_dict": {"x": torch.zeros(1)}, "callbacks": Evil()}, path)


def evil_zip(path):
    """The same without torch's help: a zip whose pickle calls a function."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(Evil()))
        z.writestr("archive/version", "3")


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "jpeg": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100)), "a JPEG picture"),
    "html": (lambda p: p.write_bytes(b"<!DOCTYPE html><html>"), "a web page"),
    "lfs": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
    "noise": (lambda p: p.write_bytes(bytes(range(16)) * 9), "of no known kind"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Evil())), "a bare pickle"),
    "code": (evil, "its pickle calls posix.system, nothing was executed"),
    "code in a plain zip": (evil_zip, "its pickle holds more than tensors; nothing was executed"),
    "zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "hello"), "damaged or truncated .ckpt"),
    "no tensors": (lambda p: torch.save({"epoch": 1}, p), "holds no named tensors"),
    "other model": (lambda p: save_file({"a": torch.zeros(2)}, p), "no UNet of Stable Diffusion 1.x"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "missing": (lambda p: None, "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[name]
    make(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        dag.load(tmp_path / "x.ckpt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_truncated(share, kind, ckpt, tmp_path):
    whole = (ckpt if kind == "ckpt" else MINIATURE).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated"):
        dag.load(tmp_path / "cut")


def test_flipped_bytes_of_the_pickle(ckpt, tmp_path):
    """Damage anywhere in the pickle is one line, or harmless; it never executes and never shows a traceback."""
    whole = bytearray(ckpt.read_bytes())
    start = whole.index(b"data.pkl") + 80
    for k in range(60):
        place = start + 97 * k
        whole[place] ^= 0x15
        (tmp_path / "x.ckpt").write_bytes(whole)
        whole[place] ^= 0x15
        try:
            dag.load(tmp_path / "x.ckpt")
        except CheckpointError as e:
            assert "\n" not in str(e)


def without(tensors, *names):
    return {k: v for k, v in tensors.items() if k not in names}


def test_missing_unexpected_and_misshapen(tensors, tmp_path):
    gone = [UNET + "out.2.bias", UNET + "time_embed.0.bias", VAE + "quant_conv.bias", VAE + "post_quant_conv.bias"]
    changed = without(tensors, *gone) | {"stranger": torch.zeros(1), UNET + "out.2.weight": torch.zeros(4, 4)}
    save_file(changed, tmp_path / "x.safetensors", {"config": "shapes"})
    with pytest.raises(CheckpointError) as error:
        dag.load(tmp_path / "x.safetensors")
    text = str(error.value)
    assert "missing: 4 (" in text and ", ...)" in text and gone[0] in text
    assert "unexpected: 1 (stranger)" in text
    assert "of wrong shape: 1 (model.diffusion_model.out.2.weight (4, 4) instead of (4, 32, 3, 3))" in text


def test_other_widths_are_named(tensors, tmp_path):
    first = UNET + "input_blocks.0.0.weight"
    save_file(tensors | {first: torch.zeros(320, 9, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="9 input channels"):
        dag.load(tmp_path / "x.safetensors")


def test_requested_dtype():
    sd = dag.load(dtype=torch.bfloat16)
    assert {p.dtype for p in sd.parameters()} == {torch.bfloat16}
