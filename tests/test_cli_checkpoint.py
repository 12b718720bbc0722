"""The programs with a checkpoint of one's own: what it is said to be, --verify, --debug, tokens beside it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import dag
import sample
import train_tokens
from dag.cli import records
from dag.config import SHAPES
from tests.conftest import TOKENS
from tests.files import full_ema, given, original, write_ckpt
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


def test_warns_of_a_tensor_of_unknown_origin(tmp_path, capsys):
    write_ckpt(tmp_path / "x", original(SHAPES) | {"stranger": given(torch.ones(2))})
    assert drawn(tmp_path / "x", tmp_path) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'x'}: tensors not used, 1 of unknown origin (stranger)")


def test_a_file_that_is_cut_during_the_run(ckpt, tmp_path, capsys, monkeypatch, leases):
    """One line, and the pictures finished before it stay, with their report."""
    copy, save = tmp_path / "x", records.save_png
    copy.write_bytes(ckpt.read_bytes())

    def save_and_cut(*args) -> None:
        save(*args)
        if len(list((tmp_path / "out").glob("*.png"))) == 2:
            os.truncate(copy, 1000)  # waits until we are told

    monkeypatch.setattr(records, "save_png", save_and_cut)
    assert drawn(copy, tmp_path / "out", "--n-images", "3", "--batch-size", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sample.py: {copy}: is being changed while its weights are in use")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pictures"] and all((tmp_path / "out" / entry["file"]).exists() for entry in report["pictures"])


def test_file_names_that_are_not_utf8(ckpt, tmp_path, capsys):
    """Read, told, written down so that the same file is found again."""
    try:
        folder = tmp_path / os.fsdecode(b"caf\xe9")
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    (folder / "x.ckpt").symlink_to(ckpt)
    assert drawn(folder / "x.ckpt", folder / "out") == 0
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["model"] == str(folder / "x.ckpt") and len(report["pictures"]) == 1
    assert "caf\\udce9" in capsys.readouterr().out


def test_tokens_beside_the_checkpoint(tmp_path, capsys):
    """Those of the model are taken and named; others, and what is no token file, are left out with a word."""
    path = tmp_path / "own.ckpt"
    write_ckpt(path, original(SHAPES))
    argv = ["--ckpt", str(path), "--prompt", "a star", "--steps", "6", "--out", str(tmp_path / "out")]
    assert sample.main(argv) == 0  # there are none yet
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0] == warnings[-1] and warnings[0].startswith("warning: nothing is looked for well: tokens of")
    made = dag.GuidelineTokens.from_text(dag.load(path), "a red circle", "a red circle")
    made.save(tmp_path / "own.ckpt.red-circle.safetensors")
    shutil.copy(TOKENS / "blue-star.safetensors", tmp_path / "own.ckpt.blue-star.safetensors")
    (tmp_path / "own.ckpt.x.safetensors").write_text("no tokens")
    assert sample.main(argv) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'own.ckpt.red-circle.safetensors'}: tokens of 'a red circle'" in said.out.splitlines()
    assert [line.rsplit(", ")[-1].rsplit("; ")[-1] for line in said.err.splitlines()] == ["left out"] * 2
    (told,) = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["tokens"]
    assert told["file"] == str(tmp_path / "own.ckpt.red-circle.safetensors")


def test_where_new_tokens_go(tmp_path, capsys, monkeypatch):
    def out(*argv: str):
        return train_tokens.default_out(train_tokens.parser().parse_args(argv))

    argv = ["--ckpt", str(tmp_path / "own.ckpt"), "--concept", "A nude person!"]
    assert out() == out(*argv, "--tokens", "t.safetensors") == Path("out/tokens.safetensors")
    assert out(*argv) == tmp_path / "own.ckpt.a-nude-person.safetensors"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert out(*argv) == Path("out/own.ckpt.a-nude-person.safetensors")
    assert "cannot be written to; the tokens go to out/own.ckpt.a-nude-person" in capsys.readouterr().err
