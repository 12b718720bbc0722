"""Which implementation of the main attention with maps a run uses. The one place that knows that a kernel exists."""

import torch

from dag.cam import AttentionWithMaps
from dag.tokens import Reading

CHOICES = ("auto", "plain", "fused")


def choose(
    choice: str, device: torch.device, dtype: torch.dtype, K: int = 1, d: int = 16, reading: Reading | None = None
) -> AttentionWithMaps | None:
    """The fused kernel or None for plain PyTorch, for all methods of a run.

    device, dtype: of the queries; K: concept rows in all; d: channels per head, at most. "auto" is plain for now: the
    compiled kernel has never run on a GPU. Raises ValueError for an unknown choice, or where "fused" cannot run.
    """
    if choice not in CHOICES:
        raise ValueError(f"attention is '{choice}', expected {', '.join(CHOICES)}")
    if choice != "fused":
        return None
    try:
        from . import cross_attention as kernel  # here: without triton there is the plain one

        obstacle = kernel.obstacle(device, dtype, K, d)
    except ImportError as e:
        obstacle = f"kernels/cross_attention.py cannot be imported ({e})"
    if obstacle is None and reading is not None and reading.heads != "mean":
        obstacle = f"it pools heads by their mean, these tokens by their {reading.heads}"
    if obstacle is not None:
        raise ValueError(f"the fused kernel cannot run: {obstacle}; use auto or plain")
    return kernel.cross_attention_with_maps
