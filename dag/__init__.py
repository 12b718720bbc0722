"""Detect-and-Guide on Stable Diffusion 1.4, from scratch.

Reading order, from the loop down: sampling, guidance, scalers, cam, tokens, attention. If you know Stable Diffusion,
stop after ddim and config. Then unet, vae, text, model. recording looks on; evaluation and cli serve the programs.

Letters, the same in every file: b images or batch rows, h heads, n pixels of one layer, m text tokens, d channels per
head, g guideline rows of all concepts, c channels (in cam: a guideline embedding), c_text text width, H x W latent
grid, height x width any other grid, t timestep, i step, s_g guidance scale; k a key in attention and cam, else the
number of a concept; A a detection map, S the strength of guidance.
"""

import importlib
import importlib.metadata

# Names are looked up when they are used: torch takes seconds to import, and `sample.py --help` should not wait for it.
_HOME = {
    "DAG": "guidance", "Estimate": "guidance", "Guidance": "guidance", "Negative": "evaluation.baselines",
    "SEGA": "evaluation.baselines", "SLD": "evaluation.baselines", "GuidelineTokens": "tokens", "Hook": "attention",
    "Recording": "recording", "StableDiffusion": "model", "load": "model", "Step": "sampling", "detect": "sampling",
    "sample": "sampling",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dag' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


try:
    importlib.metadata.version("kernels")  # a Hugging Face package with the name of our folder
except importlib.metadata.PackageNotFoundError:
    pass
else:
    from . import text  # noqa: F401  it keeps transformers from mixing them up, whatever is imported first
