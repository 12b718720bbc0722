"""Parity with diffusers and transformers on random small weights. Needs the `parity` extra; skipped without it."""

import pytest
import torch

from dag import CFG, ddim, sample
from dag.config import SD14, SHAPES
from dag.model import UNET, VAE

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_utils as convert  # noqa: E402


def unet_config(cfg) -> dict:
    widths = tuple(cfg.unet.model_channels * m for m in cfg.unet.channel_mult)
    return dict(
        sample_size=cfg.size // cfg.vae.factor,
        block_out_channels=widths,
        layers_per_block=cfg.unet.num_res_blocks,
        attention_head_dim=cfg.unet.num_heads,
        cross_attention_dim=cfg.unet.context_dim,
        norm_num_groups=cfg.unet.num_groups,
    )


def vae_config(cfg) -> dict:
    n = len(cfg.vae.ch_mult)
    return dict(
        block_out_channels=tuple(cfg.vae.ch * m for m in cfg.vae.ch_mult),
        layers_per_block=cfg.vae.num_res_blocks,
        latent_channels=cfg.vae.z_channels,
        norm_num_groups=cfg.vae.num_groups,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
    )


@pytest.fixture(scope="module")
def their_unet(random_model):
    model = diffusers.UNet2DConditionModel(**unet_config(SHAPES))
    ours = {UNET + k: v.clone() for k, v in random_model.unet.state_dict().items()}
    model.load_state_dict(convert.convert_ldm_unet_checkpoint(ours, dict(model.config)), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def their_vae(random_model):
    model = diffusers.AutoencoderKL(**vae_config(SHAPES))
    ours = {VAE + k: v.clone() for k, v in random_model.vae.state_dict().items()}
    model.load_state_dict(convert.convert_ldm_vae_checkpoint(ours, dict(model.config)), strict=True)
    return model.eval()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the reference's largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("b, H, W", [(1, 16, 16), (3, 24, 16), (2, 8, 32)])
@torch.no_grad()
def test_unet(random_model, their_unet, b, H, W):
    x, context = torch.randn(b, 4, H, W), torch.randn(b, 24, 128)
    t = torch.tensor([981, 501, 1])[:b]
    assert error(random_model.unet(x, t, context), their_unet(x, t, context).sample) <= 1e-5


@torch.no_grad()
def test_vae(random_model, their_vae):
    image = torch.rand(2, 3, 128, 64) * 2 - 1
    mean, logvar = random_model.vae.encode(image)
    posterior = their_vae.encode(image).latent_dist
    assert error(mean, posterior.mean) <= 1e-5
    assert error(logvar, posterior.logvar) <= 1e-5
    z = torch.randn(2, 4, 16, 8)
    assert error(random_model.vae.decode(z), their_vae.decode(z).sample) <= 1e-5


def scheduler() -> "diffusers.DDIMScheduler":
    cfg = SD14.schedule
    return diffusers.DDIMScheduler(
        beta_start=cfg.beta_start,
        beta_end=cfg.beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=cfg.offset,
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 50, 100, 200, 250, 500])
def test_times_where_steps_divide(steps):
    theirs = scheduler()
    theirs.set_timesteps(steps)
    assert [t for t, _ in ddim.time_pairs(steps, SD14.schedule)] == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [7, 20, 25, 30, 50])
def test_step(steps):
    """The pure step on their times, the last one included."""
    theirs = scheduler()
    theirs.set_timesteps(steps)
    abar = ddim.alphas_cumprod(SD14.schedule)
    for t in theirs.timesteps.tolist():
        x, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        ours, x0 = ddim.step(x, eps, abar[t], abar[max(t - 1000 // steps, 0)])
        reference = theirs.step(eps, t, x)
        assert error(ours, reference.prev_sample) <= 1e-5
        assert error(x0, reference.pred_original_sample) <= 1e-5


@torch.no_grad()
def test_ten_step_loop(random_model, their_unet):
    """Classifier-free guidance from the same noise, 10 steps."""
    prompts = ["a red circle on grey", ""]
    *_, last = sample(random_model, prompts, CFG(), steps=10, scale=7.5, seeds=[3, 4])
    theirs = scheduler()
    theirs.set_timesteps(10)
    x = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    context = random_model.text.encode(["", "", *prompts])
    for t in theirs.timesteps:
        eps_0, eps_p = their_unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = theirs.step(eps_0 + 7.5 * (eps_p - eps_0), t, x).prev_sample
    assert error(last.x, x) <= 1e-4


@torch.no_grad()
def test_text_is_clip(random_model):
    """Our wrapper against a CLIPTextModel loaded from files the way transformers does it."""
    from transformers import CLIPTextModel

    config = random_model.text.transformer.config
    reference = CLIPTextModel(config)
    reference.load_state_dict(random_model.text.transformer.state_dict())
    ids = random_model.text.tokenize(["a red circle", ""])
    assert (
        error(random_model.text.encode(["a red circle", ""]), reference.eval()(input_ids=ids).last_hidden_state) <= 1e-5
    )
