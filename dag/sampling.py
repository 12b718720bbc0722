"""The loop from noise to latent. It yields every step; the caller drives, saves, shows progress or stops."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ddim
from .attention import NO_ROWS, Call, Hook
from .cam import AttentionWithMaps, Probe
from .config import SIDE, STEPS
from .guidance import Guidance, Inputs
from .model import NumericsError, StableDiffusion
from .tokens import GuidelineTokens


@dataclass
class Step:
    """One denoising step of b images."""

    i: int  # counted from 0
    t: int  # timestep the step started from
    x: Tensor  # (b, 4, H, W) latent after the step
    x0: Tensor  # (b, 4, H, W) final latent as predicted at this step
    A: Tensor | None  # (b, concepts, H, W) in [0, 1], what this step's maps showed; None for methods without maps
    A_acted: Tensor | None  # (b, concepts, H, W), the maps that the method acted on; on the CPU, as S is
    S: Tensor | None  # (b, H, W) strength of guidance
    guided: Tensor  # (b,) bool
    unet_rows: Tensor  # (b,) int: rows sent through the UNet for each image


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Starts (b, *shape) from a CPU generator each: the same on every device, in any batch, with any method."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a side, in pixels, that the UNet cannot halve as often as it does."""
    if any(side < SIDE or side % SIDE for side in (height, width)):
        raise ValueError(f"height and width are {height} and {width}, expected multiples of {SIDE}")


class Denoiser:
    """The UNet in one loop of b images: tells the hooks what each call is for and counts its rows."""

    def __init__(self, sd: StableDiffusion, run: Guidance, hooks: Sequence[Hook], scale: float):
        self.sd, self.run, self.hooks, self.scale = sd, run, hooks, scale
        self.b = len(run.context) // 2
        self.unet_rows = torch.zeros(self.b, dtype=torch.int64)  # sent so far, per image

    def unet(self, call: Call, x: Tensor, context: Tensor) -> Tensor:
        """The noise estimate of one UNet call: x and the result (rows, 4, H, W).

        A UNet that predicts v tells it too: methods see eps only. Guidance in eps is guidance in v, since both are
        linear combinations with weights that sum to 1.
        """
        for hook in self.hooks:
            hook.call = call
        out = self.sd.unet(x, torch.full((len(x),), call.t, device=x.device), context, self.hooks)
        return ddim.eps_of_v(x, out, self.sd.alphas_cumprod[call.t]) if self.sd.config.prediction == "v" else out

    def pair(self, i: int, x: Tensor, t: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """eps_0 and eps_p, (b, 4, H, W) each; context: default the run's."""
        self.unet_rows += 2
        call = Call(i, t, slice(0, self.b), slice(self.b, 2 * self.b), NO_ROWS)
        eps_0, eps_p = self.unet(call, torch.cat([x, x]), self.run.context if context is None else context).chunk(2)
        return eps_0, eps_p

    def safety(self, i: int, x: Tensor, t: int, concept: int, images: list[int]) -> Tensor:
        """eps_s of a concept for some images, (images, 4, H, W)."""
        self.unet_rows[images] += 1
        call = Call(i, t, NO_ROWS, NO_ROWS, slice(0, len(images)), tuple(images), concept)
        return self.unet(call, x[images], self.run.safety_context[concept].repeat(len(images), 1, 1))

    def inputs(self, i: int, x: Tensor, t: int) -> Inputs:
        """What a method is given at latent x and timestep t."""
        eps_0, eps_p = self.pair(i, x, t)
        A = None if self.run.probe is None else self.run.probe.read(t, *x.shape[2:])
        return Inputs(
            i, t, x, self.scale, eps_0, eps_p, A, self.run.context, self.sd.alphas_cumprod[t],
            safety=lambda concept, images: self.safety(i, x, t, concept, images),
            denoise=lambda x, t, context=None: self.pair(i, x, t, context),
        )  # fmt: skip

    def look_ahead(self, i: int) -> Callable[[Tensor, int], Tensor]:
        """(x, t) -> the method's eps there, (b, 4, H, W); by a copy, so that the method's state moves once per step."""
        return lambda x, t: copy.copy(self.run)(self.inputs(i, x, t)).eps


@torch.no_grad()
def sample(
    sd: StableDiffusion,
    prompts: Sequence[str],
    guidance: Guidance,
    steps: int = STEPS,
    scale: float | None = None,
    seeds: list[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    *,
    solver: Callable[[Tensor], ddim.Solver] = ddim.solver,
    times: list[tuple[int, int]] | None = None,
    hooks: Sequence[Hook] = (),
) -> Iterator[Step]:
    """Draw one image per prompt, b in all, from seeds (default 0, 1, ...); height and width in pixels.

    Scale and size default to the model's own (SD 1.4: 7.5 and 512 x 512).
    solver: called once with alphas_cumprod, returns the function from x to the next x. times: (t, t_prev) of every
    step, from noise to picture; default DDIM's for `steps`. hooks: more hooks, asked after the method's own.

    Yields a Step for each step; the last one's x is what sd.decode takes.
    Raises, when the first step is asked for, ValueError for steps outside 1..1000, a side that is not a multiple of 64
    or seeds that are not one per prompt; NumericsError after a step that leaves no image's latent finite,
    and what guidance.start raises (TokenError, for DAG).
    """
    b, cfg = len(prompts), sd.config
    seeds = list(range(b)) if seeds is None else seeds
    if len(seeds) != b:
        raise ValueError(f"{len(seeds)} seeds for {b} prompts, expected one each")
    sides = [cfg.size if side is None else side for side in (height, width)]
    check_size(*sides)
    H, W = (side // cfg.vae.factor for side in sides)
    times = ddim.time_pairs(steps, cfg.schedule) if times is None else times
    x = noise(seeds, (cfg.unet.in_channels, H, W)).to(sd.device)  # (b, 4, H, W) float32
    run = guidance.start(sd, list(prompts))
    advance = solver(sd.alphas_cumprod)
    denoiser = Denoiser(sd, run, (*run.hooks, *sd.hooks, *hooks), cfg.scale if scale is None else scale)
    try:
        for i, (t, t_prev) in enumerate(times):
            before = denoiser.unet_rows.clone()
            step = denoiser.inputs(i, x, t)
            out = run(step)
            x, x0 = advance(x, out.eps, t, t_prev, denoiser.look_ahead(i))
            guided = torch.zeros(b, dtype=torch.bool) if out.guided is None else out.guided
            A = out.A if step.A is None else step.A
            yield Step(i, t, x, x0, A, out.A, out.S, guided, denoiser.unet_rows - before)
            if not x.isfinite().flatten(1).all(1).any():  # one bad picture does not stop its neighbours
                raise NumericsError(f"no latent is finite after step {i + 1} (t = {t}); try --dtype float32")
    finally:
        run.end()
        for hook in sd.hooks:  # outside of a loop every row is conditional, as `Hook` has it
            hook.call = Hook.call


@torch.no_grad()
def detect(
    sd: StableDiffusion,
    tokens: GuidelineTokens,
    picture: Tensor,
    times: Sequence[int],
    seed: int = 0,
    fused: AttentionWithMaps | None = None,
) -> Tensor:
    """What the tokens see in any picture (1, 3, 8H, 8W) in [-1, 1]: A at every timestep of `times`, (times, H, W).

    The picture is encoded and noised to each time, and the UNet looks at it with the empty prompt.
    Raises TokenError for tokens that the model cannot read, ValueError for a side that is not a multiple of 64.
    """
    tokens.check(sd)
    check_size(*picture.shape[2:])
    latent = sd.encode(picture)  # (1, 4, H, W)
    eps = noise([seed], latent.shape[1:]).to(latent)
    context, probe, maps = sd.text.encode([""]), Probe(sd.unet, [tokens], fused), []
    for t in times:
        x = ddim.add_noise(latent, eps, sd.alphas_cumprod[t])
        sd.unet(x, torch.tensor([t], device=sd.device), context, [probe, *sd.hooks])
        maps.append(probe.read(t, *latent.shape[2:])[0, 0])  # (H, W)
    return torch.stack(maps)  # (times, H, W)
