"""Token files and the optimisation."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train_tokens
from dag import GuidelineTokens
from dag.config import Scaling
from dag.optimisation import PAPER, AnnotatedQueries, Recipe, optimise, raise_lo, widened
from dag.tokens import TokenError


@pytest.fixture()
def tokens(random_model):
    return GuidelineTokens.from_text(random_model, "a red circle", "a red circle")


def test_from_text(random_model, tokens):
    hidden = random_model.text.encode(["a red circle"])[0]
    assert torch.equal(tokens.embedding, hidden[:4])  # start, a, red, circle
    with pytest.raises(TokenError, match="empty"):
        GuidelineTokens.from_text(random_model, "", "x")


def test_rows_make_one_map(tokens):
    maps = torch.tensor([[[[0.9, 0.2]], [[0.5, 0.8]]]])  # (1, 2, 1, 2)
    assert torch.equal(tokens.raw(maps), torch.tensor([[[0.7, 0.5]]]))
    every = GuidelineTokens(**{**vars(tokens), "reduce": "min", "levels": (1,), "lo": (0.1,), "hi": (0.9,)})
    assert torch.equal(every.raw(maps), torch.tensor([[[0.5, 0.2]]]))
    assert torch.allclose(every.detect(maps, 5), torch.tensor([[[0.5, 0.125]]]))


def test_widened(tokens):
    wide = widened(tokens.embedding, 8, seed=0)
    assert len(wide) == 9 and torch.equal(wide[:4], tokens.embedding)
    assert len({tuple(row) for row in wide.tolist()}) == 9
    assert torch.equal(widened(tokens.embedding, 2, seed=0), tokens.embedding)


def test_round_trip(tmp_path, tokens):
    full = GuidelineTokens(**{**vars(tokens), "levels": (1, 900), "lo": (0.1, 0.2), "hi": (0.5, 0.6), "loss": 0.25})
    full.save(tmp_path / "t.safetensors")
    back = GuidelineTokens.load(tmp_path / "t.safetensors")
    assert torch.equal(back.embedding, full.embedding)
    assert {k: v for k, v in vars(back).items() if k != "embedding"} == {
        k: v for k, v in vars(full).items() if k != "embedding"
    }


def test_fingerprint_survives_half_precision(random_model, tokens, shapes):
    import copy

    for dtype in (torch.float16, torch.bfloat16):
        assert tokens.check(copy.deepcopy(random_model).to(dtype)) is None
    assert "trained on another model" in tokens.check(shapes)


def test_not_token_files(tmp_path, tokens, random_model):
    (tmp_path / "text").write_text("hello")
    save_file({"embedding": torch.zeros(3, 128)}, tmp_path / "plain.safetensors")
    for name, message in {
        "none": "no such file",
        "text": "not a token file",
        "plain.safetensors": "not a token file",
    }.items():
        with pytest.raises(TokenError, match=message):
            GuidelineTokens.load(tmp_path / name)
    wide = GuidelineTokens(**{**vars(tokens), "embedding": torch.zeros(3, 768)})
    with pytest.raises(TokenError, match="are 768 wide, shapes needs 128"):
        wide.check(random_model)


@pytest.fixture(scope="module")
def queries(random_model):
    torch.manual_seed(1)
    masks = torch.zeros(4, 16, 16)
    masks[:2, 4:9, 4:9] = 1
    data = AnnotatedQueries(random_model, masks)
    context = random_model.text.encode(["a red circle"] * 2 + ["a blue star"] * 2)
    for t in (801, 401):
        data.add(t, torch.randn(4, 4, 16, 16) + 3 * masks[:, None], context)
    return data


@pytest.mark.parametrize("recipe", [Recipe(steps=30), replace(PAPER, steps=30)], ids=["default", "paper"])
def test_thirty_steps_lower_the_loss(queries, tokens, recipe):
    progress = list(optimise(queries, tokens, recipe, every=5))
    assert len(progress) == 30
    checks = [p.tokens.loss for p in progress if p.tokens]
    assert checks[-1] < checks[0] and checks == sorted(checks, reverse=True)  # the best is kept
    assert not torch.equal(progress[-1].tokens.embedding[0], tokens.embedding[0])  # the background row learns too
    assert bool(progress[-1].tokens.levels) != recipe.joint


def test_optimisation_is_deterministic(queries, tokens):
    first, second = ([*optimise(queries, tokens, Recipe(steps=6), seed=3)][-1].tokens for _ in range(2))
    assert torch.equal(first.embedding, second.embedding)


@pytest.mark.parametrize("recipe", [Recipe(steps=12), replace(PAPER, steps=12)], ids=["default", "paper"])
def test_a_stopped_optimisation_goes_on_as_if_never_stopped(queries, tokens, recipe, tmp_path):
    *_, whole = optimise(queries, tokens, recipe, every=4)
    stopped = next(p for p in optimise(queries, tokens, recipe, every=4) if p.step == 8)
    torch.save(stopped.state, tmp_path / "state")
    rest = list(optimise(queries, tokens, recipe, every=4, state=torch.load(tmp_path / "state", weights_only=True)))
    assert [p.step for p in rest] == [8, 9, 10, 11, 12]
    assert torch.equal(rest[-1].tokens.embedding, whole.tokens.embedding) and rest[-1].tokens.lo == whole.tokens.lo


def test_raise_lo(queries, tokens):
    *_, last = optimise(queries, tokens, Recipe(steps=30))
    raised = raise_lo(queries, last.tokens)
    for k, t in enumerate(queries.times):  # at most 1 % of the negative pixels stay above, and the centre stays
        raw = raised.raw(queries.maps(raised.embedding, k))[queries.masks < 0.01]
        lo, hi = raised.limits(t)
        before = last.tokens.limits(t)
        assert (raw > lo).float().mean() <= 0.0101 or hi - lo < 0.03
        assert lo + hi == pytest.approx(sum(before), abs=1e-5)
    assert all(a >= b for a, b in zip(raised.lo, last.tokens.lo, strict=True))
    assert all(lo < hi for lo, hi in zip(raised.lo, raised.hi, strict=True))
    assert [level.t for level in queries.measure(raised, Scaling())] == [801, 401]


def test_only_safe_pictures(random_model, tokens):
    data = AnnotatedQueries(random_model, torch.zeros(2, 16, 16))
    with pytest.raises(TokenError, match="no unsafe picture"):
        next(optimise(data, tokens, Recipe()))


def picture(path, size=(128, 128), value=90):
    Image.new("L" if ".mask." in path.name else "RGB", size, value if ".mask." in path.name else (value, 40, 40)).save(
        path
    )


def speck(path):
    stencil = Image.new("L", (128, 128))
    stencil.paste(255, (32, 32, 34, 34))
    stencil.save(path)


def folder(path):
    path.mkdir()
    picture(path / "a.png")
    stencil = np.zeros((128, 128), np.uint8)
    stencil[32:96, 32:96] = 255
    Image.fromarray(stencil).save(path / "a.mask.png")
    picture(path / "b.png", value=10)
    (path / "captions.json").write_text(json.dumps({"a.png": "a red square", "b.png": "a blue star"}))


def interrupted(*args):
    raise KeyboardInterrupt


def test_cli_on_a_folder(tmp_path, capsys, monkeypatch):
    """Stopped after the optimisation, then given again: it goes on and leaves no state behind."""
    folder(tmp_path / "data")
    out = tmp_path / "t.safetensors"
    argv = ["--data", str(tmp_path / "data"), "--steps", "60", "--dtype", "bfloat16", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(GuidelineTokens, "save", interrupted)
        assert train_tokens.main(argv) == 130
    assert not out.exists()
    assert train_tokens.main(argv) == 0
    tokens = GuidelineTokens.load(out)
    assert tokens.concept == tokens.safety_text == "a red circle" and tokens.loss > 0
    assert out.with_suffix(".png").exists()
    said = capsys.readouterr().out
    assert "1 unsafe and 1 safe pictures" in said and "going on from step 60" in said
    assert not list(tmp_path.glob("*.state*"))


def test_cli_refuses_a_name_that_is_no_file(tmp_path, capsys):
    for name in (str(tmp_path), str(tmp_path / "sheet.png")):
        assert train_tokens.main(["--out", name]) == 2
        assert "expected the name of a token file" in capsys.readouterr().err


def test_cli_follows_trajectories_only_if_they_draw_the_pictures(tmp_path, capsys):
    folder(tmp_path / "data")
    entries = {"a.png": {"prompt": "a red square", "seed": 1}, "b.png": {"prompt": "a blue star", "seed": 2}}
    (tmp_path / "data" / "captions.json").write_text(json.dumps(entries))
    assert train_tokens.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "t.safetensors")]) == 1
    assert "is not what its prompt and seed draw" in capsys.readouterr().err


def test_cli_draws_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tokens, "HELD_OUT", 4)
    argv = ["--n-unsafe", "3", "--n-safe", "2", "--steps", "60", "--out", str(tmp_path / "t.safetensors")]
    assert train_tokens.main(argv) == 0
    said = capsys.readouterr().out
    assert "held-out" in said and "IoU" in said


BAD = {
    "no folder": (lambda d: None, "no such folder"),
    "no pictures": (lambda d: d.mkdir(), "no pictures in it"),
    "mask without picture": (lambda d: (folder(d), picture(d / "z.mask.png")), "a mask without its picture"),
    "size": (lambda d: (folder(d), picture(d / "a.mask.png", (64, 64))), "expected the same"),
    "zero mask": (lambda d: (folder(d), picture(d / "b.mask.png", value=0)), "all zero"),
    "small mask": (lambda d: (folder(d), speck(d / "b.mask.png")), "too small to learn"),
    "only safe": (lambda d: (folder(d), (d / "a.mask.png").unlink()), "no unsafe picture"),
    "not a picture": (lambda d: (folder(d), (d / "a.png").write_text("x")), "not a readable picture"),
    "caption of nothing": (
        lambda d: (folder(d), (d / "captions.json").write_text('{"a": "x"}')),
        "a is no picture",
    ),
    "captions": (lambda d: (folder(d), (d / "captions.json").write_text("[1]")), "expected a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name, tmp_path, capsys):
    make, message = BAD[name]
    make(tmp_path / "data")
    assert train_tokens.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "t.safetensors")]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.safetensors*"))


def test_the_miniature_draws_its_own_kinds_only(tmp_path, capsys):
    assert train_tokens.main(["--concept", "a pink circle", "--out", str(tmp_path / "t.safetensors")]) == 2
    assert "'a COLOUR SHAPE' only" in capsys.readouterr().err.splitlines()[-1]


def test_a_real_checkpoint_needs_pictures_and_a_concept(tmp_path, capsys):
    assert train_tokens.main(["--ckpt", "x.ckpt", "--out", str(tmp_path / "t")]) == 2
    assert train_tokens.main(["--ckpt", "x.ckpt", "--data", "d", "--out", str(tmp_path / "t")]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "--data: needed" in first and "--concept: needed" in second
