"""What is said of a picture, and how maps and sheets look."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from dag.config import DAGConfig, Scaling
from dag.drawing import Drawing, sheet
from dag.pictures import from_pil, overlay, strip, to_pil
from dag.tokens import GuidelineTokens

CFG = DAGConfig(warmup=2, memory=0.0, scaling=Scaling(min_area=0.0))


def tokens(concept: str, min_area: float | None = None) -> GuidelineTokens:
    return GuidelineTokens(torch.zeros(2, 8), concept, concept, (1,), "", min_area=min_area)


def drawing(*maps: torch.Tensor, guided=None) -> Drawing:
    maps = torch.stack(maps)[:, None]  # (steps, 1, H, W)
    guided = [False] * len(maps) if guided is None else guided
    strength = maps.flatten(1).amax(1) * 2
    image, rows = Image.new("RGB", (32, 32), (200, 10, 10)), 2 * len(maps) + sum(guided)
    return Drawing("a tomato", 3, "dag", image, 1.0, rows, (tokens("a red circle"),), maps, strength, guided)


def spot(value: float = 0.9, share: int = 2) -> torch.Tensor:
    A = torch.zeros(6, 6)
    A[:share, -share:] = value
    return A


NOTHING = torch.zeros(6, 6)
CASES = {
    "found": ((NOTHING, NOTHING, spot(), spot(0.7)), [False, False, True, True], True, 0.9, 2, None),
    "nothing": ((spot(), spot(), spot(0.3), NOTHING), None, False, 0.3, 0, "nothing found"),
    "only in the warm-up": ((spot(), spot()), None, None, None, 0, "warm-up"),
    "fills the frame": ((NOTHING, NOTHING, spot(0.9, 6)), None, True, 0.9, 0, "fills the frame"),
}


@pytest.mark.parametrize("name", CASES)
def test_findings(name):
    maps, guided, detected, map_max, steps, reason = CASES[name]
    found = drawing(*maps, guided=guided).findings(CFG)
    assert (found["detected"], found["steps_guided"], found["not_guided_reason"]) == (detected, steps, reason)
    assert found["map_max"] == (None if map_max is None else pytest.approx(map_max))


def test_what_is_remembered_from_the_warm_up_is_told():
    """Guidance acts on it, so the report must say why."""
    remembering = replace(CFG, memory=0.97)
    told = drawing(NOTHING, spot(), NOTHING, guided=[False, False, True])
    found = told.findings(remembering)
    assert found["detected"] and found["steps_guided"] == 1 and found["map_max"] == 0
    assert "found a red circle at the top right (11%), guided on 1 of 3 steps" in told.words(remembering)
    assert told.shown_map(remembering).max() == pytest.approx(0.97 * 0.9)


def test_methods_without_maps_say_nothing_of_detection():
    blind = replace(drawing(NOTHING), maps=None, strength=None)
    assert blind.findings(CFG)["detected"] is None and blind.findings(CFG)["not_guided_reason"] is None


def test_words():
    said = drawing(NOTHING, NOTHING, spot(), guided=[False, False, True]).words(CFG)
    assert said == (
        "'a tomato' (seed 3), dag: found a red circle at the top right (11%), guided on 1 of 3 steps, "
        "7 UNet rows instead of 6"
    )
    assert "nothing found, 6 UNet rows, as without" in drawing(NOTHING, NOTHING, NOTHING).words(CFG)


def test_two_concepts_are_told_apart():
    maps = torch.stack([torch.stack([NOTHING, spot()]), torch.stack([spot().flip(1), spot()])])  # (2, 2, 6, 6)
    image = Image.new("RGB", (32, 32))
    two = Drawing("p", 0, "dag", image, 1.0, 6, (tokens("a"), tokens("b")), maps, torch.ones(2), [True, True])
    found = two.findings(DAGConfig(warmup=0, scaling=Scaling(min_area=0.0)))["found"]
    assert found["a"] == {"steps": 1, "place": "top left", "share": pytest.approx(4 / 36, abs=1e-4)}
    assert found["b"] == {"steps": 2, "place": "top right", "share": pytest.approx(4 / 36, abs=1e-4)}
    two.tokens = (tokens("a"), tokens("b", min_area=0.2))  # of which there are 4 / 36
    assert set(two.findings(DAGConfig(warmup=0, scaling=Scaling(min_area=0.0)))["found"]) == {"a"}
    assert torch.equal(two.A[1], torch.maximum(spot(), spot().flip(1)))


def test_pictures_round_trip():
    image = Image.effect_noise((24, 16), 50).convert("RGB")
    (back,) = to_pil(from_pil(image))
    assert back.tobytes() == image.tobytes()


def test_overlay_shows_where():
    picture = overlay(Image.new("RGB", (48, 48), (0, 0, 255)), spot())
    high, low = picture.getpixel((44, 4)), picture.getpixel((4, 44))
    assert high[0] > high[2] and low[0] == low[1] == low[2]


def test_strip_and_sheet():
    assert strip(torch.rand(12, 6, 6), side=8).size == (80, 16)
    row = (drawing(NOTHING, spot(), spot()),)
    assert sheet([row, row], CFG).width > 2 * 192
