"""The loop from noise to latent. It yields every step; the caller drives, saves, shows progress or stops.

Rows of the batch a step sends through the UNet: b unconditional, then b conditional (UNCOND, COND below); the safety
branch, if a method asks for it, is a call of its own with the images it asks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ddim
from .cam import Probe
from .guidance import CFG
from .model import NumericsError, StableDiffusion
from .tokens import GuidelineTokens

UNCOND, COND = 0, 1  # order of the halves of the guidance batch


@dataclass
class Step:
    """One denoising step of b images."""

    i: int  # counted from 0
    t: int  # timestep the step started from
    x: Tensor  # (b, 4, H, W) latent after the step
    x0: Tensor  # (b, 4, H, W) final latent as predicted at this step
    A: Tensor | None  # (b, H, W) detection map in [0, 1], the largest of all concepts'; None for methods without maps
    concepts: Tensor | None  # (b, concepts, H, W) the concepts' own detection maps
    S: Tensor | None  # (b, H, W) strength of guidance
    guided: Tensor  # (b,) bool
    rows: Tensor  # (b,) int: rows sent through the UNet for each image


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Start of each image from its own CPU generator: the same on every device, in any batch, with any method."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a side, in pixels, that the UNet cannot halve as often as it does."""
    if any(side < 64 or side % 64 for side in (height, width)):
        raise ValueError(f"height and width are {height} and {width}, expected multiples of 64")


@torch.no_grad()
def sample(
    sd: StableDiffusion,
    prompts: list[str],
    guidance: CFG,
    steps: int = 50,
    scale: float | None = None,
    seeds: list[int] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Iterator[Step]:
    """Draw one image a prompt, b in all, from seeds (default 0, 1, ...); height and width in pixels.

    Scale and size default to the model's own (SD 1.4: 7.5 and 512 x 512).

    Yields a Step for each of `steps` DDIM steps; the last one's x is what sd.decode takes.
    Raises ValueError for steps outside 1..1000 or a side that is not a multiple of 64, and NumericsError when a latent
    is no longer finite.
    """
    b, cfg = len(prompts), sd.config
    seeds = list(range(b)) if seeds is None else seeds
    scale = cfg.scale if scale is None else scale
    if len(seeds) != b:
        raise ValueError(f"{len(seeds)} seeds for {b} prompts, expected one each")
    sides = [cfg.size if side is None else side for side in (height, width)]
    check_size(*sides)
    H, W = (side // cfg.vae.factor for side in sides)
    pairs = ddim.time_pairs(steps, cfg.schedule)
    x = noise(seeds, (cfg.unet.in_channels, H, W)).to(sd.device)  # (b, 4, H, W) float32
    context = sd.text.encode([guidance.uncond_text] * b + list(prompts))  # (2b, m, c_text): UNCOND, COND
    safety = sd.text.encode(list(guidance.safety_texts)) if guidance.safety_texts else None  # (concepts, m, c_text)
    probe = guidance.start(sd, slice(COND * b, (COND + 1) * b))

    for i, (t, t_prev) in enumerate(pairs):
        rows = torch.full((b,), 2)
        times = torch.full((2 * b,), t, device=sd.device)
        both = sd.unet(torch.cat([x, x]), times, context, probe).chunk(2)  # (b, 4, H, W) each

        def safety_eps(concept: int, images: list[int], x=x, times=times, rows=rows) -> Tensor:  # bound to this step
            rows[images] += 1
            return sd.unet(x[images], times[images], safety[concept].expand(len(images), -1, -1))

        e = guidance(i, t, both[UNCOND], both[COND], scale, safety_eps)
        x, x0 = ddim.step(x, e.eps, sd.alphas_cumprod[t], sd.alphas_cumprod[t_prev])
        if not x.isfinite().all():
            raise NumericsError(
                f"the latent is not finite after step {i + 1} of {steps} (t = {t}); try --dtype float32"
            )
        yield Step(i, t, x, x0, None if e.A is None else e.A.amax(1), e.A, e.S, e.guided, rows)


@torch.no_grad()
def detect(
    sd: StableDiffusion,
    tokens: GuidelineTokens,
    picture: Tensor,
    times: list[int],
    seed: int = 0,
    attention: str = "auto",
) -> Tensor:
    """What the tokens see in any picture (1, 3, 8H, 8W) in [-1, 1]: A at every timestep of `times`, (levels, H, W).

    The picture is encoded and noised to each time, and the UNet looks at it with the empty prompt.
    Raises TokenError for tokens that the model cannot read, ValueError for a side that is not a multiple of 64.
    """
    tokens.check(sd)
    check_size(*picture.shape[2:])
    latent = sd.encode(picture)  # (1, 4, H, W)
    eps = noise([seed], latent.shape[1:]).to(latent)
    context, maps = sd.text.encode([""]), []
    probe = Probe(sd.unet, [tokens.embedding], tokens.factors, attention=attention)
    for t in times:
        sd.unet(ddim.add_noise(latent, eps, sd.alphas_cumprod[t]), torch.tensor([t], device=sd.device), context, probe)
        (a,) = probe.maps(*latent.shape[2:])  # (1, K, H, W)
        maps.append(tokens.detect(a, t)[0])
    return torch.stack(maps)  # (levels, H, W)
