"""Which implementation of the main attention with maps a run uses: plain PyTorch or the fused kernel."""

from collections.abc import Sequence

from torch import Tensor

from dag.attention import NO_ROWS, CrossAttention
from dag.cam import AttentionWithMaps, Probe, layers_of
from dag.model import StableDiffusion
from dag.tokens import GuidelineTokens

CHOICES = ("auto", "plain", "fused")


def for_run(choice: str, sd: StableDiffusion, tokens: Sequence[GuidelineTokens]) -> AttentionWithMaps | None:
    """The fused kernel, or None for plain PyTorch: one choice for all methods of a run that reads these tokens.

    "auto" is plain for now, because the compiled kernel has never run on a GPU (see kernels/bench.py).
    Raises ValueError for an unknown choice, or where "fused" cannot run.
    """
    if choice not in CHOICES:
        raise ValueError(f"attention is '{choice}', expected {', '.join(CHOICES)}")
    if choice != "fused":
        return None
    layers = [layer for c in tokens for layer in layers_of(sd.unet, c.reading)]
    d = max((layer.to_v.out_features // layer.num_heads for layer in layers), default=16)
    K = max(1, sum(len(c.embedding) - 1 for c in tokens))
    try:
        from . import cross_attention as kernel  # here: it needs triton, the plain one does not

        obstacle = kernel.obstacle(sd.device, sd.dtype, K, d)
    except ImportError as e:
        obstacle = f"kernels/cross_attention.py cannot be imported ({e})"
    if pooled := [c.reading.heads for c in tokens if c.reading.heads != "mean"]:
        obstacle = obstacle or f"it takes the mean over heads, these tokens their {pooled[0]}"
    if obstacle is not None:
        raise ValueError(f"the fused kernel cannot run: {obstacle}; use auto or plain")
    return kernel.cross_attention_with_maps


class WithoutMaps(Probe):
    """The hook of a run's methods that read no maps, where the others use the kernel.

    It runs the same compiled kernel with no rows selected, so that a picture in which nothing is found stays bit for
    bit the unguided one beside it.
    """

    def attention(self, layer: CrossAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if layer not in self.dk or self.call.cond == NO_ROWS:
            return None
        out, _ = self.fused(q, k, v, self.dk[layer], [])
        return out
