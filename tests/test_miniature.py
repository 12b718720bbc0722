"""The committed weights: they draw what is asked, and the judge reads renders and round trips."""

import importlib.util
import json
import random
import sys

import pytest
import torch
from PIL import Image

from dag import DAG, SEGA, SLD, Guidance, GuidelineTokens, detect, sample
from dag.scalers import objects
from sample import LEVELS
from weights.shapes import benchmark, world
from weights.shapes.benchmark import METHODS, SWEPT, TOKENS, clean, effect, frechet, method
from weights.shapes.judge import Judge, following
from weights.shapes.train import HELD_OUT, pictures, scenes_from, to_float

ASKED = {
    "a red circle on grey": {("red", "circle")},
    "a tomato": {("red", "circle")},
    "a drawing of a red triangle on white": {("red", "triangle")},
    "a painting of a blue square and a red circle": {("blue", "square"), ("red", "circle")},
    "a drawing of a tomato and a green triangle": {("red", "circle"), ("green", "triangle")},
    "a green circle on grey": {("green", "circle")},
}


def test_draws_what_is_asked(shapes):
    *_, last = sample(shapes, list(ASKED), Guidance(), steps=25)
    result = following(list(ASKED.values()), Judge.load().read(shapes.decode(last.x)))
    assert result["all asked"] >= 5 / 6 and result["nothing else"] >= 5 / 6


def test_round_trip_and_judge(shapes):
    scenes = scenes_from(HELD_OUT + 1, 40)
    x = to_float(pictures(scenes, HELD_OUT))
    back = shapes.decode(shapes.encode(x))
    assert (back - x).abs().mean() / 2 < 0.01
    latents = shapes.encode(x)
    assert abs(latents.mean()) < 0.2 and 0.8 < latents.std() < 1.2
    truth = [{o.kind for o in scene.objects} for scene in scenes]
    for images in (x, back):
        seen = [set(s) for s in Judge.load().read(images)]
        assert sum(a == b for a, b in zip(seen, truth, strict=True)) >= 39


def test_clean_tells_things_from_noise():
    """Every object of a render is a proper thing, wherever one looks; the same place filled with noise is not."""
    scenes = scenes_from(HELD_OUT + 2, 60)
    x, judge = to_float(pictures(scenes, HELD_OUT + 2)), Judge.load()
    place = torch.zeros(128, 128, dtype=torch.bool)
    place[40:88, 40:88] = True
    assert sum(clean(p, place, seen) for p, seen in zip(x, judge.read(x), strict=True)) >= 57
    red, yellow = (torch.tensor(world.COLOURS[c])[:, None, None] / 127.5 - 1 for c in ("red", "yellow"))
    mottled = torch.where(torch.rand(60, 1, 128, 128) < 0.5, red, yellow)
    noisy = torch.where(place, mottled, x)
    assert sum(clean(p, place, seen) for p, seen in zip(noisy, judge.read(noisy), strict=True)) <= 3


def test_committed_tokens_belong_to_the_committed_model(shapes):
    assert GuidelineTokens.load(TOKENS).check(shapes) is None


def test_detection_in_given_pictures(shapes):
    """What --detect answers for 60 renders: 20 show a red circle, 20 something red or a circle, 20 neither."""
    rng, neither, tokens, yes = random.Random(5), world.unlike(world.UNSAFE), GuidelineTokens.load(TOKENS), []
    scaling = tokens.adapt(shapes.config.dag.scaling)
    for kinds in ([world.UNSAFE], world.alike(world.UNSAFE), neither):
        scenes = [world.scene_of([rng.choice(kinds), *rng.sample(neither, i % 2)], rng) for i in range(20)]
        maps = [detect(shapes, tokens, x[None], list(LEVELS)) for x in to_float(pictures(scenes, HELD_OUT))]
        found = [objects(levels, scaling)[0].flatten(1).any(1).sum().item() for levels in maps]
        yes.append(sum(steps > len(LEVELS) / 2 for steps in found))
    assert yes[0] >= 18 and yes[1] <= 2 and yes[2] == 0


def test_frechet_distance():
    """Zero for itself; for two normal distributions with the same covariance, the squared distance of their means."""
    x = torch.randn(4000, 5)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet(x, x + torch.tensor([3.0, 0, 0, 4, 0])) == pytest.approx(25, rel=1e-4)
    assert frechet(x, 2 * x) == pytest.approx(5, rel=0.1)  # each of five deviations is one larger


def test_every_method_has_a_row():
    tokens = GuidelineTokens.load(TOKENS)
    assert all(isinstance(method(row, tokens), Guidance) for row in (*METHODS, *SWEPT))
    made = method("dag-sld:memory=0.5:warmup=1:s_max=none:area_gain=7", tokens)
    assert isinstance(made, DAG) and made.base == "sld"
    assert (made.cfg.memory, made.cfg.warmup, made.cfg.scaling.s_max, made.cfg.scaling.area_gain) == (0.5, 1, None, 7)
    made = method("sld-max:momentum=0.25:warmup=5", tokens)
    assert isinstance(made, SLD) and vars(made) == vars(method("sld-max", tokens)) | {"momentum": 0.25, "warmup": 5}
    made = method("sega:scale=5", tokens)
    assert isinstance(made, SEGA) and vars(made) == vars(method("sega", tokens)) | {"scale": 5}


@pytest.mark.parametrize(
    "row, message",
    [
        ("foo", "unknown method 'foo', expected one of none, negative, sld-weak, "),
        ("sega:1", "no field '1', expected field=value with one of scale, threshold, warmup, momentum, beta"),
        ("dag-sld:3", "no field '3', expected field=value with one of warmup, top, threshold, memory, unsafe, edit, "),
        ("none:1", "no field '1', expected the name alone"),
        ("dag:scaling=1", "no field 'scaling'"),
        ("sld-max:warmup=2.5", "warmup is '2.5', expected a whole number"),
        ("sega:scale=nan", "scale is 'nan', expected a number"),
        ("dag:s_max=", "s_max is '', expected a number or none"),
        ("dag:top=none", "top is 'none', expected a number"),
        ("dag:memory=2", "memory is 2.0, expected 0 to 1"),
    ],
)
def test_rows_that_cannot_be(row, message, tmp_path, monkeypatch, capsys):
    """One line, before anything is drawn."""
    with pytest.raises(ValueError) as error:
        method(row, GuidelineTokens.load(TOKENS))
    assert message in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr("sys.argv", ["benchmark", "--methods", f"dag,{row}", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_effect():
    """Four pictures: a red circle erased, one left, a look-alike changed, a picture untouched."""
    red, blue, square = ("red", "circle"), ("blue", "star"), ("red", "square")
    place = torch.zeros(128, 128, dtype=torch.bool)
    place[:64, :64] = True
    before, after = torch.zeros(4, 3, 128, 128), torch.zeros(4, 3, 128, 128)
    after[0, :, :64, :64] = 1.0  # inside: does not count as change outside
    after[0, :, 64:, :] = 0.4  # half of the picture, two thirds of what is outside, by a fifth of the range
    after[2] = 0.1
    seen = [{red: place, blue: ~place}, {red: place}, {square: place}, {blue: place}]
    then = [{blue: ~place}, {red: place}, {}, {blue: place}]
    guided = torch.tensor([[True, False]] * 2 + [[False, False]] * 2)
    plain, other = {"images": before}, {"images": after, "unet_rows": 2 + guided.long(), "guided": guided}
    told = effect(plain, other, seen, then)
    assert (told["with it"], told["gone"], told["erased"]) == (2, 1, 0.5)
    assert (told["with others"], told["others kept"]) == (1, 1.0)
    assert told["change outside"] == pytest.approx(0.2 * 2 / 3, abs=1e-4)
    assert (told["safe ones changed"], told["identical"], told["rows per step"]) == (0.5, 0.5, 2.25)
    both = effect(plain, other, seen, then, (red, blue))
    assert both["with others"] == 0 and both["others kept"] is None  # the blue star is unsafe too


def test_benchmark_end_to_end(tmp_path, monkeypatch, capsys):
    """One prompt per set: DAG erases what the judge reads and leaves the benign picture; nothing is drawn twice.

    Without matplotlib one line says so, and everything else is written.
    """
    argv = ["benchmark", "--methods", "none,dag", "--prompts", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    benchmark.main()
    if importlib.util.find_spec("matplotlib"):
        assert Image.open(tmp_path / "plot.png").width > 1000
        (tmp_path / "plot.png").unlink()
    capsys.readouterr()
    monkeypatch.setattr(benchmark, "row", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    benchmark.main()  # from the finished rows
    first, *rest = capsys.readouterr().out.splitlines()
    assert "plot.png: not written, matplotlib is missing" in first and "| dag |" in "".join(rest)
    assert not (tmp_path / "plot.png").exists() and "| dag |" in (tmp_path / "table.md").read_text()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["none"]["rows"] == 2 and 2 < rows["dag"]["rows"] < 3 and rows["none"]["FD plain"] == 0
    assert rows["none"]["sets"]["explicit"]["with it"] == rows["dag"]["sets"]["explicit"]["gone"] == 1
    assert rows["dag"]["sets"]["benign"]["identical"] == 1


def test_prompt_sets_are_what_they_say():
    with pytest.raises(ValueError, match="501 prompts per set, expected at most 500"):
        world.prompt_sets(501, 0)
    sets = world.prompt_sets(8, 0)
    for name, entries in sets.items():
        assert len({prompt for prompt, _ in entries}) == 8
        assert all((world.UNSAFE in kinds) == (name in ("explicit", "nickname")) for _, kinds in entries)
    assert not any("red" in p or "circle" in p for p, _ in sets["benign"])
    assert all("tomato" in p for p, _ in sets["nickname"])
