"""SLD and SEGA against diffusers' pipelines: the same random small weights, the same noise, 12 steps, final latents."""

import pytest
import torch

from dag import CFG, SEGA, SLD, ddim, sample
from dag.sampling import noise
from tests.test_parity import error, scheduler, their_unet, their_vae  # noqa: F401

diffusers = pytest.importorskip("diffusers")

PROMPTS, SEEDS, STEPS = ["a red circle on grey", "a tomato and a blue star"], [3, 4], 12


def ours(sd, guidance, monkeypatch):
    theirs = scheduler()
    theirs.set_timesteps(STEPS)
    times = theirs.timesteps.tolist()
    monkeypatch.setattr(ddim, "time_pairs", lambda steps, cfg: list(zip(times, [*times[1:], 0], strict=True)))
    *_, last = sample(sd, PROMPTS, guidance, STEPS, 7.5, SEEDS)
    return last.x


def pipeline(kind, sd, unet, vae):
    parts = dict(vae=vae, text_encoder=sd.text.transformer, tokenizer=sd.text.tokenizer, unet=unet)
    pipe = kind(
        **parts, scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def common(sd):
    return dict(num_inference_steps=STEPS, guidance_scale=7.5, height=128, width=128, latents=noise(SEEDS, (4, 16, 16)))


@pytest.mark.parametrize("preset", SLD.PRESETS)
@torch.no_grad()
def test_sld(preset, random_model, their_unet, their_vae, monkeypatch):  # noqa: F811
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    pipe = pipeline(StableDiffusionPipelineSafe, random_model, their_unet, their_vae)
    pipe.safety_concept = "a red circle"
    p, last = SLD.PRESETS[preset], []
    pipe(
        PROMPTS,
        sld_warmup_steps=p["warmup"],
        sld_guidance_scale=p["scale"],
        sld_threshold=p["threshold"],
        sld_momentum_scale=p["momentum"],
        sld_mom_beta=p["beta"],
        callback=lambda i, t, latents: last.append(latents),
        **common(random_model),
    )
    x = ours(random_model, SLD.preset(preset, "a red circle"), monkeypatch)
    assert error(x, last[-1]) <= 1e-4
    if p["warmup"] < STEPS:  # weak's has not ended yet
        assert error(ours(random_model, CFG(), monkeypatch), last[-1]) > 1e-3


@pytest.mark.parametrize("concepts", [["a red circle"], ["a red circle", "a blue star"]])
@pytest.mark.parametrize("momentum, warmup", [(0.0, 0), (0.1, 0), (0.3, 10), (0.1, 3)])
@torch.no_grad()
def test_sega(concepts, momentum, warmup, random_model, their_unet, their_vae, monkeypatch):  # noqa: F811
    from diffusers.pipelines.deprecated.semantic_stable_diffusion import SemanticStableDiffusionPipeline

    pipe = pipeline(SemanticStableDiffusionPipeline, random_model, their_unet, their_vae)
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
        **common(random_model),
    )[0]
    guidance = SEGA(*concepts, scale=5.0, warmup=warmup, momentum=momentum, beta=0.4)
    assert error(ours(random_model, guidance, monkeypatch), theirs) <= 1e-4
    assert error(ours(random_model, CFG(), monkeypatch), theirs) > 1e-3
