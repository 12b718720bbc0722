"""Detect-and-Guide on Stable Diffusion 1.4, from scratch.

Reading order: config, attention, unet, vae, text, ddim, model, cam, tokens, scalers, guidance, sampling,
optimisation, drawing, pictures, files.

Letters, the same in every file: b images or rows, h heads, n pixels of one layer, m text tokens, d channels of a head,
K concept rows of guideline tokens, c_text text width, H x W latent grid, t timestep, s_g guidance scale.
"""

from .guidance import CFG, DAG, SEGA, SLD, Negative
from .model import StableDiffusion, load
from .sampling import Step, detect, sample
from .tokens import GuidelineTokens

__all__ = [
    "CFG", "DAG", "GuidelineTokens", "Negative", "SEGA", "SLD", "StableDiffusion", "Step", "detect", "load", "sample",
]  # fmt: skip
