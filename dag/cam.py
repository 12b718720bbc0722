"""Detection: guideline cross-attention maps (CAM), from the queries the UNet computes anyway.

    raw map of a layer   (b, K, n)     guideline_maps in attention.py, on the conditional rows
    -> its grid          (b, K, H/f, W/f)
    -> latent grid       (b, K, H, W)  bilinear
    -> raw map           (b, H, W)     mean over layers and over the K concept rows, in (0, 1)
    -> A                 (b, H, W)     normalised to [0, 1]

Source: paper section 3.1, Eq. 1; OVAM for the background row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import CrossAttention, guideline_maps
from .tokens import GuidelineTokens
from .unet import UNet


class Probe:
    """What a UNet call is given to read the maps of one concept's guideline tokens.

    The guideline keys depend on the model and the tokens only and are computed here, once. `rows` selects the rows of
    the batch that are looked at. A UNet call fills `maps`; `raw` turns them into one map a row.
    """

    def __init__(self, unet: UNet, tokens: GuidelineTokens, rows: slice = slice(None)):
        self.rows = rows
        self.factors = {layer: f for f, layer in unet.cross_attention() if f in tokens.factors}
        self.keys = {layer: guideline_keys(layer, tokens.embedding) for layer in self.factors}
        self.maps: dict[CrossAttention, Tensor] = {}

    def see(self, layer: CrossAttention, q: Tensor) -> None:
        """Called by every cross-attention layer with its queries (b, h, n, d)."""
        if layer in self.keys:
            self.maps[layer] = guideline_maps(q[self.rows], self.keys[layer])  # (rows, K, n)

    def raw(self, H: int, W: int) -> Tensor:
        """The raw map of the last UNet call, (rows, H, W) float32 in (0, 1)."""
        return combine([self.maps[layer] for layer in self.keys], list(self.factors.values()), H, W).mean(1)


@torch.no_grad()
def guideline_keys(layer: CrossAttention, embedding: Tensor) -> Tensor:
    """Guideline embedding c (1+K, c_text) -> (h, K, d) float32: (k_k - k_0) / sqrt(d) with k = W_K c."""
    return key_differences(layer, embedding.to(layer.to_k.weight))


def key_differences(layer: CrossAttention, c: Tensor) -> Tensor:
    """The same with gradients, for the optimisation of c."""
    k = layer.to_k(c).float().unflatten(-1, (layer.num_heads, -1)).transpose(0, 1)  # (h, 1+K, d)
    return (k[:, 1:] - k[:, :1]) / k.shape[-1] ** 0.5


def combine(maps: list[Tensor], factors: list[int], H: int, W: int) -> Tensor:
    """Maps of layers (b, K, n_layer), whose grids are H/f x W/f -> mean over layers on the latent grid, (b, K, H, W)."""
    grids = [a.unflatten(2, (H // f, W // f)) for a, f in zip(maps, factors, strict=True)]  # (b, K, H/f, W/f)
    return torch.stack([F.interpolate(a, (H, W), mode="bilinear", align_corners=False) for a in grids]).mean(0)


def normalise(raw: Tensor, tokens: GuidelineTokens, t: int) -> Tensor:
    """Raw map (b, H, W) -> A (b, H, W) in [0, 1].

    `fitted` tokens carry constants: A = clamp((raw - lo) / (hi - lo), 0, 1), lo and hi read at noise level t.
    `joint` is OVAM's: one min-max over both rows, concept and background, so that raw = 1/2 stays 1/2; for tokens that
    were not optimised. OVAM takes it over all pictures of a call; here over each picture, which then does not depend on
    what it is drawn beside.
    """
    if tokens.lo:
        lo, hi = tokens.limits(t)
        return ((raw - lo) / (hi - lo)).clamp(0, 1)
    low = torch.minimum(raw, 1 - raw).amin((1, 2), keepdim=True)  # (b, 1, 1)
    return (raw - low) / (1 - 2 * low).clamp(min=1e-6)
