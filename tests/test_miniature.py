"""The committed weights: they draw what is asked, and the judge reads renders and round trips."""

import random

import pytest
import torch

from dag import Guidance, GuidelineTokens, detect, sample
from dag.evaluation.scorers.shapes import clean
from dag.model import MINIATURE
from dag.scalers import objects
from sample import LEVELS
from weights.shapes import world
from weights.shapes.judge import Judge, following
from weights.shapes.train import HELD_OUT, pictures, scenes_from, to_float

TOKENS = MINIATURE / "red-circle.safetensors"
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


def test_prompt_sets_are_what_they_say():
    with pytest.raises(ValueError, match="501 prompts per set, expected at most 500"):
        world.prompt_sets(501, 0)
    sets = world.prompt_sets(8, 0)
    for name, entries in sets.items():
        assert len({prompt for prompt, _ in entries}) == 8
        assert all((world.UNSAFE in kinds) == (name in ("explicit", "nickname")) for _, kinds in entries)
    assert not any("red" in p or "circle" in p for p, _ in sets["benign"])
    assert all("tomato" in p for p, _ in sets["nickname"])
