"""The kernel compiled for GPUs that need not be there, and its machine code held against what it should be.

  python -m tests.measure.kernel_compiled           one GPU (sm_80), float16
  python -m tests.measure.kernel_compiled full      every supported one, both dtypes, few and many guideline rows

It prints as kernel_interpreted.py does, a line for every kernel, and needs a process of its own like it.
"""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from kernels.bench import HEADS, SPLIT, TOKENS, WITHOUT_MAPS, compiled, edited, inputs, machine_code
from kernels.cross_attention import BLOCK_N, OPTIONS, chunks
from tests.measure.kernel_interpreted import report

REGISTERS = {40: 144, 80: 168, 160: 216}  # by d: as many as there are, and a tenth to a fifth more
SHARED = {40: 8 << 10, 80: 16 << 10, 160: 32 << 10}  # bytes by d


def products(ops: Counter) -> dict[str, int]:
    """Tensor-core work by type: the number of multiplications of a 16 x 16 by a 16 x 8 tile, of a program."""
    work = Counter()
    for op, count in ops.items():
        if re.fullmatch(r"HMMA\.16816\.F32(\.BF16)?", op):  # a warp's 16 x 16 by 16 x 8
            work["half"] += count * OPTIONS["num_warps"]
        elif "MMA" in op:
            work[op] += count
    return dict(work)


def faults(capability: int, d: int, split: Sequence[int], code: dict, ops: Counter, bare: int) -> tuple[list[str], str]:
    """What is wrong with a kernel's machine code, which is `bare` instructions without maps; and what it needs."""
    (d0, d1), sizes = chunks(d), list(map(sum, zip(split[::2], split[1::2], strict=True)))
    g = sum(-(-size // 8) * 8 for size in sizes)  # what a tile has beyond the next multiple of 8 is compiled away
    rows, keys, dp, threads = BLOCK_N // 16, 80, d0 + d1, 32 * OPTIONS["num_warps"]
    found = []
    # q k^T, p v and q k_g^T: sizes of the tiles over (16, 8, 16)
    expected = rows * (dp // 16 * keys // 8 + keys // 16 * dp // 8 + dp // 16 * g // 8)
    if products(ops) != {"half": expected}:
        found.append(f"tensor-core products {products(ops)}, expected {{'half': {expected}}}")
    # every chunk of q, k and v that is at least a 128-bit load of every thread must use them
    tiles = [(BLOCK_N, c) for c in (d0, d1)] + 2 * [(j, c) for j in (64, 16) for c in (d0, d1)]
    wide = sum(i * c * 2 // (16 * threads) for i, c in tiles)
    if code["loads128"] < wide:
        found.append(f"{code['loads128']} loads of 128 bits, expected at least {wide}")
    needed = 2 * dp * (BLOCK_N + 2 * keys + g) + 4 * threads  # bytes: q, k, v, k_g, and slot by every thread
    if code["loaded"] > 1.10 * needed:
        found.append(f"{code['loaded']} bytes loaded by a program, expected about {needed}")
    most = {"spills": 0, "stack": 0, "atomics": 0, "registers": REGISTERS[d], "shared": SHARED[d]}
    found += [f"{code[what]} {what}, expected at most {limit}" for what, limit in most.items() if code[what] > limit]
    ratio, limit = code["total"] / bare, 1.2 + 0.2 * len(sizes)
    if ratio > limit:
        found.append(f"{ratio:.2f} times the instructions without maps, expected at most {limit:.2f}")
    said = f"{code['total']} instructions, x{ratio:.2f}, {code['registers']} registers, {code['shared']} B shared"
    return found, said


READ_AGAIN = (  # volatile, because the compiler makes one read of two equal ones
    "q0 = tl.load(q_ptr + i[:, None] * STRIDE_Q[1] + tl.arange(0, D0), mask=inside(i, n, j0, D, D0), volatile=True)"
)

# What must not come back, each by an edit of the kernel, other tensors or another compile-time value, for d = 80.
REGRESSIONS = {
    "d padded to 64 + 64": {"D1": 64},
    "keys padded to 64 + 64": {"M1": 64},
    "unknown divisibility": {"odd_strides": True},
    "64 pixels on 4 warps": {"num_warps": 4, "BLOCK_N": 64},
    "q read twice": {"kernel": edited(("# -- maps of this head --", READ_AGAIN))},
    "p v in tf32": {"kernel": edited(("tl.dot(p0.to(v0.dtype), v0)", "tl.dot(p0, v0.to(tl.float32))"))},
}


def checks(everything: bool) -> Iterator[tuple[str, bool, str]]:
    """kind and case, whether it is as it should be, what was found."""
    without_maps = edited(WITHOUT_MAPS)

    def code(capability: int, d: int, split=SPLIT, dtype=torch.float16, odd_strides: bool = False, **changes):
        tensors = inputs(2, HEADS, 64, TOKENS, d, sum(split), dtype)
        if odd_strides:
            tensors = tuple(F.pad(x, (0, 1))[..., :-1] for x in tensors)
        return machine_code(compiled(capability, tensors, split, **changes))

    capabilities = (80, 86, 89, 90, 100, 120) if everything else (80,)
    dtypes = (torch.float16, torch.bfloat16) if everything else (torch.float16,)
    for capability, d, dtype in itertools.product(capabilities, (40, 80, 160), dtypes):
        bare = code(capability, d, dtype=dtype, kernel=without_maps)[0]["total"]
        for split in (SPLIT, SPLIT + (1, 3), (1, 3), (16, 16)) if everything else (SPLIT, SPLIT + (1, 3)):
            found, said = faults(capability, d, split, *code(capability, d, split, dtype), bare)
            yield f"compiled {capability / 10} d={d} split={split} {dtype}", not found, "; ".join(found) or said
    for capability in (80, 90) if everything else (80,):
        bare = code(capability, 80, kernel=without_maps)[0]["total"]
        for what, changes in REGRESSIONS.items():
            found, said = faults(capability, 80, SPLIT, *code(capability, 80, **changes), bare)
            yield f"regression {capability / 10} {what}", bool(found), "; ".join(found) or f"not noticed: {said}"


if __name__ == "__main__":
    sys.exit(report(checks))
