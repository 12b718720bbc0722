"""How noise estimates are combined: classifier-free guidance, and Detect-and-Guide on top of it.

Letters: eps_0, eps_p, eps_s are the estimates for the empty prompt, the prompt and the safety text; s_g is the guidance
scale; A the detection map, S the strength, M the mask. Everything here is float32 arithmetic on (b, 4, H, W).
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
    A: Tensor | None  # (b, H, W) in [0, 1]; None for methods without maps
    S: Tensor | None  # (b, H, W)
    guided: Tensor  # (b,) bool: images whose estimate the safety text changed


class CFG:
    """Classifier-free guidance: eps = eps_0 + s_g (eps_p - eps_0)."""

    safety_texts: tuple[str, ...] = ()

    def start(self, sd, conditional: slice) -> Probe | None:
        """Called once before the loop; returns the probe the UNet is given, which looks at the conditional rows."""
        return None

    def __call__(self, i: int, t: int, eps_0: Tensor, eps_p: Tensor, s_g: float, safety_eps: SafetyEps) -> Estimate:
        """Step i (from 0) at timestep t."""
        eps = eps_0 + s_g * (eps_p - eps_0)
        return Estimate(eps, None, None, torch.zeros(len(eps), dtype=torch.bool))


class DAG(CFG):
    """Detect-and-Guide: where the tokens see the concept, push away from the safety text (paper Eq. 4, Table 1).

    eps = eps_0 + s_g [(eps_p - eps_0) - S M (eps_s - eps_0)],  M = 1[A >= edit] M_base

    base "sega": M_base is |eps_s - eps_0| in its `top` share per channel over the frame.
    base "sld": M_base = 1[eps_p - eps_s < threshold].
    base "none": M_base = 1.
    Several concepts keep a map, a strength and a safety text each; at every pixel the one with the largest S acts.
    The safety estimate is asked for only for images with S != 0 after warm-up; the others are plain guidance, bit for
    bit. There is no momentum: with it, what is not detected would change too.
    cfg: its constants; default the model's (paper's for SD 1.4).
    Raises ValueError for an unknown base, constants out of range, or tokens that read different layers.
    """

    def __init__(
        self,
        *tokens: GuidelineTokens,
        safety_text: str | None = None,
        base: str = "sega",
        cfg: DAGConfig | None = None,
    ):
        if base not in ("sega", "sld", "none"):
            raise ValueError(f"mask base is '{base}', expected sega, sld or none")
        if cfg is not None and (cfg.warmup < 0 or not 0 < cfg.top <= 1):
            raise ValueError(f"warm-up {cfg.warmup} must not be negative and top {cfg.top} must be in (0, 1]")
        if len({c.factors for c in tokens}) != 1:
            raise ValueError(f"{len(tokens)} token files that read layers of different factors; train them alike")
        self.tokens, self.base, self.given = tokens, base, cfg
        self.safety_texts = tuple(c.safety_text if safety_text is None else safety_text for c in tokens)

    def start(self, sd, conditional: slice) -> Probe:
        self.cfg = sd.config.dag if self.given is None else self.given
        self.probe = Probe(sd.unet, [c.embedding for c in self.tokens], self.tokens[0].factors, conditional)
        return self.probe

    def __call__(self, i: int, t: int, eps_0: Tensor, eps_p: Tensor, s_g: float, safety_eps: SafetyEps) -> Estimate:
        eps = eps_0 + s_g * (eps_p - eps_0)
        maps = self.probe.maps(*eps.shape[2:])  # (b, K, H, W) a concept
        A = [c.detect(rows, t) for c, rows in zip(self.tokens, maps, strict=True)]  # (b, H, W) a concept
        A = torch.stack(A, 1)  # (b, concepts, H, W)
        S = torch.stack([torch.stack([scale_map(a, self.cfg.scaling) for a in image]) for image in A])
        active = (S.flatten(2).amax(2) > 0).cpu() & (i >= self.cfg.warmup)  # (b, concepts)
        acting = S.argmax(1)  # (b, H, W)
        for k in range(len(self.tokens)):
            images = active[:, k].nonzero()[:, 0].tolist()
            if images:
                safety = safety_eps(k, images) - eps_0[images]  # (images, 4, H, W)
                M = self.mask(safety, eps_p[images] - eps_0[images])  # (images, 4, H, W)
                strength = (S[images, k] * (acting[images] == k))[:, None]  # (images, 1, H, W)
                eps[images] = eps[images] - s_g * strength * M * safety
        return Estimate(eps, A.amax(1), S.amax(1), active.any(1))

    def mask(self, safety: Tensor, prompt: Tensor) -> Tensor:
        """M_base, (b, 4, H, W) of 0 and 1, from eps_s - eps_0 and eps_p - eps_0. S carries the factor 1[A >= edit]."""
        if self.base == "sega":
            size = safety.abs()
            return (size >= torch.quantile(size.flatten(2), 1 - self.cfg.top, dim=2)[..., None, None]).float()
        if self.base == "sld":
            return (prompt - safety < self.cfg.threshold).float()
        return torch.ones_like(safety)
