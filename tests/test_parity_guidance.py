"""SLD and SEGA against diffusers' pipelines: the same random small weights, the same noise, 12 steps, final latents."""

import pytest
import torch

from dag import SEGA, SLD, Guidance, sample
from dag.config import SHAPES
from dag.sampling import noise

pytest.importorskip("diffusers")
from tests import references  # noqa: E402
from tests.measure.parity import Case, error, tiny  # noqa: E402

PROMPTS, SEEDS, STEPS = ["a red circle on grey", "a tomato and a blue star"], [3, 4], 12


@pytest.fixture(scope="module")
def case() -> Case:
    return tiny()


def distance(case: Case, guidance: Guidance, theirs: torch.Tensor) -> float:
    """Of our final latents, drawn at diffusers' times, from theirs."""
    times = references.scheduler(SHAPES, STEPS).timesteps.tolist()
    pairs = list(zip(times, [*times[1:], 0], strict=True))
    *_, last = sample(case.sd, PROMPTS, guidance, scale=7.5, seeds=SEEDS, times=pairs)
    return error(last.x, theirs)


def pipeline(kind: type, case: Case):
    return references.pipeline(kind, case.sd.text, case.unet, case.vae, STEPS, SHAPES)


def common():
    return dict(num_inference_steps=STEPS, guidance_scale=7.5, height=128, width=128, latents=noise(SEEDS, (4, 16, 16)))


@pytest.mark.parametrize("warmup", [None, 3], ids=["own warm-up", "warm-up 3"])  # weak's own is longer than the run
@pytest.mark.parametrize("preset", SLD.PRESETS)
@torch.no_grad()
def test_sld(preset, warmup, case):
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    pipe = pipeline(StableDiffusionPipelineSafe, case)
    assert pipe.safety_concept == SLD.SAFETY_TEXT
    pipe.safety_concept = "a red circle"
    p, last = SLD.PRESETS[preset], []
    p = p if warmup is None else p | {"warmup": warmup}
    pipe(
        PROMPTS, sld_warmup_steps=p["warmup"], sld_guidance_scale=p["scale"], sld_threshold=p["threshold"],
        sld_momentum_scale=p["momentum"], sld_mom_beta=p["beta"], callback=lambda i, t, x: last.append(x), **common(),
    )  # fmt: skip
    guidance = SLD("a red circle", **p) if warmup else SLD.preset(preset, "a red circle")
    found = distance(case, guidance, last[-1])
    assert found <= 1e-3
    if p["warmup"] < STEPS:
        assert distance(case, Guidance(), last[-1]) > 5 * found


@pytest.mark.parametrize("concepts", [["a red circle"], ["a red circle", "a blue star"]])
@pytest.mark.parametrize("momentum, warmup", [(0.0, 0), (0.1, 0), (0.3, 10), (0.1, 3)])
@torch.no_grad()
def test_sega(concepts, momentum, warmup, case):
    from diffusers.pipelines.deprecated.semantic_stable_diffusion import SemanticStableDiffusionPipeline

    (theirs, _) = pipeline(SemanticStableDiffusionPipeline, case)(
        PROMPTS, editing_prompt=concepts, reverse_editing_direction=True, edit_guidance_scale=5.0,
        edit_warmup_steps=warmup, edit_threshold=0.9, edit_momentum_scale=momentum, edit_mom_beta=0.4,
        output_type="latent", return_dict=False, **common(),
    )  # fmt: skip
    guidance = SEGA(*concepts, scale=5.0, warmup=warmup, momentum=momentum, beta=0.4)
    found = distance(case, guidance, theirs)
    assert found <= 1e-3  # a value at the edge of a mask may fall on either side of it
    assert distance(case, Guidance(), theirs) > 5 * found
