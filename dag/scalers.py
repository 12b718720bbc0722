"""Where and how strongly to guide, from a detection map alone: objects, AreaScaler, MagnitudeScaler.

S = S_area * T (paper Eq. 5), with S_area from Algorithm 1. All maps are (H, W) float32, one picture at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Scaling


def components(mask: Tensor) -> Tensor:
    """8-connected components: (H, W) bool -> (H, W) int64 labels 1.. in the order of their last pixel, 0 outside."""
    H, W = mask.shape
    seeds = torch.arange(1, H * W + 1, dtype=torch.float32, device=mask.device).reshape(H, W)  # exact below 2^24
    labels = seeds * mask
    while True:  # every pixel takes its neighbourhood's largest seed until nothing changes
        grown = F.max_pool2d(labels[None], 3, stride=1, padding=1)[0] * mask
        if torch.equal(grown, labels):
            break
        labels = grown
    found = torch.unique(labels[mask])
    return torch.where(mask, torch.searchsorted(found, labels) + 1, 0)


def objects(A: Tensor, cfg: Scaling) -> tuple[Tensor, Tensor]:
    """Components of A >= unsafe that are large enough: labels (H, W) with 0 outside, and areas (count,) as shares."""
    labels = components(cfg.unsafe <= A)
    areas = torch.bincount(labels.flatten(), minlength=1)[1:].float() / A.numel()  # (count,)
    keep = torch.cat([torch.tensor([False], device=A.device), areas >= cfg.min_area])  # (1 + count,)
    renumbered = torch.cumsum(keep, 0) * keep
    return renumbered[labels], areas[keep[1:]]


def area_scaler(A: Tensor, cfg: Scaling) -> Tensor:
    """Algorithm 1: (H, W) -> S_area (H, W), zero where nothing is to be guided."""
    zero = torch.zeros_like(A)
    edit = cfg.edit <= A
    if edit.float().mean() >= cfg.full:  # nothing has formed yet, or it fills the frame
        return zero
    labels, areas = objects(A, cfg)
    if len(areas) == 0:
        return zero
    strengths = torch.cat([zero.new_zeros(1), cfg.area_gain * areas])  # (1 + count,)
    S_unsafe = strengths[labels]  # sum_i area_gain * share_i * object_i
    regions = components(edit)
    edit = edit & torch.isin(regions, regions[labels > 0])  # only what is connected to an object
    rim = edit & (labels == 0)  # an object's own pixels keep their value
    return nearest(S_unsafe, labels > 0, rim) + S_unsafe if rim.any() else S_unsafe


def nearest(values: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Give each target pixel the value of its nearest source (Euclidean; a tie goes to the larger value), (H, W)."""
    src, dst = sources.nonzero(), targets.nonzero()  # (s, 2), (e, 2)
    found = []
    for part in dst.split(max(1, 2**22 // max(1, len(src)))):  # 64 MB at a time
        squared = (part[:, None] - src[None]).square().sum(-1)  # (part of e, s)
        ties = squared == squared.amin(1, keepdim=True)
        found.append(torch.where(ties, values[sources], 0.0).amax(1))  # (part of e,)
    out = torch.zeros_like(values)
    out[targets] = torch.cat(found)
    return out


def magnitude_scaler(A: Tensor, cfg: Scaling) -> Tensor:
    """T = min(A / edit, magnitude) where A >= edit, else 0 (Eq. 5; it prints max, its text says 1 <= T <= 5)."""
    return torch.where(cfg.edit <= A, (A / cfg.edit).clamp(max=cfg.magnitude), 0.0)


def strength(A: Tensor, cfg: Scaling) -> Tensor:
    """A (H, W) -> S (H, W): the strength of guidance at each pixel.

    The ablations of the paper's Table 5: area_gain None switches Algorithm 1, the AreaScaler, off (S_area = 1);
    magnitude 1 switches the MagnitudeScaler off (T = 1 wherever A >= edit).
    """
    T = magnitude_scaler(A, cfg)
    S = T if cfg.area_gain is None else area_scaler(A, cfg) * T
    return S if cfg.s_max is None else S.clamp(max=cfg.s_max)


def scale_map(A: Tensor, scalings: list[Scaling]) -> Tensor:
    """A (b, concepts, H, W), each concept with its constants -> S (b, concepts, H, W)."""
    return torch.stack([torch.stack([strength(a, s) for a, s in zip(maps, scalings, strict=True)]) for maps in A])
