"""Attention of SD 1.4's UNet, and the hooks that may look into it. Parameter names are the checkpoint's.

This is the file to fork for other attention. It knows no kernel and no method: what a method wants from a layer it
asks for with a `Hook`. Letters as in dag/__init__.py; c = h*d channels. Source: CompVis ldm/modules/attention.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig

NO_ROWS = slice(0, 0)


@dataclass(frozen=True)
class Call:
    """What one UNet call is for. Its batch rows are unconditional, conditional or safety rows, in this order."""

    i: int  # step of the loop, from 0
    t: int  # timestep
    uncond: slice  # rows of the empty prompt, or of what stands in its place
    cond: slice  # rows of the prompts
    safety: slice  # rows of one concept's safety text
    images: tuple[int, ...] = ()  # the image of each safety row
    concept: int | None = None  # whose safety text it is


class Hook:
    """What may happen inside the cross-attention layers of a UNet call. Both methods do nothing by default.

    The loop sets `call` before every UNet call, the safety one too. Several hooks combine: every one is asked about
    every layer, the first answer to `attention` stands, and the outputs go through `output` from hook to hook.
    """

    call = Call(0, 0, NO_ROWS, slice(None), NO_ROWS)  # until a loop sets it, every row is conditional

    def attention(self, layer: "CrossAttention", q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Take the place of `cross_attention`: q (b, h, n, d), k and v (b, h, m, d) -> (b, h, n, d), or None."""

    def output(self, layer: "CrossAttention", out: Tensor) -> Tensor:
        """Edit what the layer hands on: (b, n, c) -> (b, n, c)."""
        return out


def split_heads(x: Tensor, h: int) -> Tensor:
    """(b, n, h*d) -> (b, h, n, d)."""
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, n, h*d)."""
    return x.transpose(1, 2).flatten(2)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention to the text, softmax(q k^T / sqrt(d)) v: q (b, h, n, d), k and v (b, h, m, d) -> (b, h, n, d).

    The "main" attention elsewhere, as opposed to the maps. Fork here: on a GPU, `--attention auto` compares the kernel
    with this function and drops it where they differ. Where the probabilities themselves are wanted, the same is
        p = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)  # (b, h, n, m)
        return p @ v
    """
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Every pixel looks at every pixel: (b, n, c) -> (b, n, c)."""

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        self.num_heads = cfg.heads(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # a Sequential for the name `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.to_q, self.to_k, self.to_v))  # (b, h, n, d) each
        out = F.scaled_dot_product_attention(q, k, v)  # (b, h, n, d)
        return self.to_out(merge_heads(out))  # (b, n, c)


class CrossAttention(nn.Module):
    """Every pixel looks at the text: (b, n, c), (b, m, c_text) -> (b, n, c).

    The UNet gives each layer its `name`, as in the state dict, and its `factor`: how many times smaller than the
    latent its grid is, per side.
    """

    name: str
    factor: int

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        self.num_heads = cfg.heads(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(cfg.context_dim, channels, bias=False)
        self.to_v = nn.Linear(cfg.context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
        q = split_heads(self.to_q(x), self.num_heads)  # (b, h, n, d)
        k = split_heads(self.to_k(context), self.num_heads)  # (b, h, m, d)
        v = split_heads(self.to_v(context), self.num_heads)  # (b, h, m, d)
        answers = [hook.attention(self, q, k, v) for hook in hooks]
        out = next((answer for answer in answers if answer is not None), None)
        if out is None:
            out = cross_attention(q, k, v)  # (b, h, n, d)
        out = self.to_out(merge_heads(out))  # (b, n, c)
        for hook in hooks:
            out = hook.output(self, out)
        return out


class GEGLU(nn.Module):
    """A linear layer gated by the exact GELU of another: (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)  # (..., dim_out) each
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers, four times as wide inside: (b, n, c) -> (b, n, c)."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a layer norm and beside a shortcut, on (b, n, c)."""

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        self.attn1 = SelfAttention(channels, cfg)
        self.attn2 = CrossAttention(channels, cfg)
        self.ff = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels, cfg.eps_layer)
        self.norm2 = nn.LayerNorm(channels, cfg.eps_layer)
        self.norm3 = nn.LayerNorm(channels, cfg.eps_layer)

    def forward(self, x: Tensor, context: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, hooks)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map: (b, c, height, width) -> (b, c, height, width)."""

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.num_groups, channels, cfg.eps_transformer)
        self.linear = cfg.linear
        self.proj_in = nn.Linear(channels, channels) if cfg.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, cfg)])
        self.proj_out = nn.Linear(channels, channels) if cfg.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
        y = self.norm(x)
        y = y if self.linear else self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)  # (b, n, c)
        y = self.proj_in(y) if self.linear else y
        for block in self.transformer_blocks:
            y = block(y, context, hooks)
        y = self.proj_out(y) if self.linear else y
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])  # (b, c, height, width)
        return x + (y if self.linear else self.proj_out(y))
