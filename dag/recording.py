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
from .cam import combine, keys_by_layer, layers_of
from .sampling import Step
from .tokens import GuidelineTokens, Reading
from .unet import UNet

DECODED = 6  # steps of a picture that are decoded, at most: with the miniature that is most of what recording costs
GRID = 16  # attention is kept on a grid whose shorter side has at most as many places


class TextMaps(Hook):
    """The attention of every pixel to the text in the last UNet call with conditional rows, softmax(q k^T / sqrt(d)).

    The text is the prompt, all m tokens of it. With `tokens`, it is their g guideline rows instead. Mean over heads,
    then over the layers that `reading` names. Source: Tang et al. 2023, "What the DAAM".
    """

    @torch.no_grad()
    def __init__(self, unet: UNet, reading: Reading, tokens: GuidelineTokens | None = None):
        self.maps: dict[CrossAttention, Tensor] = dict.fromkeys(layers_of(unet, reading))  # become (b, m or g, n) each
        weight = unet.out[2].weight
        keys = None if tokens is None else keys_by_layer(list(self.maps), tokens.embedding)  # (h, g, d) each
        self.k_g = keys and {layer: k.to(weight.device) for layer, k in keys.items()}

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> None:
        if layer in self.maps and self.call.cond != NO_ROWS:
            q = q[self.call.cond].detach().float()  # (b, h, n, d)
            k = k[self.call.cond].detach().float() / q.shape[-1] ** 0.5 if self.k_g is None else self.k_g[layer]
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
        self.steps: list[Step] = []
        self.kept: list[list[Tensor]] = []  # per step: (b, m, h, w), then (b, g, h, w) of each concept

    def keep(self, step: Step) -> None:
        """Keep a step that was just yielded, and what the hooks saw in it."""
        self.steps.append(step)
        H, W = step.x.shape[2:]
        factor = max(1, min(H, W) // GRID)
        seen = [F.avg_pool2d(hook.read(H, W)[: self.images], factor) for hook in self.hooks]  # (b, m or g, h, w) each
        self.kept.append([maps.cpu() for maps in seen])

    def read(self) -> list[Tensor]:
        """All steps': (b, steps, m, h, w) of the prompt, then (b, steps, g, h, w) of each concept."""
        return [torch.stack(maps, 1) for maps in zip(*self.kept, strict=True)]


def decode_some(sd, x0: Tensor, known: dict[int, Tensor]) -> dict[int, Tensor]:
    """Predicted latents x0 (steps, 4, H, W) on the CPU -> pictures (3, 8H, 8W) in [-1, 1] at some steps.

    These are the known ones, which need not be decoded again, and at most DECODED more: the first step, the last, and
    one after the other the step that is farthest from what `between` makes of it.
    """
    steps = sorted({0, len(x0) - 1, *known})
    while len(steps) < min(DECODED + len(known), len(x0)):
        others = [i for i in range(len(x0)) if i not in steps]
        steps = sorted([*steps, max(others, key=lambda i: between(x0, steps, i)[3])])
    return {i: known[i] if i in known else sd.decode(x0[i : i + 1])[0].cpu() for i in steps}


def between(x0: Tensor, steps: Sequence[int], i: int) -> tuple[int, int, Tensor, float]:
    """The decoded steps on either side of step i, how far each place of its latent has gone from the one to the other,
    (H, W) in [0, 1], and the squared distance that is left.

    The share is of 5 x 5 latent pixels around a place: of one that hardly moves it would be noise.
    """
    before, after = max(k for k in steps if k < i), min(k for k in steps if k > i)
    way, gone = x0[after] - x0[before], x0[i] - x0[before]  # (4, H, W) each
    both = torch.stack([(gone * way).sum(0), way.square().sum(0)])  # (2, H, W)
    along, length = F.avg_pool2d(both, 5, 1, 2, count_include_pad=False)  # (H, W) each
    share = (along / length.clamp(min=1e-6)).clamp(0, 1)
    return before, after, share, (gone - share * way).square().sum().item()


def film(x0: Tensor, decoded: dict[int, Tensor], wanted: Sequence[int]) -> Iterator[Tensor]:
    """One picture as it forms: latents x0 (steps, 4, H, W) on the CPU -> (3, 8H, 8W) in [-1, 1] at the wanted steps.

    Decoding costs more than a small model's step, so only the `decoded` steps have it. At the others a linear map from
    the 4 channels of the latent to RGB, fitted by least squares to the decoded ones, stands in for the decoder; what it
    misses is taken from the decoded steps on either side, at each place as far as its latent has gone from the one to
    the other (`between`).
    """
    steps, (H, W) = sorted(decoded), x0.shape[2:]
    channels = F.pad(x0, (0, 0, 0, 0, 0, 1), value=1.0)  # (steps, 5, H, W)
    seen = torch.stack([F.adaptive_avg_pool2d(decoded[i], (H, W)) for i in steps])  # (decoded, 3, H, W)
    known, target = (maps.transpose(0, 1).flatten(1).T for maps in (channels[steps], seen))  # (decoded*H*W, 5 and 3)
    weights = torch.linalg.lstsq(known, target).solution  # (5, 3)

    def large(maps: Tensor) -> Tensor:
        size = decoded[0].shape[1:]
        return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]  # (channels, 8H, 8W)

    def linear(i: int) -> Tensor:
        return large(torch.einsum("chw,cr->rhw", channels[i], weights))  # (3, 8H, 8W)

    missed = {i: picture - linear(i) for i, picture in decoded.items()}
    for i in wanted:
        if i in decoded:
            yield decoded[i]
        else:
            before, after, share, _ = between(x0, steps, i)
            yield (linear(i) + torch.lerp(missed[before], missed[after], large(share[None]))).clamp(-1, 1)
