"""Detection: from the queries that the UNet computes anyway to the map A of every concept.

    queries of a layer  (b, h, n, d)           seen by `Probe`, a hook, on the conditional rows
    -> map of a layer   (b, concepts, n)       `guideline_maps`: the attention to a concept's rows, in (0, 1)
    -> raw map          (b, concepts, H, W)    `combine`: bilinear to the latent grid, then the mean over the layers
    -> A                (b, concepts, H, W)    `normalise` to [0, 1]

`Probe.read` goes from the second line to the last.
Source: paper section 3.1, Eq. 1; OVAM (Marcos-Manchon et al. 2024) for the background row.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import NO_ROWS, CrossAttention, Hook, cross_attention
from .tokens import GuidelineTokens, Reading
from .unet import UNet

# q, k, v, k_g, split, batch rows -> the main attention (b, h, n, d) and the maps (rows, concepts, n) of these rows.
AttentionWithMaps = Callable[[Tensor, Tensor, Tensor, Tensor, list[int], list[int]], tuple[Tensor, Tensor]]


def layers_of(unet: UNet, reading: Reading) -> list[CrossAttention]:
    """The cross-attention layers that a reading names, in the order they run."""
    return [layer for layer in unet.cross_attention() if reading.has(layer)]


def guideline_keys(layer: CrossAttention, c: Tensor) -> Tensor:
    """Guideline embedding c (g, c_text) -> keys k_g (h, g, d): to_k(c) less its mean over the g rows, over sqrt(d).

    A softmax over the rows does not see what they have in common, and half precision keeps more of the rest. Computed
    in c's dtype and on its device. A wrapped or parametrised to_k works.
    """
    state = {name: p.to(c) if p.is_floating_point() else p for name, p in layer.to_k.state_dict().items()}
    k = torch.func.functional_call(layer.to_k, state, c).unflatten(-1, (layer.num_heads, -1))  # (g, h, d)
    return ((k - k.mean(0)) / k.shape[-1] ** 0.5).transpose(0, 1)  # (h, g, d)


def keys_by_layer(layers: Sequence[CrossAttention], c: Tensor) -> dict[CrossAttention, Tensor]:
    """The guideline keys (h, g, d) of each layer, for an embedding (g, c_text) or (layers, g, c_text)."""
    rows = c.expand(len(layers), -1, -1)  # (layers, g, c_text)
    return {layer: guideline_keys(layer, own) for layer, own in zip(layers, rows, strict=True)}


def guideline_maps(q: Tensor, k_g: Tensor, split: Sequence[int], heads: str = "mean") -> Tensor:
    """How much of each pixel's attention to a concept's guideline rows goes to the concept, not to the background.

    q (b, h, n, d) are the layer's queries; k_g (h, g, d) the `guideline_keys` of all concepts, one after the other;
    split: how many of the g rows are the first concept's background, then the concept, the second one's background, ...
    Returns (b, concepts, n) in (0, 1), the "mean" or "max" over heads, float32 (float64 for float64).
    Per head: softmax(q k_g^T) over the rows of one concept, summed over those that are not background. With one row of
    either this is OVAM's map, a softmax of two.
    """
    concepts = list(zip(split[::2], split[1::2], strict=True))
    if len(set(concepts)) > 1:  # not the same number of rows each: one after the other
        keys = k_g.split([sum(rows) for rows in concepts], dim=1)
        return torch.cat([guideline_maps(q, own, rows, heads) for own, rows in zip(keys, concepts, strict=True)], 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k_g.to(wide).transpose(1, 2)  # (b, h, n, g)
    p = logits.unflatten(3, (len(concepts), -1)).softmax(4)  # (b, h, n, concepts, rows)
    maps = p[..., split[0] :].sum(4)  # (b, h, n, concepts)
    return (maps.mean(1) if heads == "mean" else maps.amax(1)).transpose(1, 2)  # (b, concepts, n)


def attention_with_maps(
    q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, split: Sequence[int], rows: slice | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Main attention (b, h, n, d), and maps (rows, concepts, n) of some batch rows: the kernel is tested against it."""
    return cross_attention(q, k, v), guideline_maps(q[rows], k_g, split)


def combine(maps: list[Tensor], factors: list[int], H: int, W: int) -> Tensor:
    """Maps of layers (b, concepts, n), on grids of H/f x W/f -> raw maps (b, concepts, H, W), the mean over layers."""
    found = dict.fromkeys(range(len(maps)))  # in the layers' order, which decides how their sum is rounded
    for f in set(factors):  # layers with the same grid at once
        own = [k for k in found if factors[k] == f]
        grid = torch.cat([maps[k] for k in own]).unflatten(2, (H // f, W // f))  # (layers*b, concepts, H/f, W/f)
        large = F.interpolate(grid, (H, W), mode="bilinear", align_corners=False)  # (layers*b, concepts, H, W)
        found |= zip(own, large.chunk(len(own)), strict=True)
    return torch.stack(list(found.values())).mean(0)


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
        layers = layers_of(unet, self.reading)
        with torch.no_grad():
            keys = [keys_by_layer(layers, one.embedding) for one in tokens]
            self.k_g = {
                layer: torch.cat([own[layer] for own in keys], dim=1).to(weight).to(kept) for layer in layers
            }  # (h, g of all concepts, d) each
        self.split = [rows for one in tokens for rows in one.split]
        self.maps: dict[CrossAttention, Tensor] = dict.fromkeys(self.k_g)  # become (b, concepts, n) each

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer not in self.k_g or self.call.cond == NO_ROWS:
            return None
        k_g = self.k_g[layer]
        if self.fused is None:
            self.maps[layer] = guideline_maps(q[self.call.cond], k_g, self.split, self.reading.heads)
            return None
        rows = list(range(len(q)))[self.call.cond]
        out, self.maps[layer] = self.fused(q, k, v, k_g, self.split, rows)  # (b, h, n, d), (rows, concepts, n)
        return out

    def read(self, t: int, H: int, W: int) -> Tensor:
        """A of the last call with conditional rows, at its t and latent grid: (b, concepts, H, W) in [0, 1]."""
        raw = combine(list(self.maps.values()), [layer.factor for layer in self.maps], H, W)  # (b, concepts, H, W)
        return torch.stack([normalise(one, raw[:, k], t) for k, one in enumerate(self.tokens)], 1).float()
