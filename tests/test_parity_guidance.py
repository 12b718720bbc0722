"""SLD and SEGA against diffusers' pipelines: the same random small weights, the same noise, 12 steps, final latents."""

import pytest
import torch

from dag import CFG, SEGA, SLD, ddim, sample
from dag.config import SHAPES
from dag.sampling import noise

pytest.importorskip("diffusers")
from tests.parity import Case, error, tiny  # noqa: E402
from tests.references import scheduler  # noqa: E402

PROMPTS, SEEDS, STEPS = ["a red circle on grey", "a tomato and a blue star"], [3, 4], 12


@pytest.fixture(scope="module")
def case() -> Case:
    return tiny()


def ours(sd, guidance, monkeypatch):
    times = scheduler(SHAPES, STEPS).timesteps.tolist()
    monkeypatch.setattr(ddim, "time_pairs", lambda steps, cfg: list(zip(times, [*times[1:], 0], strict=True)))
    *_, last = sample(sd, PROMPTS, guidance, STEPS, 7.5, SEEDS)
    return last.x


def pipeline(kind, case: Case):
    pipe = kind(
        vae=case.vae,
        text_encoder=case.sd.text.transformer,
        tokenizer=case.sd.text.tokenizer,
        unet=case.unet,
        scheduler=scheduler(SHAPES, STEPS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def common():
    return dict(num_inference_steps=STEPS, guidance_scale=7.5, height=128, width=128, latents=noise(SEEDS, (4, 16, 16)))


@pytest.mark.parametrize("warmup", [None, 3], ids=["own warm-up", "warm-up 3"])  # weak's own is longer than the run
@pytest.mark.parametrize("preset", SLD.PRESETS)
@torch.no_grad()
def test_sld(preset, warmup, case, monkeypatch):
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    pipe = pipeline(StableDiffusionPipelineSafe, case)
    pipe.safety_concept = "a red circle"
    p, last = SLD.PRESETS[preset], []
    p = p if warmup is None else p | {"warmup": warmup}
    pipe(
        PROMPTS,
        sld_warmup_steps=p["warmup"],
        sld_guidance_scale=p["scale"],
        sld_threshold=p["threshold"],
        sld_momentum_scale=p["momentum"],
        sld_mom_beta=p["beta"],
        callback=lambda i, t, latents: last.append(latents),
        **common(),
    )
    guidance = SLD("a red circle", **p) if warmup else SLD.preset(preset, "a red circle")
    found = error(ours(case.sd, guidance, monkeypatch), last[-1])
    assert found <= 1e-3
    if p["warmup"] < STEPS:
        assert error(ours(case.sd, CFG(), monkeypatch), last[-1]) > 5 * found


@pytest.mark.parametrize("concepts", [["a red circle"], ["a red circle", "a blue star"]])
@pytest.mark.parametrize("momentum, warmup", [(0.0, 0), (0.1, 0), (0.3, 10), (0.1, 3)])
@torch.no_grad()
def test_sega(concepts, momentum, warmup, case, monkeypatch):
    from diffusers.pipelines.deprecated.semantic_stable_diffusion import SemanticStableDiffusionPipeline

    pipe = pipeline(SemanticStableDiffusionPipeline, case)
    theirs = pipe(
        PROMPTS,
        editing_prompt=concepts,
        reverse_editing_direction=True,
        edit_guidance_scale=5.0,
        edit_warmup_steps=warmup,
        edit_threshold=0.9,
        edit_momentum_scale=momentum,
        edit_mom_beta=0.4,
        output_type="latent",
        return_dict=False,
        **common(),
    )[0]
    guidance = SEGA(*concepts, scale=5.0, warmup=warmup, momentum=momentum, beta=0.4)
    found = error(ours(case.sd, guidance, monkeypatch), theirs)
    assert found <= 1e-3  # a value at the edge of a mask may fall on either side of it
    assert error(ours(case.sd, CFG(), monkeypatch), theirs) > 5 * found
