"""StableDiffusion: UNet, VAE and text encoder under one roof, and how they are loaded from an original checkpoint."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from weights import checkpoint, known
from weights.checkpoint import Checkpoint, CheckpointError

from . import ddim
from .config import SD14, SHAPES, Config
from .text import WEIGHTS, Text
from .unet import UNet
from .vae import AutoencoderKL

MINIATURE = WEIGHTS / "shapes" / "shapes.safetensors"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
OLD_TEXT = "cond_stage_model.transformer."  # as community files made with early transformers have it
EMA = "model_ema.diffusion_model"  # the averaged UNet of training checkpoints, its names written without dots

# Entries of original checkpoints that are no weights of the model: schedule buffers (recomputed), EMA bookkeeping,
# the text encoder's position numbers, parts of CLIP that draw nothing, remnants of training.
IGNORED = (
    "betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_", "model_ema.", "logvar", "lvlb_weights",
    "scale_factor", TEXT + "embeddings.position_ids", OLD_TEXT + "embeddings.position_ids", "first_stage_model.loss.",
    OLD_TEXT + "text_projection", "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    OLD_TEXT + "vision_model.", OLD_TEXT + "visual_projection", OLD_TEXT + "logit_scale", "embedding_manager.",
    "first_stage_model.model_ema.", "denoiser.",
)  # fmt: skip


class NumericsError(ArithmeticError):
    """NaN or infinity in a latent or picture."""


class StableDiffusion(nn.Module):
    """The three networks, their config and their noise schedule."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.vae = AutoencoderKL(config.vae)
        self.text = Text(config.text)
        self.alphas_cumprod = ddim.alphas_cumprod(config.schedule)  # (1000,) float32, on the CPU; read as numbers

    @property
    def device(self) -> torch.device:
        return self.vae.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.quant_conv.weight.dtype

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Picture (b, 3, 8H, 8W) in [-1, 1] -> scaled latent (b, 4, H, W) float32: the mean of the posterior."""
        mean, _ = self.vae.encode(image.to(self.device, self.dtype))  # (b, 4, H, W)
        return mean.float() * self.config.vae.scale_factor

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (b, 4, H, W) -> picture (b, 3, 8H, 8W) in [-1, 1], float32.

        One picture after the other: the decoder's memory, far above the UNet's, must not grow with b.
        Raises NumericsError when a picture is not finite.
        """
        z = (latent / self.config.vae.scale_factor).to(self.device, self.dtype)  # (b, 4, H, W)
        pictures = torch.cat([self.vae.decode(one).float() for one in z.split(1)])  # (b, 3, 8H, 8W)
        if not pictures.isfinite().all():
            raise NumericsError(f"the decoded picture is not finite in {self.dtype}; try --dtype float32")
        return pictures.clamp(-1, 1)


def load(path=None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """Load an original SD 1.x checkpoint (.ckpt or .safetensors); without a path, the miniature that comes along.

    Returns the model in eval mode without gradients. `origin` of the result says what the file is taken for and which
    UNet of it is used, `ignored` names the file's entries that were not needed. Weights that are on the CPU and of the
    file's dtype are mapped, not copied: the file must stay as it is while they are used.
    Raises CheckpointError when the file is not what it should be.
    """
    file = checkpoint.read(MINIATURE if path is None else path)
    config = recognise(file)
    with torch.device("meta"):
        sd = StableDiffusion(config)
    sd.alphas_cumprod = ddim.alphas_cumprod(config.schedule)
    parts = {UNET: sd.unet, VAE: sd.vae, TEXT: sd.text.transformer}
    expected = {prefix + k: v for prefix, module in parts.items() for k, v in module.state_dict().items()}
    where = locate(expected, file)
    sd.ignored = check(where, expected, file, config)
    for prefix, module in parts.items():
        names = module.state_dict()
        module.load_state_dict({k: file.tensor(where[prefix + k], device, dtype) for k in names}, assign=True)
    positions = torch.arange(config.text.max_length, device=device)[None]  # (1, m); not in the state dict
    sd.text.transformer.embeddings.position_ids = positions
    averaged = any(name.startswith(EMA) for name in where.values())
    sd.origin = known.by_size(file.path.stat().st_size) if config is SD14 else config.name
    sd.origin += ", its EMA UNet" if averaged else ""
    return sd.eval().requires_grad_(False)


def recognise(file: Checkpoint) -> Config:
    """The config whose widths the file has; a metadata entry `config` that names one overrides."""
    configs = {c.name: c for c in (SD14, SHAPES)}
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    if file.metadata.get("config") in configs:
        return configs[file.metadata["config"]]
    if what := known.family(shapes):
        raise CheckpointError(f"{file.path}: this is {what}; expected an SD 1.x checkpoint of the original layout")
    first = shapes.get(UNET + "input_blocks.0.0.weight", ())
    key = shapes.get(UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())
    if len(first) != 4 or len(key) != 2:
        raise CheckpointError(
            f"{file.path}: no UNet of Stable Diffusion 1.x in it; found {len(shapes)} tensors ({some(sorted(shapes))})"
        )
    found = (first[0], first[1], key[1])
    for c in configs.values():
        if found == (c.unet.model_channels, c.unet.in_channels, c.unet.context_dim):
            return c
    raise CheckpointError(
        f"{file.path}: a UNet of {found[0]} channels, {found[1]} input channels and text width {found[2]}; "
        "expected 320, 4 and 768 (SD 1.x) or 32, 4 and 128 (shapes)"
    )


def locate(expected: Iterable[str], file: Checkpoint) -> dict[str, str]:
    """Our name of each tensor -> the file's. They differ for an averaged UNet, which is preferred, and for old text."""
    averaged = {name: EMA + name.removeprefix(UNET).replace(".", "") for name in expected if name.startswith(UNET)}
    if not any(name in file.entries for name in averaged.values()):
        averaged = {}
    older = {name: name.replace(TEXT, OLD_TEXT) for name in expected if name not in file.entries}
    older = {name: old for name, old in older.items() if old in file.entries}
    return {name: averaged.get(name) or older.get(name, name) for name in expected}


def check(where: dict[str, str], expected: dict[str, Tensor], file: Checkpoint, config: Config) -> list[str]:
    """Names, shapes and kind must be exactly the model's. Returns the file's names that are of known origin but unused.

    where: our name -> the file's; expected: our name -> a tensor of the right shape. Raises CheckpointError.
    """
    used, entries = set(where.values()), file.entries
    # Whether the rest is of known origin: a UNet that was trained, beside its average; text under old and new names.
    rest = {
        name: name.startswith(IGNORED) or name in expected or name.replace(OLD_TEXT, TEXT) in expected
        for name in entries
        if name not in used
    }
    faults = {
        "missing": [name for name in where.values() if name not in entries],
        "unexpected": [name for name, known_origin in rest.items() if not known_origin],
        "of wrong shape": [
            f"{there} {entries[there].shape} instead of {tuple(expected[name].shape)}"
            for name, there in where.items()
            if there in entries and entries[there].shape != expected[name].shape
        ],
        "not of floating point": [
            name for name in where.values() if name in entries and not entries[name].dtype.is_floating_point
        ],
    }
    found = "; ".join(f"{what}: {len(names)} ({some(names)})" for what, names in faults.items() if names)
    if found:
        raise CheckpointError(f"{file.path}: not a complete {config.name} checkpoint, tensors {found}")
    return list(rest)


def some(names: list[str]) -> str:
    """The first three names, on one line whatever is in them."""
    shown = [name[:120].encode("unicode_escape").decode() for name in names[:3]]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")
