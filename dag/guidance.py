"""How noise estimates are combined: five methods, each a short piece of arithmetic with the same interface.

    CFG        eps_0 + s_g (eps_p - eps_0)
    Negative   the same with the safety text in the place of the empty prompt
    SLD        eps_0 + s_g [(eps_p - eps_0) - mu (eps_s - eps_0)]          mu from eps_p - eps_s, with momentum
    SEGA       eps_0 + s_g (eps_p - eps_0) - s_e M (eps_s - eps_0)         M its largest values, with momentum
    DAG        eps_0 + s_g [(eps_p - eps_0) - S M (eps_s - eps_0)]         S from where the tokens see the concept

Letters: eps_0, eps_p, eps_s are the estimates for the empty prompt, the prompt and the safety text; s_g is the guidance
scale, s_e SEGA's; mu SLD's weights, nu a momentum; A the detection map, S the strength, M the mask. Everything here is
float32 arithmetic on (b, 4, H, W).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cam import Probe
from .config import DAGConfig
from .scalers import scale_map
from .tokens import GuidelineTokens

# safety_eps(concept, images): eps_s of that concept for those images, (len(images), 4, H, W); a UNet row for each.
SafetyEps = Callable[[int, list[int]], Tensor]


@dataclass
class Estimate:
    """What a method makes of one step."""

    eps: Tensor  # (b, 4, H, W)
    A: Tensor | None  # (b, concepts, H, W) in [0, 1], this step's own maps; None for methods without maps
    S: Tensor | None  # (b, H, W); may stem from an earlier step's map (DAGConfig.memory)
    guided: Tensor  # (b,) bool: images that this step pushes away from a safety text


class CFG:
    """Classifier-free guidance: eps = eps_0 + s_g (eps_p - eps_0)."""

    uncond_text: str = ""  # what eps_0 is the estimate for
    safety_texts: tuple[str, ...] = ()  # one a concept
    tokens: tuple[GuidelineTokens, ...] = ()  # of the concepts that are looked for

    def start(self, sd, conditional: slice) -> Probe | None:
        """Called once before the loop, whose state it resets: a method serves one loop at a time.

        Returns the probe the UNet is given, which looks at the conditional rows.
        """
        return None

    def __call__(self, i: int, t: int, eps_0: Tensor, eps_p: Tensor, s_g: float, safety_eps: SafetyEps) -> Estimate:
        """Step i (from 0) at timestep t."""
        eps = eps_0 + s_g * (eps_p - eps_0)
        return Estimate(eps, None, None, torch.full((len(eps),), self.uncond_text != ""))


class Negative(CFG):
    """The negative prompt: classifier-free guidance away from the safety text instead of the empty prompt."""

    def __init__(self, safety_text: str):
        self.uncond_text = safety_text


class SLD(CFG):
    """Safe Latent Diffusion (Schramowski et al. 2023, Eq. 3 to 8).

    eps = eps_0 + s_g [(eps_p - eps_0) - g],  g = mu (eps_s - eps_0) + momentum * nu
    mu  = min(1, scale |eps_p - eps_s|) where eps_p - eps_s < threshold, else 0
    nu <- beta nu + (1 - beta) g, during warm-up too; nu is kept per image

    Raises ValueError for a negative warm-up, or a threshold or momentum factors outside [0, 1].
    """

    # Its authors' presets. Weak's scale is 200 in the scripts that unlearning papers run and 20 in diffusers; 200 here.
    PRESETS = {
        "weak": dict(warmup=15, scale=200.0, threshold=0.0, momentum=0.0, beta=0.0),
        "medium": dict(warmup=10, scale=1000.0, threshold=0.01, momentum=0.3, beta=0.4),
        "strong": dict(warmup=7, scale=2000.0, threshold=0.025, momentum=0.5, beta=0.7),
        "max": dict(warmup=0, scale=5000.0, threshold=1.0, momentum=0.5, beta=0.7),
    }

    def __init__(
        self,
        safety_text: str,
        warmup: int = 10,
        scale: float = 1000.0,
        threshold: float = 0.01,
        momentum: float = 0.3,
        beta: float = 0.4,
    ):
        check(warmup, threshold=threshold, momentum=momentum, beta=beta)
        self.safety_texts = (safety_text,)
        self.warmup, self.scale, self.threshold, self.momentum, self.beta = warmup, scale, threshold, momentum, beta

    @classmethod
    def preset(cls, name: str, safety_text: str) -> "SLD":
        """One of its authors' four strengths. Raises ValueError for another name."""
        if name not in cls.PRESETS:
            raise ValueError(f"SLD has no preset '{name}', expected one of {', '.join(cls.PRESETS)}")
        return cls(safety_text, **cls.PRESETS[name])

    def start(self, sd, conditional: slice) -> None:
        self.nu = 0.0  # becomes (b, 4, H, W)

    def __call__(self, i: int, t: int, eps_0: Tensor, eps_p: Tensor, s_g: float, safety_eps: SafetyEps) -> Estimate:
        everyone = list(range(len(eps_0)))
        eps_s = safety_eps(0, everyone)
        mu = (self.scale * (eps_p - eps_s).abs()).clamp(max=1)  # Eq. 6
        mu = torch.where(eps_p - eps_s < self.threshold, mu, 0.0)
        g = mu * (eps_s - eps_0) + self.momentum * self.nu  # Eq. 4, 7
        self.nu = self.beta * self.nu + (1 - self.beta) * g  # Eq. 8
        active = i >= self.warmup
        eps = eps_0 + s_g * (eps_p - eps_0 - (g if active else 0))  # Eq. 3
        return Estimate(eps, None, None, torch.full((len(eps),), active))


class SEGA(CFG):
    """Semantic Guidance (Brack et al. 2023, Eq. 6 to 9 as its authors' code counts them) with every concept removed.

    eps = eps_0 + s_g (eps_p - eps_0) + g,  g = sum of the concepts' terms + momentum * nu
    A concept's term is -scale (eps_s - eps_0) where its size reaches the `threshold` quantile per channel, else 0.
    nu <- beta nu + (1 - beta) g, during warm-up too. As in its authors' code g stands outside s_g.

    Raises ValueError for no concept, a negative warm-up, or a threshold or momentum factors outside [0, 1].
    """

    def __init__(
        self,
        *safety_texts: str,
        scale: float = 5.0,
        warmup: int = 10,
        threshold: float = 0.9,
        momentum: float = 0.1,
        beta: float = 0.4,
    ):
        if not safety_texts:
            raise ValueError("SEGA was given no safety text, expected one a concept")
        check(warmup, threshold=threshold, momentum=momentum, beta=beta)
        self.safety_texts = safety_texts
        self.scale, self.warmup, self.threshold, self.momentum, self.beta = scale, warmup, threshold, momentum, beta

    def start(self, sd, conditional: slice) -> None:
        self.nu = 0.0  # becomes (b, 4, H, W)

    def __call__(self, i: int, t: int, eps_0: Tensor, eps_p: Tensor, s_g: float, safety_eps: SafetyEps) -> Estimate:
        everyone, g = list(range(len(eps_0))), self.momentum * self.nu  # Eq. 7
        for concept in range(len(self.safety_texts)):
            term = -self.scale * (safety_eps(concept, everyone) - eps_0)  # (b, 4, H, W)
            g = g + term * largest(term, 1 - self.threshold)  # Eq. 6; the sum over concepts is Eq. 9
        self.nu = self.beta * self.nu + (1 - self.beta) * g  # Eq. 8
        active = i >= self.warmup
        eps = eps_0 + s_g * (eps_p - eps_0) + (g if active else 0)
        return Estimate(eps, None, None, torch.full((len(eps),), active))


class DAG(CFG):
    """Detect-and-Guide: where the tokens see the concept, push away from the safety text (paper Eq. 4, Table 1).

    eps = eps_0 + s_g [(eps_p - eps_0) - S M (eps_s - eps_0)],  M = 1[A >= edit] M_base

    base "sega": M_base is |eps_s - eps_0| in its `top` share per channel over the frame.
    base "sld": M_base = 1[eps_p - eps_s < threshold].
    base "none": M_base = 1.
    Several concepts keep a map, a strength and a safety text each; at every pixel the one with the largest S acts.
    The safety estimate is asked for only for images with S != 0 after warm-up; the others are plain guidance, bit for
    bit. There is no momentum: with it, what is not detected would change too. But what was found can be remembered
    (ours; cfg.memory, `remember`). Without it a half-changed object is no longer found and the prompt pulls it back.
    cfg: its constants; default the model's (paper's for SD 1.4). attention: how the maps are computed, auto, plain or
    fused (implementation in attention.py).
    Raises ValueError for an unknown base, constants out of range, tokens of different models, that read different
    layers or of one concept twice, and at the start TokenError for tokens that the model cannot read.
    """

    def __init__(
        self,
        *tokens: GuidelineTokens,
        safety_text: str | None = None,
        base: str = "sega",
        cfg: DAGConfig | None = None,
        attention: str = "auto",
    ):
        if base not in ("sega", "sld", "none"):
            raise ValueError(f"mask base is '{base}', expected sega, sld or none")
        if cfg is not None:
            shares = {"top": cfg.top, "threshold": cfg.threshold, "memory": cfg.memory}
            scaling = cfg.scaling
            check(cfg.warmup, **shares, edit=scaling.edit, unsafe=scaling.unsafe, min_area=scaling.min_area)
            if not 0 < scaling.edit:
                raise ValueError("edit is 0, expected more: T divides by it")
            for name in ("area_gain", "magnitude", "s_max"):
                value = getattr(scaling, name)
                if value is not None and not 0 < value < float("inf"):
                    raise ValueError(f"{name} is {value}, expected a positive number")
        if not tokens:
            raise ValueError("DAG was given no guideline tokens, expected one set a concept")
        if len({c.factors for c in tokens}) != 1:
            raise ValueError(f"{len(tokens)} token files that read layers of different factors; train them alike")
        if len({c.fingerprint for c in tokens}) != 1:
            raise ValueError(f"{len(tokens)} token files that were trained on different models; train them on one")
        names = [c.concept for c in tokens]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"several token files of '{twice[0]}'; expected one a concept")
        self.tokens, self.base, self.given, self.attention = tokens, base, cfg, attention
        self.safety_texts = tuple(c.safety_text if safety_text is None else safety_text for c in tokens)

    def start(self, sd, conditional: slice) -> Probe:
        for c in self.tokens:
            c.check(sd)
        self.cfg = sd.config.dag if self.given is None else self.given
        self.remembered = torch.zeros((), device=sd.device)  # becomes (b, concepts, H, W)
        embeddings, factors = [c.embedding for c in self.tokens], self.tokens[0].factors
        self.probe = Probe(sd.unet, embeddings, factors, conditional, self.attention)
        return self.probe

    def __call__(self, i: int, t: int, eps_0: Tensor, eps_p: Tensor, s_g: float, safety_eps: SafetyEps) -> Estimate:
        eps = eps_0 + s_g * (eps_p - eps_0)
        maps = self.probe.maps(*eps.shape[2:])  # (b, K, H, W) a concept
        A = [c.detect(a, t) for c, a in zip(self.tokens, maps, strict=True)]  # (b, H, W) a concept
        A = torch.stack(A, 1)  # (b, concepts, H, W)
        self.remembered = remember(A, self.remembered, self.cfg)
        scalings = [c.scaling(self.cfg.scaling) for c in self.tokens]
        S = [torch.stack([scale_map(a, s) for a, s in zip(image, scalings, strict=True)]) for image in self.remembered]
        S = torch.stack(S)  # (b, concepts, H, W)
        acting = (S + 1e-3 * self.remembered).argmax(1)  # (b, H, W); of equal S, at s_max, the surer one acts
        own = S * (acting[:, None] == torch.arange(S.shape[1], device=S.device)[:, None, None])  # (b, concepts, H, W)
        active = (own.flatten(2).amax(2) > 0).cpu() & (i >= self.cfg.warmup)  # (b, concepts)
        for k in range(len(self.tokens)):
            images = active[:, k].nonzero()[:, 0].tolist()
            if images:
                safety = safety_eps(k, images) - eps_0[images]  # (images, 4, H, W)
                M = self.mask(safety, eps_p[images] - eps_0[images])  # (images, 4, H, W)
                eps[images] = eps[images] - s_g * own[images, k, None] * M * safety  # Eq. 4, as Table 1 has it
        return Estimate(eps, A, S.amax(1), active.any(1))

    def mask(self, safety: Tensor, prompt: Tensor) -> Tensor:
        """M_base, (b, 4, H, W) of 0 and 1, from eps_s - eps_0 and eps_p - eps_0. S carries the factor 1[A >= edit]."""
        if self.base == "sega":
            return largest(safety, self.cfg.top)
        if self.base == "sld":
            return (prompt - safety < self.cfg.threshold).float()
        return torch.ones_like(safety)


def remember(A: Tensor, before: Tensor, cfg: DAGConfig) -> Tensor:
    """What a step guides by: its maps A (..., H, W), or what the step before guided by, faded, where that is more.

    A map that touches `full` of the frame or more says nothing (Algorithm 1), so it is not remembered either.
    """
    if cfg.scaling.area_gain is not None:  # else there is no Algorithm 1
        A = A * ((cfg.scaling.edit <= A).float().mean((-2, -1), keepdim=True) < cfg.scaling.full)  # (..., H, W)
    return torch.maximum(A, cfg.memory * before)


def largest(x: Tensor, share: float) -> Tensor:
    """1 where |x| is among its largest `share` of values per image and channel, else 0; (b, 4, H, W)."""
    size = x.abs()
    return (size >= torch.quantile(size.flatten(2), 1 - share, dim=2)[..., None, None]).float()


def check(warmup: int, **shares: float) -> None:
    """Raises ValueError for a negative warm-up or a share outside [0, 1]."""
    if warmup < 0:
        raise ValueError(f"warm-up is {warmup} steps, expected 0 or more")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected 0 to 1")


def named(name: str, safety_texts: list[str], tokens: list[GuidelineTokens], attention: str = "auto") -> CFG:
    """The methods that sample.py and the benchmark know by name.

    none, negative, sld-PRESET, sega (scale 10, as the paper of DAG runs it; its authors' default is 5), dag, dag-sld.
    Methods that know one text get those of all concepts joined. Raises ValueError for another name.
    """
    if name == "none":
        return CFG()
    if name == "negative":
        return Negative(" and ".join(safety_texts))
    if name.startswith("sld-"):
        return SLD.preset(name.removeprefix("sld-"), " and ".join(safety_texts))
    if name == "sega":
        return SEGA(*safety_texts, scale=10.0)
    if name in ("dag", "dag-sld"):
        return DAG(*tokens, base="sld" if name == "dag-sld" else "sega", attention=attention)
    raise ValueError(f"unknown method '{name}', expected none, negative, sld-PRESET, sega, dag or dag-sld")
