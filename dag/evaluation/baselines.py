"""The methods that DAG is compared with, and all methods by name.

    Negative   eps_s in the place of eps_0
    SLD        eps_0 + s_g [(eps_p - eps_0) - mu (eps_s - eps_0)]          mu from eps_p - eps_s, with momentum
    SEGA       eps_0 + s_g (eps_p - eps_0) - s_e M (eps_s - eps_0)         M its largest values, with momentum

Letters as in guidance.py; mu are SLD's weights, nu a momentum, s_e SEGA's own scale.
"""

import torch

from ..cam import AttentionWithMaps
from ..config import METHODS, Config, DAGConfig
from ..guidance import DAG, Estimate, Guidance, Inputs, check_constants, top_mask
from ..tokens import GuidelineTokens


class Negative(Guidance):
    """The negative prompt: classifier-free guidance away from the safety text instead of the empty prompt."""

    def __init__(self, safety_text: str):
        self.uncond_text = safety_text

    def __call__(self, step: Inputs) -> Estimate:
        return Estimate(step.cfg_eps, guided=torch.ones(len(step.x), dtype=torch.bool))


class SLD(Guidance):
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
    # What its authors push away from, as do the rows of SLD in DAG's paper: `safety_concept` of diffusers'
    # StableDiffusionPipelineSafe, word for word.
    SAFETY_TEXT = (
        "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
        "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, "
        "brutality, cruelty"
    )

    def __init__(
        self,
        safety_text: str,
        warmup: int = 10,
        scale: float = 1000.0,
        threshold: float = 0.01,
        momentum: float = 0.3,
        beta: float = 0.4,
    ):
        check_constants(warmup, threshold=threshold, momentum=momentum, beta=beta)
        self.safety_texts = (safety_text,)
        self.warmup, self.scale, self.threshold, self.momentum, self.beta = warmup, scale, threshold, momentum, beta

    @classmethod
    def preset(cls, name: str, safety_text: str = SAFETY_TEXT) -> "SLD":
        """One of its authors' four strengths, with their safety text. Raises ValueError for another name."""
        if name not in cls.PRESETS:
            raise ValueError(f"SLD has no preset '{name}', expected one of {', '.join(cls.PRESETS)}")
        return cls(safety_text, **cls.PRESETS[name])

    nu = 0.0  # becomes (b, 4, H, W)

    def __call__(self, step: Inputs) -> Estimate:
        eps_0, eps_p = step.eps_0, step.eps_p
        eps_s = step.safety(0, list(range(len(eps_0))))
        mu = (self.scale * (eps_p - eps_s).abs()).clamp(max=1)  # Eq. 6
        mu = torch.where(eps_p - eps_s < self.threshold, mu, 0.0)
        g = mu * (eps_s - eps_0) + self.momentum * self.nu  # Eq. 4, 7
        self.nu = self.beta * self.nu + (1 - self.beta) * g  # Eq. 8
        active = step.i >= self.warmup
        eps = eps_0 + step.s_g * (eps_p - eps_0 - (g if active else 0))  # Eq. 3
        return Estimate(eps, guided=torch.full((len(eps),), active))


class SEGA(Guidance):
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
            raise ValueError("SEGA was given no safety text, expected one per concept")
        check_constants(warmup, threshold=threshold, momentum=momentum, beta=beta)
        self.safety_texts = safety_texts
        self.scale, self.warmup, self.threshold, self.momentum, self.beta = scale, warmup, threshold, momentum, beta

    nu = 0.0  # becomes (b, 4, H, W)

    def __call__(self, step: Inputs) -> Estimate:
        images, g = list(range(len(step.x))), self.momentum * self.nu  # Eq. 7
        for concept in range(len(self.safety_texts)):
            term = -self.scale * (step.safety(concept, images) - step.eps_0)  # (b, 4, H, W)
            g = g + term * top_mask(term, 1 - self.threshold)  # Eq. 6; the sum over concepts is Eq. 9
        self.nu = self.beta * self.nu + (1 - self.beta) * g  # Eq. 8
        active = step.i >= self.warmup
        eps = step.cfg_eps + (g if active else 0)
        return Estimate(eps, guided=torch.full((len(eps),), active))


def texts_for(name: str, texts: list[str], model: Config) -> list[str]:
    """The safety texts of a method by its name: SLD has its authors' own, on a model that knows all words."""
    return [SLD.SAFETY_TEXT] if name.startswith("sld") and model.text.num_words is None else texts


def by_name(
    name: str,
    safety_texts: list[str],
    tokens: list[GuidelineTokens],
    cfg: DAGConfig | None = None,
    fused: AttentionWithMaps | None = None,
) -> Guidance:
    """The methods that sample.py knows by name (METHODS in config.py), with the constants they are compared with.

    SEGA's scale is 10, as the paper of DAG runs it; its authors' default is 5. Methods that take one safety
    text get the texts of all concepts, joined. cfg: DAG's constants, default the model's. Raises ValueError for another
    name.
    """
    joined = " and ".join(safety_texts)
    match name.split("-"):
        case ["none"]:
            return Guidance()
        case ["negative"]:
            return Negative(joined)
        case ["sld", preset]:
            return SLD.preset(preset, joined)
        case ["sega"]:
            return SEGA(*safety_texts, scale=10.0)
        case ["dag"]:
            return DAG(*tokens, cfg=cfg, fused=fused)
        case ["dag", "sld"]:
            return DAG(*tokens, base="sld", cfg=cfg, fused=fused)
    raise ValueError(f"unknown method '{name}', expected one of {', '.join(METHODS)}")
