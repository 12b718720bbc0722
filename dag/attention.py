"""Attention of SD 1.4's UNet. Parameter names are the checkpoint's; this is the file to fork for other attention.

Letters, here and everywhere: b batch rows, h heads, n pixels of one layer (height*width), m text tokens, d channels of
one head, c = h*d channels, K concept rows of guideline tokens (beside the background row).
Source: CompVis ldm/modules/attention.py; the maps are method Eq. 1 (see `guideline_maps`).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig


def split_heads(x: Tensor, h: int) -> Tensor:
    """(b, n, h*d) -> (b, h, n, d)."""
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, n, h*d)."""
    return x.transpose(1, 2).flatten(2)


def guideline_maps(q: Tensor, dk: Tensor) -> Tensor:
    """How much each pixel attends to each concept row rather than to the background row, averaged over heads.

    q (b, h, n, d) are the layer's queries; dk (h, K, d) are the guideline keys of the K concept rows minus the
    background row's, over sqrt(d). Returns (b, K, n) float32 in (0, 1).
    One concept row against the background row is a softmax of two, which is a sigmoid of the difference:
    softmax([q.k_0, q.k_k] / sqrt(d))_1 = sigmoid(q.(k_k - k_0) / sqrt(d))  (paper Eq. 1 with OVAM's background row).
    """
    return torch.sigmoid(q.float() @ dk.float().transpose(1, 2)).mean(1).transpose(1, 2)  # (b, h, n, K) -> (b, K, n)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The main attention: q (b, h, n, d), k and v (b, h, m, d) -> (b, h, n, d).

    Fork here; where the probabilities themselves are wanted, the same is
        p = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)  # (b, h, n, m)
        return p @ v
    The fused kernel has its own copy of this formula and of `guideline_maps`: a fork uses attention "plain".
    """
    return F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v


def cross_attention_with_maps(
    q: Tensor, k: Tensor, v: Tensor, dk: Tensor, rows: slice | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The same, and the guideline maps of some batch rows, for dk (h, K, d): (b, h, n, d) and (rows, K, n) float32.

    This is the plain one: it runs everywhere, and kernels/cross_attention.py, which reads q once, is tested against it.
    """
    return cross_attention(q, k, v), guideline_maps(q[rows], dk)


def implementation(choice: str, device: torch.device, dtype: torch.dtype, K: int = 1, d: int = 1) -> Callable:
    """The function that computes both: for "plain" the one above, for "fused" the kernel, for "auto" by the rule below.

    device, dtype: of the queries; K: concept rows; d: channels of a head. Raises ValueError where "fused" cannot run.
    """
    # The rule. The compiled kernel has never run on a GPU: once `python -m kernels.bench` has passed on one, let "auto"
    # be device.type == "cuda". Where the kernel cannot run, "auto" is plain in any case.
    rule = {"auto": False, "plain": False, "fused": True}
    if choice not in rule:
        raise ValueError(f"attention is '{choice}', expected {', '.join(rule)}")
    if not rule[choice]:
        return cross_attention_with_maps
    try:
        from kernels import cross_attention as kernel  # here: it needs triton, this package does not

        obstacle = kernel.obstacle(device, dtype, K, d)
    except ImportError as e:
        obstacle = f"kernels/cross_attention.py cannot be imported ({e})"
    if obstacle is None:
        return kernel.cross_attention_with_maps
    if choice == "fused":
        raise ValueError(f"the fused kernel cannot run: {obstacle}; use auto or plain")
    return cross_attention_with_maps


class SelfAttention(nn.Module):
    """Every pixel looks at every pixel: (b, n, c) -> (b, n, c)."""

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # a Sequential for the name `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.to_q, self.to_k, self.to_v))  # (b, h, n, d) each
        out = F.scaled_dot_product_attention(q, k, v)  # (b, h, n, d)
        return self.to_out(merge_heads(out))  # (b, n, c)


class CrossAttention(nn.Module):
    """Every pixel looks at the text, and if a probe asks at guideline tokens: (b, n, c), (b, m, c_text) -> (b, n, c).

    The probe never touches the output: the main attention is the same call with and without it, so a picture in which
    nothing is found is bit for bit the unguided one. (With the fused kernel, which is another call: within rounding.)
    """

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(cfg.context_dim, channels, bias=False)
        self.to_v = nn.Linear(cfg.context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, probe=None) -> Tensor:  # probe: cam.Probe or cam.QueryCache
        q = split_heads(self.to_q(x), self.num_heads)  # (b, h, n, d)
        k = split_heads(self.to_k(context), self.num_heads)  # (b, h, m, d)
        v = split_heads(self.to_v(context), self.num_heads)  # (b, h, m, d)
        dk = None if probe is None else probe.see(self, q)  # (h, K, d) if it wants maps of this layer
        if dk is None:
            out = cross_attention(q, k, v)  # (b, h, n, d)
        else:
            out, probe.seen[self] = probe.attention(q, k, v, dk, probe.rows)  # (b, h, n, d), (rows, K, n)
        return self.to_out(merge_heads(out))  # (b, n, c)


class GEGLU(nn.Module):
    """A linear layer gated by the exact GELU of another: (..., a) -> (..., b)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)  # (..., b) each
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

    def forward(self, x: Tensor, context: Tensor, probe=None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, probe)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map: (b, c, height, width) -> (b, c, height, width)."""

    def __init__(self, channels: int, cfg: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.num_groups, channels, cfg.eps_transformer)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, cfg)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, probe=None) -> Tensor:
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (b, n, c)
        for block in self.transformer_blocks:
            y = block(y, context, probe)
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])  # (b, c, height, width)
        return x + self.proj_out(y)
