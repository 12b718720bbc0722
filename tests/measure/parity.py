"""How far we are from other implementations, on the same random weights, as a table.

  python -m tests.measure.parity           the miniature's widths, seconds
  python -m tests.measure.parity --full    full widths, minutes and 10 GB of memory

--model sd21 or sd21-v takes SD 2.1's UNet, text tower and prediction instead of SD 1.4's.

open_clip is used if it can be imported. An error is the largest difference, relative to the reference's largest value.
bfloat16's is our root mean square distance from float32 over diffusers'.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dag import Guidance, ddim, sample
from dag.config import SD14, SD21, SD21_V, SHAPES
from dag.model import StableDiffusion
from dag.unet import timestep_embedding
from tests import references

SIZES = ((1, 512, 512), (3, 448, 640), (1, 768, 512))  # images, width and height in pixels, of the full model
PROMPTS = ("a red circle on grey", "")


@dataclass
class Row:
    what: str
    error: float
    limit: float = 2e-5


@dataclass
class Case:
    """A model, the references that share its weights, and sizes (b, H, W) of latents to try them on."""

    sd: StableDiffusion
    sizes: list[tuple[int, int, int]]

    def __post_init__(self):
        self.unet, self.vae = references.diffusers_unet(self.sd), references.diffusers_vae(self.sd)


MODELS = {"sd14": SD14, "sd21": SD21, "sd21-v": SD21_V}


def tiny(model: str = "sd14") -> Case:
    """The miniature's widths, and what else is of the model."""
    cfg, own = SHAPES, MODELS[model]
    if model != "sd14":
        unet = replace(cfg.unet, num_heads=None, head_channels=16, linear=own.unet.linear)
        text = replace(cfg.text, act=own.text.act, pad=own.text.pad)
        cfg = replace(cfg, unet=unet, text=text, prediction=own.prediction)
    return Case(references.random_model(cfg), [(1, 16, 16), (3, 24, 16), (1, 16, 24)])


def full(model: str = "sd14") -> Case:
    sizes = [(b, height // 8, width // 8) for b, width, height in SIZES]
    return Case(references.random_model(MODELS[model]), sizes)


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert theirs.isfinite().all() and theirs.abs().max() > 0
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compared(what: str, ours: Tensor, theirs: Tensor) -> Row:
    return Row(what, error(ours, theirs))


def inputs(case: Case, b: int, H: int, W: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (b, 4, H, W), t (b,), context (b, m, c_text)."""
    cfg = case.sd.config
    generator = torch.Generator().manual_seed(b * H * W)
    x = torch.randn(b, 4, H, W, generator=generator)
    context = torch.randn(b, cfg.text.max_length, cfg.text.hidden_size, generator=generator)
    return x, torch.tensor([981, 501, 1])[:b], context


def at(b: int, H: int, W: int) -> str:
    return f"{b} of {8 * W} x {8 * H}"


def small(*shape: int) -> Tensor:
    return 0.01 * torch.randn(shape)


def unet(case: Case) -> Iterator[Row]:
    for b, H, W in case.sizes:
        x, t, context = inputs(case, b, H, W)
        yield compared(f"UNet, {at(b, H, W)}", case.sd.unet(x, t, context), case.unet(x, t, context).sample)


def unet_blocks(case: Case) -> Iterator[Row]:
    """One of each kind, beside the one at the same place in diffusers, on features so small that epsilons show."""
    ours, theirs, c = case.sd.unet, case.unet, case.sd.config.unet.model_channels
    b, H, W = case.sizes[0]
    _, t, context = inputs(case, b, H, W)
    emb = theirs.time_embedding(theirs.time_proj(t))
    yield compared("UNet: time embedding", ours.time_embed(timestep_embedding(t, c)), emb)
    x, y = small(b, c, H, W), small(b, 2 * c, H // 2, W // 2)  # features of levels 0 and 1
    first, second = ours.input_blocks[1], ours.input_blocks[4]
    down0, down1, up0 = *theirs.down_blocks[:2], theirs.up_blocks[0]
    yield compared("UNet: ResBlock", first[0](x, emb), down0.resnets[0](x, emb))
    z = small(b, c, H // 2, W // 2)
    yield compared("UNet: ResBlock that widens", second[0](z, emb), down1.resnets[0](z, emb))
    for level, block, attention, z in ((0, first[1], down0.attentions[0], x), (1, second[1], down1.attentions[0], y)):
        yield compared(f"UNet: SpatialTransformer, level {level}", block(z, context), attention(z, context).sample)
    inner, outer = first[1].transformer_blocks[0], down0.attentions[0].transformer_blocks[0]
    tokens = small(b, H * W, c)
    yield compared("UNet: self-attention", inner.attn1(tokens), outer.attn1(tokens))
    yield compared("UNet: cross-attention", inner.attn2(tokens, context), outer.attn2(tokens, context))
    yield compared("UNet: feed-forward", inner.ff(tokens), outer.ff(tokens))
    yield compared("UNet: Downsample", ours.input_blocks[3][0](x), down0.downsamplers[0](x))
    z = small(b, 4 * c, H // 8, W // 8)
    yield compared("UNet: Upsample", ours.output_blocks[2][1](z), up0.upsamplers[0](z))
    z = small(b, 8 * c, H // 8, W // 8)  # a feature map beside its skip
    yield compared("UNet: ResBlock that narrows", ours.output_blocks[0][0](z, emb), up0.resnets[0](z, emb))


def vae(case: Case) -> Iterator[Row]:
    for b, H, W in case.sizes:
        generator = torch.Generator().manual_seed(b * H * W)
        image = torch.rand(b, 3, 8 * H, 8 * W, generator=generator) * 2 - 1
        mean, logvar = case.sd.vae.encode(image)
        posterior = case.vae.encode(image).latent_dist
        yield compared(f"VAE encode, mean, {at(b, H, W)}", mean, posterior.mean)
        yield compared(f"VAE encode, log variance, {at(b, H, W)}", logvar, posterior.logvar)
        z = torch.randn(b, 4, H, W, generator=generator)
        yield compared(f"VAE decode, {at(b, H, W)}", case.sd.vae.decode(z), case.vae.decode(z).sample)


def vae_blocks(case: Case) -> Iterator[Row]:
    ours, theirs, cfg = case.sd.vae, case.vae, case.sd.config.vae
    b, H, W = case.sizes[0]
    x = small(b, cfg.ch * cfg.ch_mult[-1], H, W)
    mid, reference = ours.decoder.mid, theirs.decoder.mid_block
    yield compared("VAE: ResnetBlock", mid.block_1(x), reference.resnets[0](x, None))
    yield compared("VAE: AttnBlock", mid.attn_1(x), reference.attentions[0](x))
    yield compared("VAE: Upsample", ours.decoder.up[-1].upsample(x), theirs.decoder.up_blocks[0].upsamplers[0](x))
    x = small(b, cfg.ch, 2 * H, 2 * W)
    reference = theirs.encoder.down_blocks[0].downsamplers[0](x)
    yield compared("VAE: Downsample (pads right and bottom)", ours.encoder.down[0].downsample(x), reference)
    reference = theirs.encoder.down_blocks[1].resnets[0](x, None)
    yield compared("VAE: ResnetBlock that widens", ours.encoder.down[1].block[0](x), reference)


def text(case: Case) -> Iterator[Row]:
    sd, cfg = case.sd, case.sd.config.text
    ids = sd.text.tokenize([*PROMPTS, "a yellow star " * 40])
    ids = torch.cat([ids, torch.randint(cfg.vocab_size, (3, cfg.max_length))])
    towers = {"torch.nn.TransformerEncoderLayer": references.torch_text(sd), "open_clip": references.open_clip_text(sd)}
    for name, tower in towers.items():
        if tower is not None:
            yield Row(f"text, {len(ids)} prompts, against {name}", error(sd.text(ids), tower(ids)), 1e-5)


def steps(case: Case) -> Iterator[Row]:
    """The pure step at diffusers' times, the last one included."""
    cfg, abar = case.sd.config, ddim.alphas_cumprod(case.sd.config.schedule)
    for n in (7, 20, 25, 30, 50):
        theirs, worst = references.scheduler(replace(cfg, prediction="eps"), n), 0.0
        for t in theirs.timesteps.tolist():
            x, eps = torch.randn(2, 2, 4, 8, 8)
            ours, x0 = ddim.step(x, eps, abar[t], abar[max(t - 1000 // n, 0)])
            reference = theirs.step(eps, t, x)
            worst = max(worst, error(ours, reference.prev_sample), error(x0, reference.pred_original_sample))
        yield Row(f"DDIM, each of {n} steps", worst)


def latents(case: Case) -> Iterator[Row]:
    """Classifier-free guidance from the same noise, 10 steps; diffusers combines what the UNet predicts, eps or v."""
    cfg, scale, seeds = case.sd.config, 7.5, [3]
    H = W = cfg.size // cfg.vae.factor
    *_, last = sample(case.sd, list(PROMPTS[:1]), Guidance(), steps=10, scale=scale, seeds=seeds)
    x = torch.stack([torch.randn(4, H, W, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    context, theirs = case.sd.text.encode(["", PROMPTS[0]]), references.scheduler(cfg, 10)
    for t in theirs.timesteps:
        uncond, cond = case.unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = theirs.step(uncond + scale * (cond - uncond), t, x).prev_sample
    yield Row(f"latents after 10 steps, scale {scale}, {at(1, H, W)}", error(last.x, x), 1e-3)


def bfloat16(case: Case) -> Iterator[Row]:
    """Our distance from float32 over diffusers'. Root mean squares: largest values differ by 20 % between inputs."""
    x, t, context = inputs(case, *case.sizes[0])
    half = torch.bfloat16

    def in_half(module):
        return copy.deepcopy(module).to(half)

    def ratio(exact: Tensor, ours: Tensor, theirs: Tensor) -> float:
        found, reference = ((x.float() - exact).square().mean() for x in (ours, theirs))
        return (found / reference).sqrt().item()

    unets = in_half(case.sd.unet)(x, t, context), in_half(case.unet)(x.to(half), t, context.to(half)).sample
    found = ratio(case.sd.unet(x, t, context), *unets)
    yield Row("UNet in bfloat16: distance from float32, over diffusers'", found, 1.2)
    pictures = in_half(case.sd.vae).decode(x.to(half)), in_half(case.vae).decode(x.to(half)).sample
    yield Row("VAE decode in bfloat16: the same", ratio(case.sd.vae.decode(x), *pictures), 1.2)


GROUPS = (unet, unet_blocks, vae, vae_blocks, text, steps, latents, bfloat16)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--model", choices=MODELS, default="sd14")
    parser.add_argument("--only", nargs="*", default=[group.__name__ for group in GROUPS])
    args = parser.parse_args(argv)
    case, worst = full(args.model) if args.full else tiny(args.model), 0.0
    print("| what | error | limit |\n|---|---|---|")
    for group in GROUPS:
        if group.__name__ in args.only:
            torch.manual_seed(0)
            for row in group(case):
                print(f"| {row.what} | {row.error:.2g} | {row.limit:g} |", flush=True)
                worst = max(worst, row.error / row.limit)
    return int(not worst <= 1)


if __name__ == "__main__":
    sys.exit(main())
