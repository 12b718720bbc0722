"""What a run can show beyond its pictures: the attention of every place to the text, and the picture as it forms.

A `Recording` brings hooks that only look: pictures drawn beside it are bit for bit those without it.
    recording = Recording(sd, [tokens])
    for step in dag.sample(sd, prompts, guidance, hooks=recording.hooks):
        recording.keep(step)
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import NO_ROWS, CrossAttention, Hook
from .cam import combine, guideline_keys, layers_of
from .sampling import Step
from .tokens import GuidelineTokens, Reading
from .unet import UNet

DECODED = 10  # a picture is decoded at about as many steps, however many there are
GRID = 16  # attention is kept on a grid whose shorter side has at most as many places


class TextMaps(Hook):
    """The attention of every pixel to the text in the last UNet call with conditional rows: p = softmax(q k^T / sqrt(d)).

    The text is the prompt, all m tokens of it. With `tokens`, it is their g guideline rows instead. Mean over heads, then
    over the layers that `reading` names. Source: Tang et al. 2023, "What the DAAM".
    """

    def __init__(self, unet: UNet, reading: Reading, tokens: GuidelineTokens | None = None):
        self.maps: dict[CrossAttention, Tensor] = dict.fromkeys(layers_of(unet, reading))  # become (b, m or g, n) each
        weight = unet.out[2].weight
        self.k_g = None if tokens is None else {
            layer: guideline_keys(layer, tokens.embedding).to(weight.device) for layer in self.maps
        }  # (h, g, d) each  # fmt: skip

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> None:
        if layer in self.maps and self.call.cond != NO_ROWS:
            q = q[self.call.cond].float()  # (b, h, n, d)
            k = k[self.call.cond].float() / q.shape[-1] ** 0.5 if self.k_g is None else self.k_g[layer]
            p = torch.softmax(q @ k.transpose(-2, -1), dim=-1)  # (b, h, n, m or g)
            self.maps[layer] = p.mean(1).transpose(1, 2)  # (b, m or g, n)

    def read(self, H: int, W: int) -> Tensor:
        """The share of every pixel's attention that each token has, on the latent grid: (b, m or g, H, W), sum 1."""
        return combine(list(self.maps.values()), [layer.factor for layer in self.maps], H, W)


def reading_of(sd, tokens: Sequence[GuidelineTokens]) -> Reading:
    """The layers that the tokens read; without tokens, those that tokens of this model would."""
    return tokens[0].reading if tokens else Reading(sd.config.cam_factors)


class Recording:
    """The attention of one loop's steps to the prompt's tokens and to the guideline rows of every concept.

    tokens: one set per concept, of one reading; none: the prompt alone, on the model's own layers. images: how many of
    the loop's images are kept, from the first; None: all.
    """

    def __init__(self, sd, tokens: Sequence[GuidelineTokens], images: int | None = None):
        self.images, reading = images, reading_of(sd, tokens)
        self.hooks = [TextMaps(sd.unet, reading, one) for one in (None, *tokens)]
        self.kept: list[list[Tensor]] = []  # per step: (b, m, h, w), then (b, g, h, w) of each concept

    def keep(self, step: Step) -> None:
        """Keep what the hooks saw in a step that was just yielded."""
        H, W = step.x.shape[2:]
        factor = max(1, min(H, W) // GRID)
        seen = [F.avg_pool2d(hook.read(H, W)[: self.images], factor) for hook in self.hooks]  # (b, m or g, h, w) each
        self.kept.append([maps.cpu() for maps in seen])

    def read(self) -> list[Tensor]:
        """All steps': (b, steps, m, h, w) of the prompt, then (b, steps, g, h, w) of each concept."""
        return [torch.stack(maps, 1) for maps in zip(*self.kept, strict=True)]


def decoded_steps(steps: int) -> list[int]:
    """The steps at which a film decodes its picture: every k-th, with the last."""
    return sorted({*range(0, steps, -(-steps // DECODED)), steps - 1})


def latent_features(x0: Tensor) -> Tensor:
    """Latents (s, 4, H, W) -> the 3 x 3 latent pixels around each, and a one: (s, H*W, 37)."""
    around = F.unfold(F.pad(x0, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2)  # (s, H*W, 36)
    return F.pad(around, (0, 1), value=1.0)


def decode_some(sd, x0: Tensor, known: dict[int, Tensor]) -> dict[int, Tensor]:
    """Predicted latents x0 (steps, 4, H, W) -> their pictures (3, 8H, 8W) in [-1, 1] at `decoded_steps`, on the CPU.

    known: steps that need not be decoded, with their pictures.
    """
    return {i: known[i] if i in known else sd.decode(x0[i : i + 1])[0].cpu() for i in decoded_steps(len(x0))}


def film(x0: Tensor, decoded: dict[int, Tensor], wanted: Sequence[int]) -> Iterator[Tensor]:
    """One picture as it forms: latents x0 (steps, 4, H, W) on the CPU -> (3, 8H, 8W) in [-1, 1] at the wanted steps.

    Decoding costs more than a small model's step, so it is done at `decoded_steps` alone. Between them a linear map from
    3 x 3 latent pixels to 8 x 8 of the picture, fitted by least squares to those that are decoded, stands in for the
    decoder; what it misses at the decoded steps on either side is added, in proportion to their distance.
    """
    keys, (H, W) = sorted(decoded), x0.shape[2:]
    factor = decoded[0].shape[1] // H
    features = latent_features(x0)  # (steps, H*W, 37)
    pictures = torch.stack([decoded[i] for i in keys])  # (keys, 3, 8H, 8W)
    patches = F.pixel_unshuffle(pictures, factor).flatten(2).transpose(1, 2)  # (keys, H*W, 3*8*8)
    weights = torch.linalg.lstsq(features[keys].flatten(0, 1), patches.flatten(0, 1)).solution  # (37, 3*8*8)

    def linear(i: int) -> Tensor:
        return F.pixel_shuffle((features[i] @ weights).T.unflatten(1, (H, W)), factor)  # (3, 8H, 8W)

    missed = {i: picture - linear(i) for i, picture in decoded.items()}
    for i in wanted:
        if i in decoded:
            yield decoded[i]
            continue
        before, after = max(k for k in keys if k < i), min(k for k in keys if k > i)
        share = (i - before) / (after - before)
        yield (linear(i) + (1 - share) * missed[before] + share * missed[after]).clamp(-1, 1)
