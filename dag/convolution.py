"""The networks' 3 x 3 convolution. On a CPU, without gradients, it is computed in Winograd's way where that is faster.

A tile of 4 x 4 outputs then takes 36 products per pair of channels instead of 144. Its transforms evaluate polynomials
at POINTS and at infinity; these points keep the error near the plain sum's (the usual 0, 1, -1, 2, -2 triple it).
Nothing is kept between calls: weights may be moved, replaced, parametrised or trained as in any nn.Conv2d.
Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks".
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = (0, 1, -1, 0.5, -2)
TILES = 128  # at once, so that what is between the transforms stays in the processor's cache


def _powers(n: int) -> np.ndarray:
    """(6, n): polynomials with n coefficients -> their values at POINTS and at infinity."""
    return np.vstack([np.vander(POINTS, n, increasing=True), np.eye(n)[-1:]])


OF_WEIGHTS, OF_INPUTS, OF_OUTPUTS = (  # (36, 9), (36, 36), (16, 36), row by row of a tile
    torch.from_numpy(np.kron(m, m)).float() for m in (_powers(3), np.linalg.inv(_powers(6)).T, _powers(4).T)
)


def winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (b, c, height, width), weight (o, c, 3, 3), bias (o,) -> (b, o, height, width) with channels last.

    Padding is 1; height and width are multiples of 4.
    """
    (b, c, height, width), o = x.shape, len(weight)
    w = (OF_WEIGHTS @ weight.reshape(o * c, 9).T).view(36, o, c).transpose(1, 2)  # (36, c, o)
    x = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)  # (b, c, height+2, width+2)
    x = x.unfold(2, 6, 4).unfold(3, 6, 4).permute(0, 4, 5, 2, 3, 1)  # (b, 6, 6, height/4, width/4, c), a view
    out = x.new_empty(b, height, width, o)
    rows = -(-TILES // (width // 4))  # of tiles
    for tiles, pixels in zip(x, out, strict=True):
        for part, to in zip(tiles.split(rows, 2), pixels.split(4 * rows), strict=True):
            y = (OF_INPUTS @ part.reshape(36, -1)).view(36, -1, c) @ w  # (36, tiles, o)
            y = (OF_OUTPUTS @ y.view(36, -1)).view(4, 4, *part.shape[2:4], o)  # (4, 4, rows, width/4, o)
            torch.add(y.permute(2, 0, 3, 1, 4), bias, out=to.view(-1, 4, width // 4, 4, o))
    return out.permute(0, 3, 1, 2)  # (b, o, height, width)


def _faster(x: Tensor, weight: Tensor) -> bool:
    """Whether winograd is: on wide layers with many pixels, in what it is measured and exact in."""
    (o, c, *_), (height, width) = weight.shape, x.shape[2:]
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and height % 4 == width % 4 == 0
    return fits and min(o, c) >= 128 and height * width >= 1024 and not learns and not torch.compiler.is_compiling()


class Conv3x3(nn.Conv2d):
    """(b, in, height, width) -> (b, out, height, width): nn.Conv2d with a kernel of 3 x 3 and a padding of 1."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return winograd(x, self.weight, self.bias) if _faster(x, self.weight) else super().forward(x)
