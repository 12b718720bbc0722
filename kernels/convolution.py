"""The networks' 3 x 3 convolutions in Winograd's way, on a CPU, without gradients, where that is faster.

Loading puts it in place of nn.Conv2d's (`install`); the networks are written, and read, without it.

A tile of 4 x 4 outputs then takes 36 products per pair of channels instead of 144. Its transforms evaluate polynomials
at POINTS and at infinity; these points halve the error of the usual 0, 1, -1, 2, -2.
Nothing is kept between calls: weights may be moved, replaced, parametrised or trained as in any nn.Conv2d.
Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks".
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
TILES = 128  # at once, so that what is between the transforms stays in the processor's cache


def _powers(n: int) -> np.ndarray:
    """(6, n): polynomials with n coefficients -> their values at POINTS and at infinity."""
    return np.vstack([np.vander(POINTS, n, increasing=True), np.eye(n)[-1:]])


OF_WEIGHTS, OF_INPUTS, OF_OUTPUTS = (  # (36, 9), (36, 36), (16, 36), row by row of a tile
    torch.from_numpy(np.kron(m, m)).float() for m in (_powers(3), np.linalg.inv(_powers(6)).T, _powers(4).T)
)


def winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (b, c, height, width), weight (o, c, 3, 3), bias (o,) -> (b, o, height, width).

    Padding is 1; height and width are multiples of 4.
    """
    (_, c, height, width), o = x.shape, len(weight)
    w = (OF_WEIGHTS @ weight.reshape(o * c, 9).T).view(36, o, c)
    out = x.new_empty(len(x), o, height, width)
    rows = -(-4 * TILES // width)  # of tiles
    for picture, to in zip(x, out, strict=True):
        for top in range(0, height, 4 * rows):
            end = min(top + 4 * rows, height)
            part = F.pad(picture[:, max(top - 1, 0) : end + 1], (1, 1, int(top == 0), int(end == height)))
            part = part.unfold(1, 6, 4).unfold(2, 6, 4).permute(3, 4, 0, 1, 2)  # (6, 6, c, rows, width/4), a view
            y = w @ (OF_INPUTS @ part.reshape(36, -1)).view(36, c, -1)  # (36, o, tiles)
            y = (OF_OUTPUTS @ y.view(36, -1)).view(4, 4, o, -1, width // 4)  # (4, 4, o, rows, width/4)
            y = y.permute(2, 3, 0, 4, 1).reshape(o, end - top, width)  # pixels again
            torch.add(y, bias[:, None, None], out=to[:, top:end])
    return out


def _faster(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether winograd is: on a CPU, on wide layers with many pixels, where no gradient is asked for."""
    (o, c, *_), (height, width) = weight.shape, x.shape[2:]
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and height % 4 == width % 4 == 0
    learns = torch.is_grad_enabled() and any(y.requires_grad for y in (x, weight, bias))
    return fits and min(o, c) >= 128 and height * width >= 4096 and not learns and not torch.compiler.is_compiling()


class Conv3x3(nn.Conv2d):
    """(b, in, height, width) -> (b, out, height, width): nn.Conv2d with a kernel of 3 x 3 and a padding of 1."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # once: a parametrised weight is made anew at every look
        if _faster(x, weight, bias):
            return winograd(x, weight, bias)
        return self._conv_forward(x, weight, bias)


def install(network: nn.Module) -> None:
    """Make every such convolution of a network a Conv3x3; parameters and their names stay as they are."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1)):
            layer.__class__ = Conv3x3
