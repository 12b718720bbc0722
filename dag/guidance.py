"""Guidance methods: how the noise estimates of one step are combined.

    Guidance   eps_0 + s_g (eps_p - eps_0)                             classifier-free guidance, the base of all
    DAG        eps_0 + s_g [(eps_p - eps_0) - S M (eps_s - eps_0)]     S from where the tokens see the concept

Letters: eps_0, eps_p, eps_s are the estimates for the empty prompt, the prompt and the safety text; s_g is the guidance
scale, A the detection map, S the strength, M the mask. Everything here is float32 arithmetic on (b, 4, H, W).
The methods that DAG is compared with are in evaluation/baselines.py, written against the same interface.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ddim
from .attention import Hook
from .cam import AttentionWithMaps, Probe
from .config import DAGConfig, Scaling
from .scalers import objects, scale_map
from .tokens import GuidelineTokens

# A (b, concepts, H, W) and each concept's constants -> S (b, concepts, H, W), both on the CPU
Scaler = Callable[[Tensor, list[Scaling]], Tensor]


@dataclass
class Inputs:
    """Everything a method may use at one step of b images. `safety` and `denoise` cost nothing unless called."""

    i: int  # step, from 0
    t: int  # timestep
    x: Tensor  # (b, 4, H, W) latent before the step
    s_g: float  # guidance scale
    eps_0: Tensor  # (b, 4, H, W)
    eps_p: Tensor  # (b, 4, H, W)
    A: Tensor | None  # (b, concepts, H, W) in [0, 1], what this step's probe saw; None without a probe
    context: Tensor  # (2b, m, c_text): the rows of eps_0, then those of eps_p
    abar_t: Tensor  # () of the noise schedule
    # safety(concept, images) -> eps_s of that concept for those images, (images, 4, H, W); one UNet row each
    safety: Callable[[int, list[int]], Tensor]
    # denoise(x, t, context=None) -> eps_0 and eps_p at another latent, time or context; two UNet rows per image.
    # Differentiable in x and context under torch.enable_grad().
    denoise: Callable[..., tuple[Tensor, Tensor]]

    @property
    def cfg_eps(self) -> Tensor:
        """The estimate of classifier-free guidance, (b, 4, H, W)."""
        return self.eps_0 + self.s_g * (self.eps_p - self.eps_0)

    def x0(self, eps: Tensor | None = None) -> Tensor:
        """The final latent as eps (default: plain guidance) predicts it, (b, 4, H, W)."""
        return ddim.predict_x0(self.x, self.cfg_eps if eps is None else eps, self.abar_t)


@dataclass
class Estimate:
    """What a method makes of one step."""

    eps: Tensor  # (b, 4, H, W)
    A: Tensor | None = None  # (b, concepts, H, W) in [0, 1], the maps it acted on (DAG's memory is in them), on the CPU
    S: Tensor | None = None  # (b, H, W) strength, on the CPU
    guided: Tensor | None = None  # (b,) bool: images that this step pushes away from something; None: no image


class Guidance:
    """The base of all methods; itself classifier-free guidance: eps = eps_0 + s_g (eps_p - eps_0).

    A method object holds constants and serves any number of loops. `start` gives each loop a copy of its own, and that
    copy holds what changes from step to step. A subclass overrides what it needs: `embed` to change the context,
    `start` to bring hooks, a probe and its state, `__call__` for the arithmetic, `end` to let go of things.
    Assign new state (self.nu = ...), never modify it in place: a solver that looks ahead calls a shallow copy.
    """

    uncond_text: str = ""  # what eps_0 is the estimate for
    safety_texts: tuple[str, ...] = ()  # one per concept
    tokens: tuple[GuidelineTokens, ...] = ()  # of the concepts that are looked for
    cfg: DAGConfig | None = None  # constants of what it does with maps; None: the model's
    hooks: tuple[Hook, ...] = ()  # for every UNet call of a loop
    probe: Probe | None = None  # the hook that A is read from

    def embed(self, sd, prompts: list[str]) -> Tensor:
        """The context (2b, m, c_text): the rows of eps_0, then those of eps_p."""
        return sd.text.encode([self.uncond_text] * len(prompts) + prompts)

    def start(self, sd, prompts: list[str]) -> "Guidance":
        """A copy for one loop, with its context, the safety texts' context, and nothing remembered."""
        run = copy.copy(self)
        run.context = run.embed(sd, prompts)  # (2b, m, c_text)
        run.safety_context = (
            sd.text.encode(list(run.safety_texts)) if run.safety_texts else None
        )  # (concepts, m, c_text)
        return run

    def __call__(self, step: Inputs) -> Estimate:
        """One step; the loop calls it once per step, in order."""
        return Estimate(step.cfg_eps)

    def end(self) -> None:
        """Called on the loop's copy when its loop ends, however it ends."""


class DAG(Guidance):
    """Detect-and-Guide: where the tokens see the concept, push away from the safety text (paper Eq. 4, Table 1).

    eps = eps_0 + s_g [(eps_p - eps_0) - S M_base (eps_s - eps_0)]

    S is 0 where A < edit, so that S M_base is the paper's S M with M = 1[A >= edit] M_base.
    base "sega": M_base is 1 where |eps_s - eps_0| is in its `top` share per channel over the frame.
    base "sld": M_base = 1[eps_p - eps_s < threshold].
    base "none": M_base = 1.
    Several concepts have a map, a strength and a safety text each; at every pixel the one with the largest S acts, of
    equal ones that with the larger A.
    The safety estimate is asked for only for images with S != 0 after warm-up; the others are plain guidance, bit for
    bit. There is no momentum: with it, what is not detected would change too. But what was found can be remembered
    (ours; cfg.memory, `remember`). Without it a half-changed object is no longer found and the prompt pulls it back.

    safety_text: instead of the tokens' own. cfg: its constants; default the model's (the paper's for SD 1.4).
    scaler: another strength, from A. fused: the kernel (kernels/choice.py), None for plain PyTorch.
    Raises ValueError for an unknown base, constants out of range, tokens of different models, with different readings
    or of one concept twice, and at the start TokenError for tokens that the model cannot read.
    """

    def __init__(
        self,
        *tokens: GuidelineTokens,
        safety_text: str | None = None,
        base: str = "sega",
        cfg: DAGConfig | None = None,
        scaler: Scaler = scale_map,
        fused: AttentionWithMaps | None = None,
    ):
        if base not in ("sega", "sld", "none"):
            raise ValueError(f"mask base is '{base}', expected sega, sld or none")
        if cfg is not None:
            shares = {"top": cfg.top, "threshold": cfg.threshold, "memory": cfg.memory}
            scaling = cfg.scaling
            check_constants(cfg.warmup, **shares, edit=scaling.edit, unsafe=scaling.unsafe, min_area=scaling.min_area)
            for name in ("edit", "full", "area_gain", "magnitude", "s_max"):  # T divides by edit
                value = getattr(scaling, name)
                if value is not None and not 1e-6 <= value <= 1e6:  # beyond, S would leave the range of float32
                    raise ValueError(f"{name} is {value}, expected a number from 1e-6 to 1e6")
        if not tokens:
            raise ValueError("DAG was given no guideline tokens, expected one set per concept")
        if len({one.reading for one in tokens}) != 1:
            raise ValueError(f"{len(tokens)} token files with different readings (layers or heads); train them alike")
        if len({one.fingerprint for one in tokens}) != 1:
            raise ValueError(f"{len(tokens)} token files that were trained on different models; train them on one")
        names = [one.concept for one in tokens]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"several token files of '{twice[0]}'; expected one per concept")
        self.tokens, self.base, self.cfg, self.scaler, self.fused = tokens, base, cfg, scaler, fused
        self.safety_texts = tuple(one.safety_text if safety_text is None else safety_text for one in tokens)

    def start(self, sd, prompts: list[str]) -> "DAG":
        for one in self.tokens:
            one.check(sd)
        run = super().start(sd, prompts)
        run.cfg = sd.config.dag if self.cfg is None else self.cfg
        run.scalings = [one.adapt(run.cfg.scaling) for one in self.tokens]
        run.remembered = torch.zeros(())  # becomes (b, concepts, H, W)
        run.probe = Probe(sd.unet, self.tokens, self.fused)
        run.hooks = (run.probe,)
        return run

    def __call__(self, step: Inputs) -> Estimate:
        eps, device = step.cfg_eps, step.eps_p.device
        A = step.A.cpu()  # the one wait for the device: all decisions below are made on the CPU
        self.remembered = A = remember(A, self.remembered, self.cfg, self.scalings)  # (b, concepts, H, W)
        S = self.scaler(A, self.scalings)  # (b, concepts, H, W)
        ties = torch.where(S == S.amax(1, keepdim=True), A, -1.0)  # (b, concepts, H, W); at s_max there are many
        acting = ties.argmax(1, keepdim=True)  # (b, 1, H, W)
        S = torch.where(acting == torch.arange(S.shape[1])[:, None, None], S, 0.0)
        active = (S.flatten(2).amax(2) > 0) & (step.i >= self.cfg.warmup)  # (b, concepts)
        for k in range(len(self.tokens)):
            images = active[:, k].nonzero()[:, 0].tolist()
            if images:
                weight = (step.s_g * S[images, k, None]).to(device)  # (images, 1, H, W)
                at = torch.tensor(images, device=device)  # here once: the device is waited for at each list of indices
                d_s = step.safety(k, images) - step.eps_0[at]  # (images, 4, H, W)
                M_base = self.mask(d_s, step.eps_p[at] - step.eps_0[at])  # (images, 4, H, W)
                eps[at] = eps[at] - weight * M_base * d_s  # Eq. 4, as Table 1 has it
        return Estimate(eps, A, S.amax(1), active.any(1))

    def mask(self, d_s: Tensor, d_p: Tensor) -> Tensor:
        """M_base, (b, 4, H, W) of 0 and 1, from d_s = eps_s - eps_0 and d_p = eps_p - eps_0."""
        if self.base == "sega":
            return top_mask(d_s, self.cfg.top)
        if self.base == "sld":
            return (d_p - d_s < self.cfg.threshold).float()
        return torch.ones_like(d_s)


def remember(A: Tensor, before: Tensor, cfg: DAGConfig, scalings: list[Scaling]) -> Tensor:
    """The larger of this step's maps A (b, concepts, H, W) and the previous ones, decayed: what a step acts on.

    A map that covers at least the share `full` of the frame is ignored (Algorithm 1), so it is not remembered either.
    Nor is one that together with what was remembered shows no object large enough: specks of several steps must not
    add up to one. An object that shrinks while it turns stays, as long as something of it is seen.
    """
    faded = cfg.memory * before
    if cfg.scaling.area_gain is None:  # no Algorithm 1
        return torch.maximum(A, faded)
    formed = (cfg.scaling.edit <= A).float().mean((2, 3), keepdim=True) < cfg.scaling.full  # (b, concepts, 1, 1)
    both = torch.maximum(A * formed, faded)  # (b, concepts, H, W)
    found = [objects(both[:, k], one)[0].flatten(1).any(1) for k, one in enumerate(scalings)]  # (b,) each
    return torch.where(torch.stack(found, 1)[..., None, None], both, faded)


def top_mask(x: Tensor, share: float) -> Tensor:
    """1 where |x| is among its largest `share` of values per image and channel, else 0; (b, 4, H, W)."""
    size = x.abs()
    return (size >= torch.quantile(size.flatten(2), 1 - share, dim=2)[..., None, None]).float()


def check_constants(warmup: int, **shares: float) -> None:
    """Raises ValueError for a negative warm-up or a share outside [0, 1]."""
    if warmup < 0:
        raise ValueError(f"warm-up is {warmup} steps, expected 0 or more")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected 0 to 1")
