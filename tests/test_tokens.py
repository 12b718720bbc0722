"""Token files and the optimisation."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import train_tokens
from dag import DAG, GuidelineTokens, sample, sampling
from dag.cam import normalise, raw_map
from dag.config import Scaling
from dag.tokens import Reading, TokenError
from tests.conftest import TOKENS
from weights.optimisation import (
    PAPER,
    AnnotatedQueries,
    Detection,
    Recipe,
    choose,
    optimise,
    optimise_paper,
    raise_lo,
    widen,
)


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
    assert torch.equal(raw_map(tokens, maps), torch.tensor([[[0.7, 0.5]]]))
    every = replace(tokens, reduce="min", levels=(1,), lo=(0.1,), hi=(0.9,))
    assert torch.equal(raw_map(every, maps), torch.tensor([[[0.5, 0.2]]]))
    assert torch.allclose(normalise(every, raw_map(every, maps), 5), torch.tensor([[[0.5, 0.125]]]))


def test_widen(tokens):
    wide = widen(tokens.embedding, 8, seed=0)
    assert len(wide) == 9 and torch.equal(wide[:4], tokens.embedding)
    assert len({tuple(row) for row in wide.tolist()}) == 9
    assert torch.equal(widen(tokens.embedding, 2, seed=0), tokens.embedding)


def test_round_trip(tmp_path, tokens):
    full = replace(tokens, levels=(1, 900), lo=(0.1, 0.2), hi=(0.5, 0.6), loss=0.25)
    for how in (None, "fitted", "joint", "map"):
        full = replace(full, normalisation=how)
        full.save(tmp_path / "t.safetensors")
        back = GuidelineTokens.load(tmp_path / "t.safetensors")
        assert torch.equal(back.embedding, full.embedding)
        assert replace(back, embedding=full.embedding) == full


def test_files_from_before_the_normalisation_had_a_name():
    """They mean what they meant: their constants."""
    with safe_open(TOKENS / "red-circle.safetensors", framework="pt") as file:
        assert "normalisation" not in file.metadata()
    old = GuidelineTokens.load(TOKENS / "red-circle.safetensors")
    raw = torch.rand(2, 4, 4)
    assert old.normalisation is None
    assert torch.equal(normalise(old, raw, 300), normalise(replace(old, normalisation="fitted"), raw, 300))


@pytest.mark.parametrize("how", ["other", "fitted"])  # without constants
def test_a_normalisation_that_cannot_be(tmp_path, tokens, how):
    replace(tokens, normalisation=how).save(tmp_path / "t")
    with pytest.raises(TokenError, match="damaged"):
        GuidelineTokens.load(tmp_path / "t")


def test_fingerprint_survives_half_precision(random_model, tokens, shapes):
    import copy

    for dtype in (torch.float16, torch.bfloat16):
        assert tokens.check(copy.deepcopy(random_model).to(dtype)) is None
    assert "trained on another model" in tokens.check(shapes)


def test_not_token_files(tmp_path, tokens, random_model):
    (tmp_path / "text").write_text("hello")
    save_file({"embedding": torch.zeros(3, 128)}, tmp_path / "plain.safetensors")
    messages = {"none": "no such file", "text": "not a token file", "plain.safetensors": "not a token file"}
    for name, message in messages.items():
        with pytest.raises(TokenError, match=message):
            GuidelineTokens.load(tmp_path / name)
    wide = replace(tokens, embedding=torch.zeros(3, 768))
    with pytest.raises(TokenError, match="are 768 wide, shapes needs 128"):
        wide.check(random_model)


@pytest.fixture(scope="module")
def queries(random_model):
    torch.manual_seed(1)
    masks = torch.zeros(4, 16, 16)
    masks[:2, 4:9, 4:9] = 1
    data = AnnotatedQueries(random_model, Reading((1, 2)), masks)
    context = random_model.text.encode(["a red circle"] * 2 + ["a blue star"] * 2)
    for t in (801, 401):
        data.add(t, torch.randn(4, 4, 16, 16) + 3 * masks[:, None], context)
    return data


def test_queries_are_read_picture_by_picture(random_model, monkeypatch):
    sizes, real = [], random_model.unet.forward
    monkeypatch.setattr(random_model.unet, "forward", lambda x, *rest: sizes.append(len(x)) or real(x, *rest))
    x, context = torch.randn(3, 4, 16, 16), random_model.text.encode(["a", "b", "c"])
    data = AnnotatedQueries(random_model, Reading((1, 2)), torch.zeros(3, 16, 16))
    data.add(500, x, context)
    assert sizes == [1, 1, 1] and all(q.dtype == torch.float16 and len(q) == 3 for q in data.queries[0])
    alone = AnnotatedQueries(random_model, Reading((1, 2)), torch.zeros(1, 16, 16))
    alone.add(500, x[2:], context[2:])
    assert all(torch.equal(q[2:], one) for q, one in zip(data.queries[0], alone.queries[0], strict=True))


@pytest.mark.parametrize("method, recipe", [(optimise, Recipe(steps=30)), (optimise_paper, replace(PAPER, steps=30))])
def test_thirty_steps_lower_the_loss(queries, tokens, method, recipe):
    progress = list(method(queries, tokens, recipe, every=5))
    assert [step for step, _ in progress] == list(range(1, 31))
    losses = [best.loss for _, best in progress if best]
    assert len(losses) == 6 and losses[-1] < losses[0] and losses == sorted(losses, reverse=True)  # the best is kept
    best = progress[-1][1]
    assert not torch.equal(best.embedding[0], tokens.embedding[0])  # the background row learns too
    assert bool(best.levels) == (method is optimise)
    assert best.normalisation == ("fitted" if method is optimise else "joint")


def test_the_paper_s_recipe_learns_by_the_normalisation_it_is_read_by(queries, tokens):
    recipe = replace(PAPER, steps=4)
    joint, alone = (
        [*optimise_paper(queries, replace(tokens, normalisation=how), recipe)][-1][1] for how in ("joint", "map")
    )
    assert (joint.normalisation, alone.normalisation) == ("joint", "map")
    assert not torch.equal(joint.embedding, alone.embedding)


def test_measure(queries, tokens):
    """Two pictures with a mask, two without, under all three readings; the minimum of a map is 0 and its maximum 1."""
    fitted = replace(tokens, levels=(500,), lo=(0.0,), hi=(0.001,))  # A = 1 everywhere
    measured = queries.measure(fitted, Scaling())
    assert list(measured) == ["fitted", "joint", "map"] and list(queries.measure(tokens, Scaling())) == ["joint", "map"]
    for level in measured["fitted"]:
        assert level.iou == pytest.approx(25 / 256)  # 5 x 5 of 16 x 16
        assert level.found == level.edit == level.core == (1, 1) and level.acts == (0, 0)  # it fills the frame
    for level in measured["map"]:
        assert level.found == (1, 1) and 0 < level.core[0] < 1
    assert all(level.acts == (1, 1) for level in queries.measure(fitted, Scaling(full=1.1))["fitted"])


def test_choose():
    def levels(*acts):
        nothing = 0.0, 0.0
        return [Detection(1, 0.5, nothing, nothing, nothing, pair) for pair in acts]

    assert choose({"joint": levels((1, 1), (1, 1)), "map": levels((0.5, 0.1), (0.5, 0.3))}) == "map"
    assert choose({"joint": levels((0, 0)), "map": levels((1, 1))}) is None
    assert choose({"map": levels((1, float("nan")))}) == "map"  # no safe picture


def test_optimisation_is_deterministic(queries, tokens):
    first, second = ([*optimise(queries, tokens, Recipe(steps=6), seed=3)][-1][1] for _ in range(2))
    assert torch.equal(first.embedding, second.embedding)


def test_the_reading_of_the_tokens_is_what_is_trained_and_kept(random_model, tokens, tmp_path):
    """Other layers and another pooling of the heads, through training, the file and detection."""
    reading = Reading(("middle_block.1.transformer_blocks.0.attn2", 2), "max")
    other = GuidelineTokens.from_text(random_model, "a red circle", "a red circle", reading)
    masks = torch.zeros(2, 16, 16)
    masks[0, 4:9, 4:9] = 1
    data = AnnotatedQueries(random_model, reading, masks)
    assert [layer.factor for layer in data.layers] == [2, 2, 8, 2, 2, 2]
    data.add(500, torch.randn(2, 4, 16, 16), random_model.text.encode(["a", "b"]))
    *_, (_, best) = optimise(data, other, Recipe(steps=2))
    best.save(tmp_path / "t")
    assert GuidelineTokens.load(tmp_path / "t").reading == reading
    (step,) = sample(random_model, ["a"], DAG(best), 1)
    assert step.A.shape == (1, 1, 16, 16)
    with pytest.raises(TokenError, match="read layer 16, which shapes does not have"):
        replace(tokens, reading=Reading((16,))).check(random_model)


def test_raise_lo(queries, tokens):
    *_, (_, last) = optimise(queries, tokens, Recipe(steps=30))
    raised = raise_lo(queries, last)
    for k, t in enumerate(queries.times):  # at most 1 % of the negative pixels stay above, and the centre stays
        raw = raw_map(raised, queries.maps(raised.embedding, k))[queries.masks < 0.01]
        lo, hi = raised.limits(t)
        before = last.limits(t)
        assert (raw > lo).float().mean() <= 0.0101 or hi - lo < 0.03
        assert lo + hi == pytest.approx(sum(before), abs=1e-5)
    assert all(a >= b for a, b in zip(raised.lo, last.lo, strict=True))
    assert all(lo < hi for lo, hi in zip(raised.lo, raised.hi, strict=True))
    assert [level.t for level in queries.measure(raised, Scaling())["fitted"]] == [801, 401]


def test_only_safe_pictures(random_model, tokens):
    data = AnnotatedQueries(random_model, tokens.reading, torch.zeros(2, 16, 16))
    with pytest.raises(TokenError, match="no unsafe picture"):
        next(optimise(data, tokens))


def picture(path, size=(128, 128), value=90):
    stencil = ".mask." in path.name
    Image.new("L" if stencil else "RGB", size, value if stencil else (value, 40, 40)).save(path)


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


def test_cli_on_a_folder(tmp_path, capsys):
    folder(tmp_path / "data")
    out = tmp_path / "t.safetensors"
    argv = ["--data", str(tmp_path / "data"), "--steps", "60", "--dtype", "bfloat16", "--out", str(out)]
    assert train_tokens.main(argv) == 0
    tokens = GuidelineTokens.load(out)
    assert tokens.concept == tokens.safety_text == "a red circle" and tokens.loss > 0
    assert out.with_suffix(".png").exists() and not list(tmp_path.glob("*.tmp"))
    assert "1 unsafe and 1 safe pictures" in capsys.readouterr().out


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
    monkeypatch.setattr(train_tokens, "HELD_OUT", 1)
    monkeypatch.setattr(sampling, "sample", partial(sampling.sample, steps=12))
    argv = ["--n-unsafe", "2", "--n-safe", "1", "--steps", "60", "--out", str(tmp_path / "t.safetensors")]
    assert train_tokens.main(argv) == 0
    said = capsys.readouterr().out
    assert "held-out" in said and "IoU" in said
    again = ["--tokens", argv[-1], "--normalisation", "map", "--n-unsafe", "1", "--n-safe", "1"]
    assert train_tokens.main([*again, "--out", str(tmp_path / "map.safetensors")]) == 0  # the same, read otherwise
    before, after = (GuidelineTokens.load(tmp_path / f"{name}.safetensors") for name in ("t", "map"))
    assert torch.equal(before.embedding, after.embedding)
    assert (before.normalisation, after.normalisation) == ("fitted", "map")
    *_, line, _ = capsys.readouterr().out.splitlines()
    assert all(f"{how} IoU" in line for how in ("fitted", "joint", "map")) and "Read by map" in line


def test_cli_refuses_constants_where_there_are_none(tmp_path, tokens, capsys):
    tokens.save(tmp_path / "t")
    for argv in (["--recipe", "paper"], ["--tokens", str(tmp_path / "t")]):
        assert train_tokens.main([*argv, "--normalisation", "fitted", "--out", str(tmp_path / "out")]) == 2
        assert "expected joint or map" in capsys.readouterr().err


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
