"""The denoiser of SD 1.4: eps(x, t, context). Parameter names are the checkpoint's below `model.diffusion_model.`.

    input_blocks    0       convolution                            320 channels, latent grid / 1
                    1, 2    ResBlock + SpatialTransformer          320, / 1      3   Downsample
                    4, 5    ResBlock + SpatialTransformer          640, / 2      6   Downsample
                    7, 8    ResBlock + SpatialTransformer         1280, / 4      9   Downsample
                    10, 11  ResBlock                              1280, / 8
    middle_block            ResBlock, SpatialTransformer, ResBlock 1280, / 8
    output_blocks   0..2    ResBlock                              1280, / 8      2 ends in an Upsample
                    3..5    ResBlock + SpatialTransformer         1280, / 4      5 ends in an Upsample
                    6..8    ResBlock + SpatialTransformer          640, / 2      8 ends in an Upsample
                    9..11   ResBlock + SpatialTransformer          320, / 1

Every output block first gets the feature map of its input block (11 - i) concatenated; the miniature is the same table
with other widths. Source: CompVis ldm/modules/diffusionmodules/openaimodel.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CrossAttention, Hook, SpatialTransformer
from .config import UNetConfig


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Timesteps (b,) -> (b, dim) float32: cosines, then sines, of t at frequencies from 1 down to 1/10000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)  # (half,)
    angles = t[:, None].float() * freqs  # (b, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (b, dim)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the time is added in between.

    (b, in, height, width), (b, emb) -> (b, out, height, width), on the layer's own grid.
    """

    def __init__(self, in_channels: int, out_channels: int, cfg: UNetConfig):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(cfg.num_groups, in_channels, cfg.eps_res),
            nn.SiLU(inplace=True),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * cfg.model_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(cfg.num_groups, out_channels, cfg.eps_res),
            nn.SiLU(inplace=True),
            nn.Identity(),  # dropout in the original, of rate 0; it keeps the convolution's name `out_layers.3`
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.in_layers(x)  # (b, out, height, width)
        y += self.emb_layers(emb)[:, :, None, None]  # in place, as below: nobody else has these two tensors
        return self.out_layers(y).add_(self.skip_connection(x))


class Downsample(nn.Module):
    """Halves the grid. Padding on all four sides here, unlike the VAE's."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (b, c, height/2, width/2)


class Upsample(nn.Module):
    """Doubles the grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (b, c, 2 height, 2 width)


class Block(nn.ModuleList):
    """The layers under one number of the table above, each given what it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, hooks)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts the noise in a latent."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.model_channels = cfg.model_channels
        widths = [cfg.model_channels * m for m in cfg.channel_mult]  # SD 1.4: 320, 640, 1280, 1280
        emb = 4 * cfg.model_channels
        self.time_embed = nn.Sequential(nn.Linear(cfg.model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        c = cfg.model_channels
        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(cfg.in_channels, c, 3, padding=1)])])
        skips = [c]  # channels of what each input block hands to its output block
        for i, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                block = Block([ResBlock(c, width, cfg)])
                c = width
                if 2**i in cfg.attention_factors:
                    block.append(SpatialTransformer(c, cfg))
                self.input_blocks.append(block)
                skips.append(c)
            if i < len(widths) - 1:
                self.input_blocks.append(Block([Downsample(c)]))
                skips.append(c)

        self.middle_block = Block([ResBlock(c, c, cfg), SpatialTransformer(c, cfg), ResBlock(c, c, cfg)])

        self.output_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for j in range(cfg.num_res_blocks + 1):
                block = Block([ResBlock(c + skips.pop(), width, cfg)])
                c = width
                if 2**i in cfg.attention_factors:
                    block.append(SpatialTransformer(c, cfg))
                if i > 0 and j == cfg.num_res_blocks:
                    block.append(Upsample(c))
                self.output_blocks.append(block)

        self.out = nn.Sequential(
            nn.GroupNorm(cfg.num_groups, c, cfg.eps_res),
            nn.SiLU(inplace=True),
            nn.Conv2d(c, cfg.in_channels, 3, padding=1),
        )

        factor = 1  # of the grid, on the way down and up again
        for name, layer in self.named_modules():
            if isinstance(layer, Downsample):
                factor *= 2
            elif isinstance(layer, Upsample):
                factor //= 2
            elif isinstance(layer, CrossAttention):
                layer.name, layer.factor = name, factor

    def cross_attention(self) -> list[CrossAttention]:
        """The cross-attention layers in the order they run."""
        return [layer for layer in self.modules() if isinstance(layer, CrossAttention)]

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
        """Noise estimate.

        x (b, 4, H, W) float32 or the weights' dtype; t (b,) integer timesteps 0..999; context (b, m, c_text).
        H and W must be multiples of 8. Returns eps (b, 4, H, W) in x's dtype. Runs in the weights' dtype. The hooks
        are asked in every cross-attention layer (`Hook` in attention.py).
        """
        dtype = self.out[2].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))  # (b, emb)
        context = context.to(dtype)
        y = x.to(dtype)
        skips = []
        for block in self.input_blocks:
            y = block(y, emb, context, hooks)  # (b, 320, H, W) ... (b, 1280, H/8, W/8)
            skips.append(y)
        y = self.middle_block(y, emb, context, hooks)  # (b, 1280, H/8, W/8)
        for block in self.output_blocks:
            y = torch.cat([y, skips.pop()], dim=1)
            y = block(y, emb, context, hooks)  # (b, 1280, H/8, W/8) ... (b, 320, H, W)
        return self.out(y).to(x.dtype)  # (b, 4, H, W)
