"""Detection: guideline cross-attention maps (CAM), from the queries the UNet computes anyway.

    map of a layer   (b, K, n)         guideline_maps in attention.py, on the conditional rows
    -> its grid      (b, K, H/f, W/f)
    -> latent grid   (b, K, H, W)      bilinear, then the mean over layers, in (0, 1)
    -> raw map       (b, H, W)         a concept's K rows in one: their mean or minimum (tokens.py)
    -> A             (b, H, W)         normalised to [0, 1] (tokens.py)

Source: paper section 3.1, Eq. 1; OVAM for the background row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import CrossAttention, implementation
from .unet import UNet


def probed_layers(unet: UNet, factors: tuple[int, ...]) -> dict[CrossAttention, int]:
    """The cross-attention layers on the latent grid divided by one of `factors`, each with its factor."""
    return {layer: f for f, layer in unet.cross_attention() if f in factors}


class Probe:
    """What a UNet call is given to read the maps of one or several concepts' guideline tokens.

    embeddings: one (1+K, c_text) a concept; factors: the layers looked at, by how much smaller their grid is than the
    latent's; rows: the rows of the batch looked at; attention: auto, plain or fused (attention.py). The
    guideline keys depend on model and tokens only and are computed once, here. A UNet call fills the probe; `maps` then
    tells what was seen.
    """

    def __init__(
        self,
        unet: UNet,
        embeddings: list[Tensor],
        factors: tuple[int, ...],
        rows: slice = slice(None),
        attention: str = "auto",
    ):
        self.rows = rows
        self.counts = [len(c) - 1 for c in embeddings]  # concept rows K of each concept
        self.layers = probed_layers(unet, factors)
        self.keys: dict[CrossAttention, Tensor] = {}  # (h, sum of K, d) each
        for layer in self.layers:
            with torch.no_grad():
                dk = [key_differences(layer, c) for c in embeddings]
            self.keys[layer] = torch.cat(dk, dim=1).to(layer.to_k.weight)  # device and dtype of the other keys
        self.seen: dict[CrossAttention, Tensor] = {}  # (rows, sum of K, n) each
        weight, d = unet.out[2].weight, max((dk.shape[-1] for dk in self.keys.values()), default=1)
        self.attention = implementation(attention, weight.device, weight.dtype, sum(self.counts), d)

    def see(self, layer: CrossAttention, q: Tensor) -> Tensor | None:
        """Called by every cross-attention layer with its queries (b, h, n, d): which guideline keys to look for."""
        return self.keys.get(layer)

    def maps(self, H: int, W: int) -> tuple[Tensor, ...]:
        """The last UNet call's maps of every concept's rows, (rows, K, H, W) float32 in (0, 1) each."""
        seen = [self.seen[layer] for layer in self.layers]
        return combine(seen, list(self.layers.values()), H, W).split(self.counts, dim=1)


class QueryCache:
    """A probe that keeps the queries themselves, for the optimisation: `queries[layer]` (b, h, n, d).

    In half precision and on the CPU: 8 pictures at 25 noise levels of SD 1.4 are 2 GB of them.
    """

    def __init__(self, unet: UNet, factors: tuple[int, ...]):
        self.layers = probed_layers(unet, factors)
        self.queries: dict[CrossAttention, Tensor] = {}

    def see(self, layer: CrossAttention, q: Tensor) -> None:
        """Called by every cross-attention layer with its queries (b, h, n, d); no maps are wanted."""
        if layer in self.layers:
            self.queries[layer] = q.to("cpu", torch.float16)


def key_differences(layer: CrossAttention, c: Tensor) -> Tensor:
    """Guideline embedding c (1+K, c_text) -> (h, K, d) float32, on c's device: (k_k - k_0) / sqrt(d), k = W_K c."""
    k = F.linear(c, layer.to_k.weight.to(c)).unflatten(-1, (layer.num_heads, -1)).transpose(0, 1)  # (h, 1+K, d)
    return (k[:, 1:] - k[:, :1]) / k.shape[-1] ** 0.5


def combine(maps: list[Tensor], factors: list[int], H: int, W: int) -> Tensor:
    """Maps of layers (b, K, n_layer), on grids of H/f x W/f -> mean over layers on the latent grid, (b, K, H, W)."""
    grids = [a.unflatten(2, (H // f, W // f)) for a, f in zip(maps, factors, strict=True)]  # (b, K, H/f, W/f)
    return torch.stack([F.interpolate(a, (H, W), mode="bilinear", align_corners=False) for a in grids]).mean(0)
