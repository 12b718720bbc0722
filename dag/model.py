"""StableDiffusion: UNet, VAE and text encoder under one roof, and how they are loaded from an original checkpoint."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import convolution
from weights import checkpoint, known
from weights.checkpoint import CheckpointError
from weights.overlay import Overlay

from . import ddim
from .config import SD14, SD21, SD21_V, SHAPES, Config
from .text import WEIGHTS, Text
from .unet import UNet
from .vae import AutoencoderKL

MINIATURE = WEIGHTS / "shapes"  # the folder with the model, its tokens and its judge


class NumericsError(ArithmeticError):
    """NaN or infinity in a latent or picture."""


class StableDiffusion(nn.Module):
    """The three networks, their config and their noise schedule."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.hooks = ()  # for every UNet call of a loop: what an overlay adds
        self.unet = UNet(config.unet)
        self.vae = AutoencoderKL(config.vae)
        self.text = Text(config.text)
        self.alphas_cumprod = ddim.alphas_cumprod(config.schedule)  # (1000,) float32, on the CPU; read as numbers

    @classmethod
    def from_tensors(cls, config: Config, tensor: Callable[[str], Tensor]) -> "StableDiffusion":
        """The model with tensor(name) as its weights, by the checkpoint's names; in eval mode, without gradients."""
        with torch.device("meta"):
            sd = cls(config)
        for prefix, module in sd.parts().items():
            module.load_state_dict({name: tensor(prefix + name) for name in module.state_dict()}, assign=True)
        sd.alphas_cumprod = ddim.alphas_cumprod(config.schedule)
        positions = torch.arange(config.text.max_length, device=sd.device)[None]  # (1, m); not in the state dict
        sd.text.transformer.embeddings.position_ids = positions
        return sd.eval().requires_grad_(False)

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the prefix of their names in a checkpoint."""
        return {known.UNET: self.unet, known.VAE: self.vae, known.TEXT: self.text.transformer}

    @property
    def device(self) -> torch.device:
        return self.vae.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.quant_conv.weight.dtype

    def encode(self, image: Tensor) -> Tensor:
        """Picture (b, 3, 8H, 8W) in [-1, 1] -> scaled latent (b, 4, H, W) float32: the mean of the posterior.

        One picture after the other, as in `decode`.
        """
        means = [self.vae.encode(one.to(self.device, self.dtype))[0].float() for one in image.split(1)]
        return torch.cat(means) * self.config.vae.scale_factor  # (b, 4, H, W)

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent (b, 4, H, W) -> picture (b, 3, 8H, 8W) in [-1, 1], float32.

        One picture after the other: the decoder's memory, far above the UNet's, must not grow with b. A picture that is
        not finite is decoded again in float32; raises NumericsError when it still is not.
        """
        pictures = []
        for z in (latent / self.config.vae.scale_factor).to(self.device).split(1):  # (1, 4, H, W)
            picture = self.vae.decode(z.to(self.dtype)).float()  # (1, 3, 8H, 8W)
            if self.dtype != torch.float32 and not picture.isfinite().all():
                picture = copy.deepcopy(self.vae).float().decode(z.float())
            if not picture.isfinite().all():
                raise NumericsError("the decoded picture is not finite, not even in float32")
            pictures.append(picture.clamp(-1, 1))
        return torch.cat(pictures)  # (b, 3, 8H, 8W)


def recognise(path=None, prediction: str | None = None) -> tuple[checkpoint.Checkpoint, Config]:
    """A checkpoint, of which only the table of tensors was read, and the model that it is of; default: the miniature's.

    prediction: "eps" or "v", what the UNet of an SD 2.x file tells, which cannot be seen in it. Raises CheckpointError.
    """
    file = checkpoint.read(MINIATURE / "shapes.safetensors" if path is None else path)
    configs = {c.name: c for c in (SD14, SD21, SHAPES)}
    widths = {name: (c.unet.model_channels, c.unet.in_channels, c.unet.context_dim) for name, c in configs.items()}
    config = configs[known.recognise(file, widths)]
    if config is SD21:
        if prediction is None:
            raise CheckpointError(
                f"{file.path}: an SD 2.x checkpoint, and nothing in it tells what its UNet predicts; expected "
                "--prediction eps (a 512-base file) or v (a 768-v file)"
            )
        return file, SD21_V if prediction == "v" else SD21
    if prediction not in (None, config.prediction):
        raise CheckpointError(f"{file.path}: is {config.name}, which predicts eps; leave out --prediction {prediction}")
    return file, config


def load(
    path=None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    overlay=None,
    strength: float = 1.0,
    prediction: str | None = None,
) -> StableDiffusion:
    """Load an original SD 1.x or 2.x checkpoint, .ckpt or .safetensors; without a path, the miniature.

    overlay: the file, or folder, of a released erased model to lay over it (weights/overlay.py); strength: SPM's.
    prediction: as in `recognise`.

    Returns the model in eval mode without gradients. `origin` of the result says what the file is taken for and which
    UNet of it is used, `ignored` names the file's entries that were not needed. Weights that are on the CPU and of the
    file's dtype are mapped, not copied: the file must stay as it is while they are used (Checkpoint.tensor).
    Raises CheckpointError when the file is not what it should be, warns of tensors of unknown origin.
    """
    file, config = recognise(path, prediction)
    with torch.device("meta"):
        parts = StableDiffusion(config).parts()
    expected = {prefix + name: x for prefix, module in parts.items() for name, x in module.state_dict().items()}
    names = known.locate(expected, file)
    ignored = known.check_complete(names, expected, file, config.name)
    laid = None if overlay is None else Overlay(overlay, expected, config.unet.num_res_blocks, strength)

    def tensor(name: str) -> Tensor:
        base = file.tensor(names[name], device, dtype)
        if (third := known.third(name, names[name])) is not None:
            base = base.chunk(3)[third]
        return base if laid is None else laid.over(name, base)

    sd = StableDiffusion.from_tensors(config, tensor)
    for network in (sd.unet, sd.vae):
        convolution.install(network)
    sd.ignored = ignored
    sd.origin = known.by_size(file.file.size) if config is SD14 else config.name
    sd.origin += ", its EMA UNet" if any(name.startswith(known.EMA) for name in names.values()) else ""
    if laid is not None:
        sd.hooks = laid.hooks(sd.unet)
        sd.origin += f"; {laid}"
    return sd
