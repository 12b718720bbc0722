"""Cross-attention and guideline maps in one pass over the queries: a Triton kernel, its launcher, a PyTorch operator.

Formula, per head and pixel; dk (h, K, d) = (k_k - k_0) / sqrt(d), K concept rows against the background row:

    out = softmax(q k^T / sqrt(d)) v             of every batch row
    map = mean over heads of sigmoid(q dk^T)     of the batch rows asked for

`attention_with_maps` in dag/cam.py is the same in plain PyTorch, without limits. The tests compare with it in float64.

Who does what. The grid is (ceil(n / 32), h, b): a program has 32 pixels of one head of one batch row. All keys of a
text fit in it, so there is no loop over keys and no running softmax. For d = 80, m = 77, K = 4:

                  d = 64 + 16            m = 64 + 16                   d = 64 + 16
                +----------+---+       +----------+---+  softmax, v  +----------+---+
    32 pixels   |    q0    |q1 | -k->  |    s0    |s1 | -----------> |    o0    |o1 |  -> out
                +----------+---+       +----------+---+              +----------+---+
                         |             +---+  sigmoid
                         +-----dk----> | a | --------> map of this head, if slot[b] >= 0
                                       +---+  K = 8 or 16

- Tiles. A tile's side must be a power of two, of at least 16 where it is summed over. Two chunks waste less than one:
  d 40 = 32 + 8 of 16, 80 = 64 + 16, 160 = 128 + 32 (one chunk: 64, 128, 256); m 77 = 64 + 13 of 16 (one chunk: 128).
- Masks. Reads past n, m, d or K give 0, which adds nothing to a product. Keys past m also get the logit -inf, or each
  would take part in the softmax as a key of logit 0. Writes past n, d or K do not happen.
- Precision. Products are of the inputs' dtype; sums, softmax and sigmoid are float32. p is rounded to the inputs' dtype
  for the product with v and divided by its sum afterwards. Maps are float32.
- Cost. q is read once. A batch row asked for adds the read of dk, the write of (h, K, n) float32, and its part of a
  second, small kernel for the mean over heads (in here that would take atomics, whose order, and with it the mask,
  changes from run to run). Programs of other batch rows skip all of it. The map lies between logits and softmax because
  the fewest registers are in use there.
- Strides. They may be any, except that the d channels of a head lie side by side; nothing is copied. Those of heads,
  pixels and keys are constants of the compiled kernel: 40, the head stride of d = 40, is a multiple of 8 but not of 16,
  the only multiple Triton sees by itself, and without one no load is 128 bits wide.
- Programs of 32 pixels on 2 warps, so that every GPU runs the same tensor-core instructions, a warp's. 64 pixels on 4
  warps get a Hopper GPU's own (wgmma), and ptxas 12.8, which comes with triton 3.6, compiles those wrongly here: it
  takes half of the descriptor of a tile of v from the wrong register. On an H200 outputs were wrong by 2, or the kernel
  crashed; with 2 warps all of the grid is right. Its cost there: 9.0 against 8.8 microseconds.
- More than 16 concept rows take a launch for every 16.
- Limits. `obstacle` and `fault` refuse, in one line, what the kernel cannot do: GPUs below capability 8.0, dtypes other
  than float16 and bfloat16 (interpreted, the CPU and float32 are allowed too), d > 160 and m > 80.

Proved by  python -m pytest tests/test_kernel.py            interpreted; compiled for absent GPUs; run on a present one
           python -m pytest -m full tests/test_kernel.py    the same, every shape
Timed by   python -m kernels.bench                          on a GPU; without one it prints bytes and instructions
Chosen by  kernels/choice.py
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from dag.cam import attention_with_maps

INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run in numpy, on the CPU
M0, M1 = 64, 16  # chunks of text keys
MAX_D, MAX_M, MAX_K = 160, M0 + M1, 16
BLOCK_N = 32  # pixels of a program, on 2 warps: 16 rows of a tensor-core tile each
OPTIONS = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}  # of the compiler; there is no loop to stage
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction


@triton.jit
def tile(ptr, i, stride: tl.constexpr, size, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Rows i and columns FIRST to FIRST + WIDTH of a (size, D) matrix, 0 outside of it: (len(i), WIDTH)."""
    j = FIRST + tl.arange(0, WIDTH)  # (WIDTH,)
    x = tl.load(ptr + i[:, None] * stride + j[None, :], mask=inside(i, size, j, D, FIRST + WIDTH), other=0.0)
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)  # the interpreter computes on bfloat16's bit patterns
    return x


@triton.jit
def inside(i, size, j, D: tl.constexpr, END: tl.constexpr):
    """Which entries of a tile with rows i and columns j, the last of them before END, are in a (size, D) matrix."""
    mask = i[:, None] < size  # (len(i), 1)
    if END > D:
        mask = mask & (j[None, :] < D)  # (len(i), len(j))
    return mask


@triton.jit
def attention_kernel(
    q_ptr,  # (b, h, n, d)
    k_ptr,  # (b, h, m, d)
    v_ptr,  # (b, h, m, d)
    dk_ptr,  # (h, K, d)
    slot_ptr,  # (b,) int32: which of the maps is this batch row's, -1: none
    out_ptr,  # (b, n, h, d) contiguous
    maps_ptr,  # (rows, h, K, n) float32 contiguous
    n, stride_qb, stride_kb, stride_vb,
    STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr,  # (of heads, of pixels or keys)
    STRIDE_DK: tl.constexpr,  # (of heads, of concept rows)
    HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr,  # h, m, d, K
    D0: tl.constexpr, D1: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr,  # chunks: D <= D0 + D1, M <= M0 + M1
    K_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,) pixels
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)  # a batch of queries may have more than 2^31 entries
    q_ptr += b * stride_qb + h * STRIDE_Q[0]
    k_ptr += b * stride_kb + h * STRIDE_K[0]
    v_ptr += b * stride_vb + h * STRIDE_V[0]
    j0 = tl.arange(0, M0)  # (M0,) and (M1,) text keys
    j1 = M0 + tl.arange(0, M1)

    # -- logits, still to be divided by sqrt(d) --
    q0 = tile(q_ptr, i, STRIDE_Q[1], n, D, 0, D0)  # (BLOCK_N, D0)
    q1 = tile(q_ptr, i, STRIDE_Q[1], n, D, D0, D1)  # (BLOCK_N, D1)
    s0 = tl.dot(q0, tl.trans(tile(k_ptr, j0, STRIDE_K[1], M, D, 0, D0)))  # (BLOCK_N, D0) @ (D0, M0)
    s0 = tl.dot(q1, tl.trans(tile(k_ptr, j0, STRIDE_K[1], M, D, D0, D1)), s0)
    s1 = tl.dot(q0, tl.trans(tile(k_ptr, j1, STRIDE_K[1], M, D, 0, D0)))  # (BLOCK_N, D0) @ (D0, M1)
    s1 = tl.dot(q1, tl.trans(tile(k_ptr, j1, STRIDE_K[1], M, D, D0, D1)), s1)

    # -- map of this head --
    slot = tl.load(slot_ptr + b)
    if slot >= 0:  # the same for all of the program
        g = tl.arange(0, K_PAD)  # (K_PAD,) concept rows
        dk_ptr += h * STRIDE_DK[0]
        a = tl.dot(q0, tl.trans(tile(dk_ptr, g, STRIDE_DK[1], K, D, 0, D0)))  # (BLOCK_N, D0) @ (D0, K_PAD)
        a = tl.dot(q1, tl.trans(tile(dk_ptr, g, STRIDE_DK[1], K, D, D0, D1)), a)
        maps_ptr += (slot.to(tl.int64) * HEADS + h) * K * n
        tl.store(maps_ptr + g[None, :] * n + i[:, None], tl.sigmoid(a), mask=inside(i, n, g, K, K_PAD))

    # -- softmax over the keys --
    if M < M0:
        s0 = tl.where(j0[None, :] < M, s0, float("-inf"))
    s1 = tl.where(j1[None, :] < M, s1, float("-inf"))
    scale: tl.constexpr = LOG2_E * D**-0.5
    top = tl.maximum(tl.max(s0, 1), tl.max(s1, 1)) * scale  # (BLOCK_N,)
    p0 = tl.exp2(s0 * scale - top[:, None])  # (BLOCK_N, M0)
    p1 = tl.exp2(s1 * scale - top[:, None])  # (BLOCK_N, M1)
    norm = 1.0 / (tl.sum(p0, 1) + tl.sum(p1, 1))  # (BLOCK_N,)

    # -- values, one chunk of channels after the other --
    out_ptr += (b * n * HEADS + h) * D
    store_values(out_ptr, p0, p1, norm, v_ptr, j0, j1, STRIDE_V[1], M, i, n, HEADS * D, D, 0, D0)
    store_values(out_ptr, p0, p1, norm, v_ptr, j0, j1, STRIDE_V[1], M, i, n, HEADS * D, D, D0, D1)


@triton.jit
def store_values(
    out_ptr, p0, p1, norm, v_ptr, j0, j1, stride_v: tl.constexpr, M: tl.constexpr,
    i, n, stride_out: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Channels FIRST to FIRST + WIDTH of the output of pixels i."""
    v0 = tile(v_ptr, j0, stride_v, M, D, FIRST, WIDTH)  # (M0, WIDTH)
    v1 = tile(v_ptr, j1, stride_v, M, D, FIRST, WIDTH)  # (M1, WIDTH)
    out = tl.dot(p0.to(v0.dtype), v0)  # (BLOCK_N, M0) @ (M0, WIDTH)
    out = tl.dot(p1.to(v1.dtype), v1, out) * norm[:, None]
    j = FIRST + tl.arange(0, WIDTH)  # (WIDTH,) channels
    out_ptr += i[:, None] * stride_out + j[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=inside(i, n, j, D, FIRST + WIDTH))


def obstacle(device: torch.device, dtype: torch.dtype, d: int = 16) -> str | None:
    """Why the kernel cannot run on queries of this device, dtype and head width; None if it can."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the queries are on {device.type}, expected cuda"
    if dtype not in (torch.float16, torch.bfloat16) and not (INTERPRETED and dtype == torch.float32):
        return f"the queries are {str(dtype).removeprefix('torch.')}, expected float16 or bfloat16"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"{torch.cuda.get_device_name(device)} is no NVIDIA GPU of compute capability 8.0 or newer"
    if not 1 <= d <= MAX_D:
        return f"heads of {d} channels, expected at most {MAX_D}"
    return None


def fault(q: Tensor, k: Tensor, v: Tensor, dk: Tensor, rows: Sequence[int]) -> str | None:
    """What the kernel would compute wrongly, None if nothing."""
    b, h, _, d = q.shape
    m, K = k.shape[2], dk.shape[1]
    if (found := obstacle(q.device, q.dtype, d)) is not None:
        return found
    if not (k.shape == v.shape == (b, h, m, d) and 1 <= m <= MAX_M and dk.shape == (h, K, d) and K > 0):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v), ("dk", dk)))
        return f"{shapes}, expected (b, h, n, d), (b, h, m, d) twice with m <= {MAX_M}, (h, K, d)"
    if len({(x.dtype, x.device) for x in (q, k, v, dk)}) > 1:
        return f"q, k, v, dk are {', '.join(f'{x.dtype} on {x.device}' for x in (q, k, v, dk))}, expected all the same"
    if any(x.stride(-1) != 1 for x in (q, k, v, dk)):
        return f"strides of the last axes are {[x.stride(-1) for x in (q, k, v, dk)]}, expected 1"
    if not (len(set(rows)) == len(rows) and set(rows) <= set(range(b))):
        return f"rows are {list(rows)}, expected different ones of 0 to {b - 1}"
    return None


@functools.cache  # a copy to the device takes longer than the kernel, and cannot be part of a CUDA graph
def slots(rows: tuple[int, ...], b: int, device: torch.device) -> Tensor:
    """Where in `rows` each of b batch rows is, -1 if it is not: (b,) int32."""
    return torch.tensor([rows.index(row) if row in rows else -1 for row in range(b)], dtype=torch.int32, device=device)


def chunks(d: int) -> tuple[int, int]:
    """Two powers of two, at least 16, that cover d channels: 40 -> 32, 16."""
    d0 = max(16, triton.next_power_of_2(d) // 2)
    return d0, max(16, triton.next_power_of_2(d - d0))


def arguments(q: Tensor, k: Tensor, v: Tensor, dk: Tensor, rows: Sequence[int], block_n: int) -> tuple[tuple, dict]:
    """What the kernel is called with: values (the output and the maps per head are number 5 and 6) and constants."""
    b, h, n, d = q.shape
    m, K = k.shape[2], dk.shape[1]
    out = q.new_empty(b, n, h, d)  # so that merging the heads afterwards copies nothing
    maps = q.new_empty(len(rows), h, K, n, dtype=torch.float32)
    tensors = q, k, v, dk, slots(tuple(rows), b, q.device), out, maps
    strides = {"STRIDE_" + name: x.stride()[-3:-1] for name, x in (("Q", q), ("K", k), ("V", v), ("DK", dk))}
    sizes = {"HEADS": h, "M": m, "D": d, "K": K, "M0": M0, "M1": M1, "K_PAD": 8 if K <= 8 else 16, "BLOCK_N": block_n}
    sizes["D0"], sizes["D1"] = chunks(d)
    return (*tensors, n, q.stride(0), k.stride(0), v.stride(0)), strides | sizes | OPTIONS


def launch(q, k, v, dk, rows: Sequence[int], block_n: int = BLOCK_N) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments and results as of `cross_attention_with_maps`, block_n pixels in a program."""
    if (found := fault(q, k, v, dk, rows)) is not None:
        raise ValueError(f"the fused kernel cannot run: {found}; dag.cam.attention_with_maps can")
    b, h, n, _ = q.shape
    outs, means = [], []
    for part in dk.split(MAX_K, dim=1):  # (h, 16 or less, d)
        values, constants = arguments(q, k, v, part, rows, block_n)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            attention_kernel[(triton.cdiv(n, block_n), h, b)](*values, **constants)
        outs.append(values[5])  # (b, n, h, d)
        means.append(values[6].mean(1))  # (rows, 16 or less, n)
    return outs[0].transpose(1, 2), means[0] if len(means) == 1 else torch.cat(means, 1)  # (b, h, n, d), (rows, K, n)


def cross_attention_with_maps(q: Tensor, k: Tensor, v: Tensor, dk: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """`attention_with_maps` of dag/cam.py in one kernel: the same arguments and results, within rounding.

    q (b, h, n, d); k and v (b, h, m, d); dk (h, K, d); rows: batch rows whose maps are wanted, in this order.
    Returns out (b, h, n, d) and maps (rows, K, n) float32. torch.compile sees one node; run it once before capturing a
    CUDA graph. Raises ValueError for what `fault` names, NotImplementedError when gradients are asked for.
    """
    if q.is_cuda and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return launch(q, k, v, dk, rows)  # a call of the operator takes as long again
    return operator(q, k, v, dk, rows)


@torch.library.custom_op("dag::cross_attention_with_maps", mutates_args=(), device_types="cuda")
def operator(q: Tensor, k: Tensor, v: Tensor, dk: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    return launch(q, k, v, dk, rows)


@operator.register_kernel("cpu")
def _(q, k, v, dk, rows):
    if INTERPRETED:
        return launch(q, k, v, dk, rows)
    out, maps = attention_with_maps(q, k, v, dk, rows)
    return out.transpose(1, 2).contiguous().transpose(1, 2), maps.contiguous()  # laid out as the kernel's


@operator.register_fake
def _(q, k, v, dk, rows):
    b, h, n, d = q.shape
    maps = q.new_empty(len(rows), dk.shape[1], n, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(b, n, h, d).transpose(1, 2), maps


@operator.register_autograd
def _(ctx, *gradients):
    raise NotImplementedError(
        "the fused kernel has no gradient; expected a call under torch.no_grad(), or plain attention (fused=None)"
    )
