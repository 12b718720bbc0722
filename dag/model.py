"""StableDiffusion: UNet, VAE and text encoder under one roof, and how they are loaded from an original checkpoint."""

import torch
from torch import Tensor, nn

from weights import checkpoint
from weights.checkpoint import CheckpointError

from . import ddim
from .config import SD14, SHAPES, Config
from .text import WEIGHTS, Text
from .unet import UNet
from .vae import AutoencoderKL

MINIATURE = WEIGHTS / "shapes" / "shapes.safetensors"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."

# Entries of original checkpoints that are no weights of the model: schedule buffers (recomputed), EMA bookkeeping,
# the text encoder's position numbers, remnants of training.
IGNORED = (
    "betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_", "model_ema.", "logvar", "lvlb_weights",
    "scale_factor", TEXT + "embeddings.position_ids", "first_stage_model.loss.",
)  # fmt: skip


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
        """Scaled latent (b, 4, H, W) -> picture (b, 3, 8H, 8W) in [-1, 1], float32."""
        z = latent / self.config.vae.scale_factor
        return self.vae.decode(z.to(self.device, self.dtype)).float().clamp(-1, 1)


def load(path=None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """Load an original SD 1.x checkpoint (.ckpt or .safetensors); without a path, the miniature that comes along.

    Returns the model in eval mode without gradients. `ignored` of the result names the file's entries that were not
    needed. Raises CheckpointError when the file is not what it should be.
    """
    path = MINIATURE if path is None else path
    tensors, metadata = checkpoint.read(path)
    config = recognise(tensors, metadata, path)
    with torch.device("meta"):
        sd = StableDiffusion(config)
    sd.alphas_cumprod = ddim.alphas_cumprod(config.schedule)
    ignored = [name for name in tensors if name.startswith(IGNORED)]
    for name in ignored:
        del tensors[name]
    parts = {UNET: sd.unet, VAE: sd.vae, TEXT: sd.text.transformer}
    expected = {prefix + k: v for prefix, module in parts.items() for k, v in module.state_dict().items()}
    check(tensors, expected, config, path)
    for prefix, module in parts.items():
        names = module.state_dict().keys()
        module.load_state_dict({k: tensors.pop(prefix + k).to(device, dtype) for k in names}, strict=True, assign=True)
    positions = torch.arange(config.text.max_length, device=device)[None]  # (1, m); not in the state dict
    sd.text.transformer.embeddings.position_ids = positions
    sd.ignored = ignored
    return sd.eval().requires_grad_(False)


def recognise(tensors: dict[str, Tensor], metadata: dict[str, str], path) -> Config:
    """The config whose widths the file has; a metadata entry `config` that names one overrides."""
    configs = {c.name: c for c in (SD14, SHAPES)}
    if metadata.get("config") in configs:
        return configs[metadata["config"]]
    first = tensors.get(UNET + "input_blocks.0.0.weight")
    key = tensors.get(UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None or key is None:
        some = ", ".join(sorted(tensors)[:3])
        raise CheckpointError(
            f"{path}: no UNet of Stable Diffusion 1.x in it; found {len(tensors)} tensors ({some}, ...)"
        )
    found = (first.shape[0], first.shape[1], key.shape[1])
    for c in configs.values():
        if found == (c.unet.model_channels, c.unet.in_channels, c.unet.context_dim):
            return c
    raise CheckpointError(
        f"{path}: a UNet of {found[0]} channels, {found[1]} input channels and text width {found[2]}; "
        "expected 320, 4 and 768 (SD 1.x) or 32, 4 and 128 (shapes)"
    )


def check(tensors: dict[str, Tensor], expected: dict[str, Tensor], config: Config, path) -> None:
    """Names and shapes must be exactly the model's. Raises CheckpointError naming the first three that are not."""

    def some(names: list[str]) -> str:
        return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

    missing = [k for k in expected if k not in tensors]
    unexpected = [k for k in tensors if k not in expected]
    wrong = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of wrong shape": wrong}
    found = "; ".join(f"{what}: {some(names)}" for what, names in faults.items() if names)
    if found:
        raise CheckpointError(f"{path}: not a complete {config.name} checkpoint, tensors {found}")
