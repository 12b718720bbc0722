"""sample.py with a checkpoint of one's own: what it is said to be, --verify, --debug."""

import json

import pytest

import sample
from dag.config import SHAPES
from tests.files import full_ema, original, write_ckpt
from weights import checkpoint, known


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "some.ckpt"
    write_ckpt(path, full_ema(original(SHAPES)))
    return path


def drawn(ckpt, out, *more: str) -> int:
    argv = ["--ckpt", str(ckpt), "--prompt", "a star", "--steps", "1", "--guidance", "none", "--out", str(out)]
    return sample.main([*argv, *more])


def test_says_what_it_was_given(ckpt, tmp_path, capsys):
    assert drawn(ckpt, tmp_path) == 0
    assert f"{ckpt}: shapes, its EMA UNet" in capsys.readouterr().out.splitlines()[0]
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["origin"] == "shapes, its EMA UNet"


def test_debug_lists_what_was_ignored(ckpt, tmp_path, capsys):
    assert drawn(ckpt, tmp_path, "--debug") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "ignored in the checkpoint: " in line and "model_ema.decay" in line and "posterior_variance" in line


def test_verify(ckpt, tmp_path, capsys, monkeypatch):
    assert drawn(ckpt, tmp_path / "a", "--verify") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a published file known here: sha256 " in line and "leave out --verify" in line
    assert not list((tmp_path / "a").glob("*.png"))
    monkeypatch.setattr(known, "PUBLISHED", (("real.ckpt", 1, checkpoint.sha256(ckpt)),))
    assert drawn(ckpt, tmp_path / "b", "--verify") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{ckpt}: the published real.ckpt, by its sha256"


def test_verify_needs_a_file(tmp_path, capsys):
    assert sample.main(["--verify", "--out", str(tmp_path)]) == 2
    assert "--verify needs --ckpt" in capsys.readouterr().err
    assert drawn(tmp_path / "none", tmp_path, "--verify") == 1
    assert "no such file" in capsys.readouterr().err
