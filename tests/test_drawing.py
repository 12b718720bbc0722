"""What is said of a picture, and how maps and sheets look."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from dag.cli.pictures import from_pil, overlay, strip, to_pil
from dag.cli.report import Drawing, drawings, sheet
from dag.config import DAGConfig, Scaling
from dag.guidance import Estimate, Guidance, remember
from dag.sampling import sample
from dag.tokens import GuidelineTokens, Reading

CFG = DAGConfig(warmup=2, memory=0.0, scaling=Scaling(min_area=0.0))


def tokens(concept: str, min_area: float | None = None) -> GuidelineTokens:
    return GuidelineTokens(torch.zeros(2, 8), concept, concept, Reading((1,)), "", min_area=min_area)


def drawing(*maps: torch.Tensor, guided=None, cfg=CFG, concepts=("a red circle",)) -> Drawing:
    """Steps with these maps (H, W), or (concepts, H, W); acted on is what they give with the memory of cfg."""
    A = torch.stack(maps)  # (steps, H, W) or (steps, concepts, H, W)
    A = A[:, None] if A.ndim == 3 else A
    acted = [torch.zeros(())]
    for own in A:
        acted.append(remember(own[None], acted[-1], cfg, [cfg.scaling] * len(own))[0])
    guided = [False] * len(A) if guided is None else guided
    image, rows = Image.new("RGB", (32, 32), (200, 10, 10)), 2 * len(A) + sum(guided)
    known = tuple(tokens(c) for c in concepts)
    acted, S = torch.stack(acted[1:]), 2 * A.amax(1)
    return Drawing("a tomato", 3, "dag", image, 1.0, rows, cfg, known, A, acted, S, guided)


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
    found = drawing(*maps, guided=guided).findings
    assert (found["detected"], found["steps_guided"], found["not_guided_reason"]) == (detected, steps, reason)
    assert found["map_max"] == (None if map_max is None else pytest.approx(map_max))


def test_what_is_remembered_from_the_warm_up_is_told():
    """Guidance acts on it, so the report must say why."""
    told = drawing(NOTHING, spot(), NOTHING, guided=[False, False, True], cfg=replace(CFG, memory=0.97))
    found = told.findings
    assert found["detected"] and found["steps_guided"] == 1 and found["map_max"] == 0
    assert "found a red circle at the top right (11%), guided on 1 of 3 steps" in told.words
    assert told.shown_map.max() == pytest.approx(0.97 * 0.9)


def test_methods_without_maps_say_nothing_of_detection():
    blind = replace(drawing(NOTHING), A=None, A_acted=None, S=None)
    assert blind.findings["detected"] is None and blind.findings["not_guided_reason"] is None


def test_words():
    said = drawing(NOTHING, NOTHING, spot(), guided=[False, False, True]).words
    assert said == (
        "'a tomato' (seed 3), dag: found a red circle at the top right (11%), guided on 1 of 3 steps, "
        "7 UNet rows instead of 6"
    )
    assert "nothing found, 6 UNet rows, as without" in drawing(NOTHING, NOTHING, NOTHING).words


def test_objects_are_looked_for_once_a_picture(monkeypatch):
    from dag.cli import report

    calls, real = [], report.objects
    monkeypatch.setattr(report, "objects", lambda *args: calls.append(1) or real(*args))
    told = drawing(NOTHING, NOTHING, spot(), guided=[False, False, True])
    assert told.findings["detected"]
    once = len(calls)
    assert told.words and sheet([(told,)]) and told.findings and len(calls) == once > 0


def test_two_concepts_are_told_apart():
    maps = torch.stack([NOTHING, spot()]), torch.stack([spot().flip(1), spot()])  # (2, 6, 6) per step
    cfg = DAGConfig(warmup=0, scaling=Scaling(min_area=0.0))
    two = drawing(*maps, guided=[True, True], cfg=cfg, concepts=("a", "b"))
    found = two.findings["found"]
    assert found["a"] == {"steps": 1, "place": "top left", "share": pytest.approx(4 / 36, abs=1e-4)}
    assert found["b"] == {"steps": 2, "place": "top right", "share": pytest.approx(4 / 36, abs=1e-4)}
    larger = replace(two, tokens=(tokens("a"), tokens("b", min_area=0.2)))  # of which there are 4 / 36
    assert set(larger.findings["found"]) == {"a"}


def test_the_report_reads_the_constants_of_the_method(random_model):
    """DAG(cfg=...) is reported with that cfg, not with the model's."""
    from dag import DAG

    text = GuidelineTokens.from_text(random_model, "a red circle", "a red circle")
    method = DAG(replace(text, levels=(500,), lo=(0.0,), hi=(1.0,)), cfg=DAGConfig(warmup=1))
    (drawn,) = drawings(random_model, [("a", 0)], "dag", method, list(sample(random_model, ["a"], method, 3)), 1.0)
    assert drawn.cfg.warmup == 1 and len(drawn.late) == 2


def test_maps_without_strength_and_strength_without_maps_are_drawn(random_model):
    """A method of one's own may give either: both reach the report and the sheet."""

    class OnlyA(Guidance):
        def __call__(self, step):
            return Estimate(step.cfg_eps, A=torch.zeros(len(step.x), 1, *step.x.shape[2:]))

    class OnlyS(Guidance):
        def __call__(self, step):
            S = torch.zeros(len(step.x), *step.x.shape[2:])
            S[:, 3:5] = 1.5 * (step.i + 1)
            return Estimate(step.cfg_eps, S=S, guided=torch.ones(len(step.x), dtype=torch.bool))

    for method, strength in ((OnlyA(), None), (OnlyS(), 3.0)):
        steps = list(sample(random_model, ["a"], method, 2))
        (drawn,) = drawings(random_model, [("a", 0)], "own", method, steps, 1.0)
        drawn = replace(drawn, cfg=replace(drawn.cfg, warmup=0))
        assert drawn.findings["scale_max"] == strength and drawn.findings["found"] == {}
        assert drawn.shown_map.shape == (16, 16) and drawn.shown_map.max() == (1.0 if strength else 0.0)
        assert "own: " in drawn.words and sheet([(drawn,)]).width > 2 * 192


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
    assert sheet([row, row]).width > 2 * 192
