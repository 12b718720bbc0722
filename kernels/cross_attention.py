"""Cross-attention and guideline maps in one pass over the queries: a Triton kernel, its launcher, a PyTorch operator.

Formula, per head and pixel; k_g are the keys of one concept's guideline rows, background first, already over sqrt(d):

    out = softmax(q k^T / sqrt(d)) v                                                of every batch row
    map = mean over heads of softmax(q k_g^T), summed over the concept's own rows   of the batch rows asked for

`attention_with_maps` in dag/cam.py is the same in plain PyTorch, without limits. The tests compare with it in float64.

Who does what. The grid is (ceil(n / 32), h, b): a program has 32 pixels of one head of one batch row. All keys of a
text fit in it, and all rows of a concept, so there is no loop over keys and no running softmax. For d = 80, m = 77 and
concepts of 8 + 8 rows:

                  d = 64 + 16            m = 64 + 16                   d = 64 + 16
                +----------+---+       +----------+---+  softmax, v  +----------+---+
    32 pixels   |    q0    |q1 | -k->  |    s0    |s1 | -----------> |    o0    |o1 |  -> out
                +----------+---+       +----------+---+              +----------+---+
                         |             +---+  softmax, sum
                         +----k_g----> | s | -------------> one concept's map of this head, if slot[b] >= 0;
                                       +---+                then the next concept's
                                     16 rows

- Tiles. A tile's side must be a power of two, of at least 16 where it is summed over. Two chunks waste less than one:
  d 40 = 32 + 8 of 16, 80 = 64 + 16, 160 = 128 + 32 (one chunk: 64, 128, 256); m 77 = 64 + 13 of 16 (one chunk: 128).
  The rows of a concept are 8, 16 or 32, the largest concept's for all.
- Masks. Reads past n, m, d or a concept's rows give 0, which adds nothing to a product. Keys past m and past the rows
  also get the logit -inf, or each would take part in the softmax as a key of logit 0. Writes past n or d do not happen.
- Precision. Products are of the inputs' dtype; sums and softmax are float32. p is rounded to the inputs' dtype for the
  product with v and divided by its sum afterwards. Maps are float32.
- Cost. q is read once. A batch row asked for adds the read of k_g, the write of (h, concepts, n) float32, and its part
  of a second, small kernel for the mean over heads (in here that would take atomics, whose order, and with it the mask,
  changes from run to run). Programs of other batch rows skip all of it. The maps lie between logits and softmax because
  the fewest registers are in use there.
- Strides. They may be any, except that the d channels of a head lie side by side; nothing is copied. Those of heads,
  pixels and keys are constants of the compiled kernel: 40, the head stride of d = 40, is a multiple of 8 but not of 16,
  the only multiple Triton sees by itself, and without one no load is 128 bits wide. The split of the guideline rows is
  a constant too.
- Programs of 32 pixels on 2 warps, so that every GPU runs the same tensor-core instructions, a warp's. 64 pixels on 4
  warps get a Hopper GPU's own (wgmma), and ptxas 12.8, which comes with triton 3.6, compiles those wrongly here: it
  takes half of the descriptor of a tile of v from the wrong register. On an H200 outputs were wrong by 2, or the kernel
  crashed; with 2 warps all of the grid was right. Its cost there: 9.0 against 8.8 microseconds.
- What has run on a card: on that H200, this kernel with other maps, a sigmoid for every concept row. With today's maps
  it was interpreted and compiled only. kernels/choice.py tries it on the card before a run uses it.
- Limits. `obstacle` and `fault` refuse, in one line, what the kernel cannot do: GPUs below capability 8.0, dtypes other
  than float16 and bfloat16 (interpreted, the CPU and float32 are allowed too), d > 160, m > 80, and more than 32 rows
  of one concept, background included: with 64 and d = 160 registers spill. Concepts may be many.

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
MAX_D, MAX_M, MAX_G = 160, M0 + M1, 32
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
    k_g_ptr,  # (h, g, d)
    slot_ptr,  # (b,) int32: which of the maps is this batch row's, -1: none
    out_ptr,  # (b, n, h, d) contiguous
    maps_ptr,  # (rows, h, concepts, n) float32 contiguous
    n, stride_qb, stride_kb, stride_vb,
    STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr,  # (of heads, of pixels or keys)
    STRIDE_G: tl.constexpr,  # (of heads, of guideline rows)
    HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr,  # h, m, d
    SPLIT: tl.constexpr,  # background rows and concept rows of each concept in turn
    D0: tl.constexpr, D1: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr,  # chunks: D <= D0 + D1, M <= M0 + M1
    G: tl.constexpr, BLOCK_N: tl.constexpr,  # no concept has more than G rows
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

    # -- maps of this head --
    slot = tl.load(slot_ptr + b)
    if slot >= 0:  # the same for all of the program
        k_g_ptr += h * STRIDE_G[0]
        maps_ptr += (slot.to(tl.int64) * HEADS + h) * (len(SPLIT) // 2) * n
        for c in tl.static_range(0, len(SPLIT), 2):
            store_map(maps_ptr, q0, q1, k_g_ptr, STRIDE_G[1], SPLIT[c], SPLIT[c + 1], i, n, D, D0, D1, G)
            k_g_ptr += (SPLIT[c] + SPLIT[c + 1]) * STRIDE_G[1]
            maps_ptr += n

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
def store_map(
    map_ptr, q0, q1, k_ptr, stride: tl.constexpr, BACKGROUND: tl.constexpr, CONCEPT: tl.constexpr,
    i, n, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """How much of the attention of pixels i to BACKGROUND + CONCEPT rows of keys goes to the latter, of one head."""
    g = tl.arange(0, G)  # (G,) guideline rows
    size: tl.constexpr = BACKGROUND + CONCEPT
    s = tl.dot(q0, tl.trans(tile(k_ptr, g, stride, size, D, 0, D0)))  # (BLOCK_N, D0) @ (D0, G)
    s = tl.dot(q1, tl.trans(tile(k_ptr, g, stride, size, D, D0, D1)), s)
    s = tl.where(g[None, :] < size, s, float("-inf"))
    p = tl.exp2((s - tl.max(s, 1)[:, None]) * LOG2_E)  # (BLOCK_N, G)
    share = tl.sum(tl.where(g[None, :] < BACKGROUND, 0.0, p), 1) / tl.sum(p, 1)  # (BLOCK_N,)
    tl.store(map_ptr + i, share, mask=i < n)


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


def obstacle(device: torch.device, dtype: torch.dtype, d: int, g: int) -> str | None:
    """Why the kernel cannot run on queries of this device, dtype and head width; None if it can.

    g: guideline rows of the largest concept.
    """
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the queries are on {device.type}, expected cuda"
    if dtype not in (torch.float16, torch.bfloat16) and not (INTERPRETED and dtype == torch.float32):
        return f"the queries are {str(dtype).removeprefix('torch.')}, expected float16 or bfloat16"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"{torch.cuda.get_device_name(device)} is no NVIDIA GPU of compute capability 8.0 or newer"
    if not 1 <= d <= MAX_D:
        return f"heads of {d} channels, expected at most {MAX_D}"
    if g > MAX_G:
        return f"a concept has {g} guideline rows, expected at most {MAX_G}"
    return None


def largest(split: Sequence[int]) -> int:
    """Guideline rows of the concept that has most of them."""
    return max(map(sum, zip(split[::2], split[1::2], strict=True)))


def fault(q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, split: Sequence[int], rows: Sequence[int]) -> str | None:
    """What the kernel would compute wrongly, None if nothing."""
    b, h, _, d = q.shape
    m, g = k.shape[2], sum(split)
    if len(split) < 2 or len(split) % 2 or min(split) < 1:
        return f"split is {list(split)}, expected a background's and a concept's rows in turn, at least one of each"
    if (found := obstacle(q.device, q.dtype, d, largest(split))) is not None:
        return found
    if not (k.shape == v.shape == (b, h, m, d) and 1 <= m <= MAX_M and k_g.shape == (h, g, d)):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v), ("k_g", k_g)))
        return f"{shapes}, expected (b, h, n, d), (b, h, m, d) twice with m <= {MAX_M}, (h, {g}, d)"
    if len({(x.dtype, x.device) for x in (q, k, v, k_g)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v, k_g))
        return f"q, k, v, k_g are {kinds}, expected all the same"
    if any(x.stride(-1) != 1 for x in (q, k, v, k_g)):
        return f"strides of the last axes are {[x.stride(-1) for x in (q, k, v, k_g)]}, expected 1"
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


def arguments(q, k, v, k_g, split: Sequence[int], rows: Sequence[int], block_n: int) -> tuple[tuple, dict]:
    """What the kernel is called with: values (the output and the maps per head are number 5 and 6) and constants."""
    b, h, n, d = q.shape
    out = q.new_empty(b, n, h, d)  # so that merging the heads afterwards copies nothing
    maps = q.new_empty(len(rows), h, len(split) // 2, n, dtype=torch.float32)
    tensors = q, k, v, k_g, slots(tuple(rows), b, q.device), out, maps
    strides = {"STRIDE_" + name: x.stride()[-3:-1] for name, x in (("Q", q), ("K", k), ("V", v), ("G", k_g))}
    sizes = {"HEADS": h, "M": k.shape[2], "D": d, "SPLIT": tuple(split), "M0": M0, "M1": M1, "BLOCK_N": block_n}
    sizes["D0"], sizes["D1"] = chunks(d)
    sizes["G"] = max(8, triton.next_power_of_2(largest(split)))
    return (*tensors, n, q.stride(0), k.stride(0), v.stride(0)), strides | sizes | OPTIONS


def launch(q, k, v, k_g, split: Sequence[int], rows: Sequence[int], block_n: int = BLOCK_N) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments and results as of `cross_attention_with_maps`, block_n pixels in a program."""
    if (found := fault(q, k, v, k_g, split, rows)) is not None:
        raise ValueError(f"the fused kernel cannot run: {found}; dag.cam.attention_with_maps can")
    b, h, n, _ = q.shape
    values, constants = arguments(q, k, v, k_g, split, rows, block_n)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        attention_kernel[(triton.cdiv(n, block_n), h, b)](*values, **constants)
    out, maps = values[5:7]  # (b, n, h, d), (rows, h, concepts, n)
    return out.transpose(1, 2), maps.mean(1)  # (b, h, n, d), (rows, concepts, n)


def cross_attention_with_maps(
    q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, split: list[int], rows: list[int]
) -> tuple[Tensor, Tensor]:
    """`attention_with_maps` of dag/cam.py in one kernel: the same arguments and results, within rounding.

    q (b, h, n, d); k and v (b, h, m, d); k_g (h, g, d): guideline keys of all concepts; split: how many of the g rows
    are the first concept's background, then the concept, the second one's background, ...; rows: batch rows whose maps
    are wanted, in this order. Returns out (b, h, n, d) and maps (rows, concepts, n) float32. torch.compile sees one
    node; run it once before capturing a CUDA graph. Raises ValueError for what `fault` names, NotImplementedError when
    gradients are asked for.
    """
    if q.is_cuda and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return launch(q, k, v, k_g, split, rows)  # a call of the operator takes as long again
    return operator(q, k, v, k_g, split, rows)


@torch.library.custom_op("dag::cross_attention_with_maps", mutates_args=(), device_types="cuda")
def operator(q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, split: list[int], rows: list[int]) -> tuple[Tensor, Tensor]:
    return launch(q, k, v, k_g, split, rows)


@operator.register_kernel("cpu")
def _(q, k, v, k_g, split, rows):
    if INTERPRETED:
        return launch(q, k, v, k_g, split, rows)
    out, maps = attention_with_maps(q, k, v, k_g, split, rows)
    return out.transpose(1, 2).contiguous().transpose(1, 2), maps.contiguous()  # laid out as the kernel's


@operator.register_fake
def _(q, k, v, k_g, split, rows):
    b, h, n, d = q.shape
    maps = q.new_empty(len(rows), len(split) // 2, n, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(b, n, h, d).transpose(1, 2), maps


@operator.register_autograd
def _(ctx, *gradients):
    raise NotImplementedError(
        "the fused kernel has no gradient; expected a call under torch.no_grad(), or plain attention (fused=None)"
    )
