"""Where and how strongly to guide, from detection maps alone: objects, AreaScaler, MagnitudeScaler.

S = S_area * T (paper Eq. 5), with S_area from Algorithm 1. Maps are (..., H, W) float32, any number of them at once, in
a number of passes that hardly grows with H and W; each map's result is that of the map alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Scaling


def components(mask: Tensor) -> Tensor:
    """8-connected components: (..., H, W) bool -> int64 labels, 1 + the place of a component's last pixel, 0 outside.

    Every pixel points to a later one of its component, at first to itself. Where pixels touch, the ends they point to
    are joined, and all pointers are followed twice as far, until nothing changes: 7 times for a spiral of 64 x 64.
    """
    H, W = mask.shape[-2:]
    flat = F.pad(mask.flatten(-2), (1, 0))  # (..., 1 + H*W), with nothing in front, where label 0 leads
    labels = torch.arange(1 + H * W, device=mask.device) * flat
    while True:
        grid = labels[..., 1:].reshape(-1, 1, H, W).double()  # max_pool2d takes no integers everywhere
        around = F.max_pool2d(grid, 3, stride=1, padding=1).long().reshape(mask.shape).flatten(-2) * flat[..., 1:]
        grown = labels.scatter_reduce(-1, labels[..., 1:], around, "amax")
        grown = torch.maximum(grown, F.pad(around, (1, 0)))
        grown = grown.gather(-1, grown)
        grown = grown.gather(-1, grown)
        if torch.equal(grown, labels):
            return labels[..., 1:].reshape(mask.shape)
        labels = grown


def objects(A: Tensor, cfg: Scaling) -> tuple[Tensor, Tensor]:
    """Components of A >= unsafe that are large enough: labels, 0 outside, and the area of each pixel's object as a
    share of the frame, both (..., H, W)."""
    labels = components(cfg.unsafe <= A)
    flat = labels.flatten(-2)  # (..., H*W)
    counts = A.new_zeros(*flat.shape[:-1], 1 + flat.shape[-1]).scatter_add(-1, flat, A.new_ones(flat.shape))
    areas = (counts.gather(-1, flat) / flat.shape[-1]).reshape(A.shape)
    keep = (labels > 0) & (areas >= cfg.min_area)
    return labels * keep, areas * keep


def area_scaler(A: Tensor, cfg: Scaling) -> Tensor:
    """Algorithm 1: (..., H, W) -> S_area, zero where nothing is to be guided."""
    edit = cfg.edit <= A
    formed = edit.float().mean((-2, -1), keepdim=True) < cfg.full  # else nothing has formed yet, or it fills the frame
    edit = edit & formed
    labels, areas = objects(A * formed, cfg)
    S_unsafe = cfg.area_gain * areas  # sum_i area_gain * share_i * object_i
    regions = components(edit).flatten(-2)  # (..., H*W)
    inside = labels.flatten(-2).sign()  # 1 in objects
    holds = torch.zeros_like(F.pad(regions, (1, 0))).scatter_reduce(-1, regions, inside, "amax")  # has it an object?
    rim = edit & holds.gather(-1, regions).reshape(A.shape).bool() & (labels == 0)  # connected to one, but not of one
    return torch.where(rim, nearest(S_unsafe, labels > 0), S_unsafe) if rim.any() else S_unsafe


def nearest(values: Tensor, sources: Tensor) -> Tensor:
    """The value of the source nearest to each pixel, (..., H, W): Euclidean, exact; a tie goes to the larger value.

    values are 0 or more, and 0 where no source is. The squared distance is a sum over the two axes, so that its minimum
    can be taken over one axis after the other.
    """

    def along(squared: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum over places on the last axis, and the largest value of those that attain it."""
        place = torch.arange(squared.shape[-1], device=squared.device)
        total = squared[..., None, :] + (place[:, None] - place).square()  # (..., last, last)
        least = total.amin(-1)  # (..., last)
        return least, torch.where(total == least[..., None], values[..., None, :], 0.0).amax(-1)

    squared, found = along(torch.where(sources, 0.0, torch.inf), values)
    return along(squared.transpose(-2, -1), found.transpose(-2, -1))[1].transpose(-2, -1)


def magnitude_scaler(A: Tensor, cfg: Scaling) -> Tensor:
    """T = min(A / edit, magnitude) where A >= edit, else 0 (Eq. 5 prints max, its text says 1 <= T <= 5)."""
    return torch.where(cfg.edit <= A, (A / cfg.edit).clamp(max=cfg.magnitude), 0.0)


def strength(A: Tensor, cfg: Scaling) -> Tensor:
    """A (..., H, W) -> S: the strength of guidance at each pixel.

    The ablations of the paper's Table 5: area_gain None switches Algorithm 1, the AreaScaler, off (S_area = 1);
    magnitude 1 switches the MagnitudeScaler off (T = 1 wherever A >= edit).
    """
    T = magnitude_scaler(A, cfg)
    S = T if cfg.area_gain is None else area_scaler(A, cfg) * T
    return S if cfg.s_max is None else S.clamp(max=cfg.s_max)


def scale_map(A: Tensor, scalings: list[Scaling]) -> Tensor:
    """A (b, concepts, H, W), each concept with its constants -> S (b, concepts, H, W)."""
    return torch.stack([strength(A[:, k], scaling) for k, scaling in enumerate(scalings)], 1)
