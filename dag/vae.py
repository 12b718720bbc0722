"""The autoencoder of SD 1.4. Parameter names are the checkpoint's below `first_stage_model.`.

    picture (b, 3, 8H, 8W) -> Encoder -> quant_conv -> mean, logvar (b, 4, H, W)
    latent  (b, 4, H, W)   -> post_quant_conv -> Decoder -> picture (b, 3, 8H, 8W)

Two traps, both silent: a stride-2 convolution pads right and bottom only (padding 1 shifts the picture by half a pixel
a level), and every GroupNorm has epsilon 1e-6. Source: CompVis ldm/modules/diffusionmodules/model.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig


class ResnetBlock(nn.Module):
    """Two convolutions beside a shortcut, (b, in, height, width) -> (b, out, height, width)."""

    def __init__(self, in_channels: int, out_channels: int, cfg: VAEConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.num_groups, in_channels, cfg.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(cfg.num_groups, out_channels, cfg.eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))  # (b, out, height, width)
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)  # (b, out, height, width)
        return y.add_(x)


class AttnBlock(nn.Module):
    """Self-attention of one head over all pixels, on the coarsest grid. Its projections are 1x1 convolutions."""

    def __init__(self, channels: int, cfg: VAEConfig):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.num_groups, channels, cfg.eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        # (b, 1, n, c) each, in the one layout that fused attention takes
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None].contiguous() for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # (b, 1, n, c)
        y = y[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # (b, c, height, width)
        return self.proj_out(y).add_(x)


class Downsample(nn.Module):
    """Halves the grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (b, c, height/2, width/2); right and bottom padding only


class Upsample(nn.Module):
    """Doubles the grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (b, c, 2 height, 2 width)


def _middle(channels: int, cfg: VAEConfig) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, cfg)
    mid.attn_1 = AttnBlock(channels, cfg)
    mid.block_2 = ResnetBlock(channels, channels, cfg)
    return mid


class Encoder(nn.Module):
    """(b, 3, 8H, 8W) -> (b, 2z, H, W)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]  # SD 1.4: 128, 256, 512, 512
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = cfg.ch
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(cfg.num_res_blocks):
                level.block.append(ResnetBlock(c, width, cfg))
                c = width
            if i < len(widths) - 1:
                level.downsample = Downsample(c)
            self.down.append(level)
        self.mid = _middle(c, cfg)
        self.norm_out = nn.GroupNorm(cfg.num_groups, c, cfg.eps)
        self.conv_out = nn.Conv2d(c, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (b, ch, 8H, 8W)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)  # (b, c, height/2, width/2), three times: 4H, 2H, H
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))  # (b, 2z, H, W)


class Decoder(nn.Module):
    """(b, z, H, W) -> (b, 3, 8H, 8W). `up` is numbered from the finest level to the coarsest and run backwards."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = _middle(c, cfg)
        levels = []
        for i in reversed(range(len(widths))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(cfg.num_res_blocks + 1):
                level.block.append(ResnetBlock(c, widths[i], cfg))
                c = widths[i]
            if i > 0:
                level.upsample = Upsample(c)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(cfg.num_groups, c, cfg.eps)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # (b, c, H, W)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)  # (b, c, 2 height, 2 width), three times: 2H, 4H, 8H
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))  # (b, 3, 8H, 8W)


class AutoencoderKL(nn.Module):
    """Pictures in [-1, 1] <-> unscaled latents. The scale factor is applied by StableDiffusion, in one place."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Picture (b, 3, 8H, 8W) -> mean and log variance of the posterior, (b, z, H, W) each."""
        mean, logvar = self.quant_conv(self.encoder(x.contiguous())).chunk(2, dim=1)  # (b, z, H, W) each
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Latent (b, z, H, W) -> picture (b, 3, 8H, 8W), not clamped."""
        return self.decoder(self.post_quant_conv(z.contiguous()))
