"""Detection: from the queries that the UNet computes anyway to the map A of every concept.

    queries of a layer  (b, h, n, d)   seen by `Probe`, a hook, on the conditional rows
    -> map of a layer   (b, K, n)      `guideline_maps`, in (0, 1); K concept rows of guideline tokens
    -> latent grid      (b, K, H, W)   `combine`: bilinear, then the mean over the layers
    -> raw map          (b, H, W)      `raw_map`: the K rows in one, their mean or minimum
    -> A                (b, H, W)      `normalise` to [0, 1]

`Probe.read` goes from the second line to the last and stacks the concepts: A (b, concepts, H, W).
Source: paper section 3.1, Eq. 1; OVAM (Marcos-Manchon et al. 2024) for the background row.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import NO_ROWS, CrossAttention, Hook, cross_attention
from .tokens import GuidelineTokens, Reading
from .unet import UNet

# q, k, v, dk, batch rows -> the main attention (b, h, n, d) and the mean map over heads (rows, K, n) of these rows.
AttentionWithMaps = Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]


def layers_of(unet: UNet, reading: Reading) -> list[CrossAttention]:
    """The cross-attention layers that a reading names, in the order they run."""
    return [layer for layer in unet.cross_attention() if {layer.factor, layer.name} & set(reading.layers)]


def guideline_keys(layer: CrossAttention, c: Tensor) -> Tensor:
    """Guideline embedding c (1+K, c_text) -> (h, K, d): (k_k - k_0) / sqrt(d), with k = to_k(c).

    In c's dtype and on its device: the difference of two keys is small, and half precision would lose it. A wrapped or
    parametrised to_k works.
    """
    state = {name: p.to(c) if p.is_floating_point() else p for name, p in layer.to_k.state_dict().items()}
    k = torch.func.functional_call(layer.to_k, state, c).unflatten(-1, (layer.num_heads, -1))  # (1+K, h, d)
    k = k.transpose(0, 1)  # (h, 1+K, d)
    return (k[:, 1:] - k[:, :1]) / k.shape[-1] ** 0.5


def guideline_maps(q: Tensor, dk: Tensor, heads: str = "mean") -> Tensor:
    """How much each pixel attends to each concept row rather than to the background row, over all heads.

    q (b, h, n, d) are the layer's queries, dk (h, K, d) its `guideline_keys`; heads: their "mean" or "max".
    Returns (b, K, n) in (0, 1), float32 (float64 for float64).
    One concept row against the background row is a softmax of two, which is a sigmoid of the difference:
    softmax([q.k_0, q.k_k] / sqrt(d))_1 = sigmoid(q.(k_k - k_0) / sqrt(d))  (paper Eq. 1 with OVAM's background row).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    maps = torch.sigmoid(q.to(wide) @ dk.to(wide).transpose(1, 2))  # (b, h, n, K)
    return (maps.mean(1) if heads == "mean" else maps.amax(1)).transpose(1, 2)  # (b, K, n)


def attention_with_maps(
    q: Tensor, k: Tensor, v: Tensor, dk: Tensor, rows: slice | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Main attention (b, h, n, d) and maps (rows, K, n) of some batch rows: what the fused kernel is tested against."""
    return cross_attention(q, k, v), guideline_maps(q[rows], dk)


def combine(maps: list[Tensor], factors: list[int], H: int, W: int) -> Tensor:
    """Maps of layers (b, K, n), on grids of H/f x W/f -> mean over layers on the latent grid, (b, K, H, W)."""
    found = dict.fromkeys(range(len(maps)))  # in the layers' order, which decides how their sum is rounded
    for f in set(factors):  # layers with the same grid at once
        own = [k for k in found if factors[k] == f]
        grid = torch.cat([maps[k] for k in own]).unflatten(2, (H // f, W // f))  # (layers*b, K, H/f, W/f)
        large = F.interpolate(grid, (H, W), mode="bilinear", align_corners=False)  # (layers*b, K, H, W)
        found |= zip(own, large.chunk(len(own)), strict=True)
    return torch.stack(list(found.values())).mean(0)


def raw_map(tokens: GuidelineTokens, maps: Tensor) -> Tensor:
    """The maps of the K rows (b, K, H, W) -> the raw map (b, H, W), in (0, 1)."""
    return maps.mean(1) if tokens.reduce == "mean" else maps.amin(1)


def normalise(tokens: GuidelineTokens, raw: Tensor, t: int) -> Tensor:
    """Raw map (b, H, W) at timestep t -> A (b, H, W) in [0, 1].

    By `tokens.normalisation`. "fitted": the tokens' constants, A = clamp((raw - lo) / (hi - lo), 0, 1). "joint": OVAM's
    min-max over both rows, concept and background, so that raw = 1/2 stays 1/2. "map": the min-max of the raw map, so
    that A reaches 1 in every picture, whatever it shows. OVAM takes one minimum and maximum over all pictures of a
    call; here each picture has its own, so that it does not depend on its neighbours.
    """
    how = tokens.normalisation or ("fitted" if tokens.levels else "joint")
    if how == "fitted":
        lo, hi = tokens.limits(t)
        return ((raw - lo) / (hi - lo)).clamp(0, 1)
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)  # (b, 1, 1)
    if how == "joint":
        low, high = torch.minimum(low, 1 - high), torch.maximum(high, 1 - low)
    return (raw - low) / (high - low).clamp(min=1e-6)


class Probe(Hook):
    """Records the maps of one or several concepts' guideline tokens during a UNet call; `read` tells what was seen.

    tokens: one set per concept, all with the same reading. fused: the kernel, which computes the main attention too;
    None: plain PyTorch, which leaves the main attention alone. The guideline keys depend on model and tokens only and
    are computed once, here.
    """

    def __init__(self, unet: UNet, tokens: Sequence[GuidelineTokens], fused: AttentionWithMaps | None = None):
        self.tokens, self.fused, self.reading = tokens, fused, tokens[0].reading
        if fused is not None and self.reading.heads != "mean":
            raise ValueError(f"the kernel takes the mean over heads, these tokens their {self.reading.heads}")
        weight = unet.out[2].weight  # its device and dtype are those of all keys
        # The kernel takes these rounded keys as they are; `guideline_maps` computes in float32, converted once here.
        kept = weight.dtype if fused is not None else torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            self.dk = {
                layer: torch.cat([guideline_keys(layer, one.embedding) for one in tokens], dim=1).to(weight).to(kept)
                for layer in layers_of(unet, self.reading)
            }  # (h, sum of K, d) each
        self.maps: dict[CrossAttention, Tensor] = dict.fromkeys(self.dk)  # become (b, sum of K, n) each

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer not in self.dk or self.call.cond == NO_ROWS:
            return None
        if self.fused is None:
            self.maps[layer] = guideline_maps(q[self.call.cond], self.dk[layer], self.reading.heads)  # (b, sum of K, n)
            return None
        rows = list(range(len(q)))[self.call.cond]
        out, self.maps[layer] = self.fused(q, k, v, self.dk[layer], rows)  # (b, h, n, d), (rows, sum of K, n)
        return out

    def read(self, t: int, H: int, W: int) -> Tensor:
        """A of the last call with conditional rows, at its t and latent grid: (b, concepts, H, W) in [0, 1]."""
        maps = combine([self.maps[layer] for layer in self.dk], [layer.factor for layer in self.dk], H, W)
        own = maps.split([len(one.embedding) - 1 for one in self.tokens], dim=1)  # (b, K, H, W) per concept
        A = [normalise(one, raw_map(one, a), t) for one, a in zip(self.tokens, own, strict=True)]  # (b, H, W) each
        return torch.stack(A, 1).float()
