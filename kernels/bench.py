"""What the fused kernel costs: times on a GPU; without one, the bytes it moves and the machine code it becomes.

  python -m kernels.bench

Shapes are SD 1.4's at 512 x 512 (8 heads, 77 text tokens), one concept of 8 background and 8 concept rows, maps of the
conditional half of the batch.
On a GPU every shape is first compared with float64. If `errors` finds more than it allows, the shape is not timed and
the exit status is 1. The times are

    SDPA          the main attention alone
    SDPA + map    dag/cam.py's `attention_with_maps`: what "plain" runs
    SDPA + SDPA   a second SDPA call whose values are one-hot: the same formula, as people compute maps under fused
                  attention today
    fused         the kernel

in microseconds: of the GPU, inside a CUDA graph, and for plain and fused also of the processor that sends the work.
The last line is JSON. kernels/choice.py runs `tried` below, in a process of its own, before it lets a run use the
kernel.
"""

import itertools
import json
import math
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
import triton.testing
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from dag.cam import attention_with_maps

from . import cross_attention
from .choice import Verdict
from .cross_attention import BLOCK_N, OPTIONS, arguments, attention_kernel, cross_attention_with_maps

HEADS, TOKENS, SPLIT = 8, 77, (8, 8)
LAYERS = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # n, d; DAG reads the second and third
WITHOUT_MAPS = ("if slot >= 0:", "if False:")  # an edit of the kernel, to compare with


def inputs(b, h, n, m, d, g, dtype=torch.float32, device="cpu", scale=1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v, k_g laid out as the UNet's: heads side by side in a pixel, q times scale."""
    q, k, v = (torch.randn(b, length, h * d, device=device).to(dtype) for length in (n, m, m))
    q, k, v = (x.unflatten(-1, (h, d)).transpose(1, 2) for x in (q * scale, k, v))  # (b, h, n or m, d)
    return q, k, v, (torch.randn(h, g, d, device=device) / d**0.5).to(dtype)


def errors(found: tuple[Tensor, Tensor], q, k, v, k_g, split: list[int], rows: list[int]) -> tuple[bool, str]:
    """Whether output and maps are as right as they should be, and "largest error against float64 of what it may be".

    It may be twice that of plain PyTorch on the same inputs. A float32 result (maps always are one) may be three times
    as far off, because how PyTorch rounds there differs with the CPU (twice was passed by 5 % on one). A bfloat16
    result may be as far off as PyTorch's and one unit in the last place more, because the interpreter truncates.
    5e-6 in the output and 1e-6 in the maps are always allowed.
    """
    exact = attention_with_maps(*(x.double() for x in (q, k, v, k_g)), split, rows)
    aligned = (x.contiguous() for x in (q, k, v))  # SDPA may need them so
    own = attention_with_maps(*aligned, k_g, split, rows)
    measured = []
    for ours, theirs, truth, least in zip(found, own, exact, (5e-6, 1e-6), strict=True):
        if truth.numel() > 0:
            error, limit = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
            if theirs.dtype == torch.bfloat16:
                limit += torch.finfo(theirs.dtype).eps * truth.abs().max().item()
            else:
                limit *= 3 if theirs.dtype == torch.float32 else 2
            measured.append((error, max(limit, least)))
    return all(e <= limit for e, limit in measured), ", ".join(f"{e:.1e} of {limit:.1e}" for e, limit in measured)


def moved(b: int, rows: int, n: int, d: int, width: int) -> dict[str, int]:
    """Bytes of device memory read and written if every tensor is once by every step that needs it; width of q's dtype.

    main: q, k, v, out. fused, separate: what the maps add to it, in the kernel or by `guideline_maps` in PyTorch.
    """
    h, m, g, (_, concept) = HEADS, TOKENS, sum(SPLIT), SPLIT
    q, k_g, per_head, mean = rows * h * n * d, h * g * d, 4 * rows * h * n, 4 * rows * n
    return {
        "main": width * 2 * b * h * d * (n + m),
        "fused": width * k_g + 2 * per_head + mean,  # written per head, read again for the mean
        # cast of q (the keys were cast once), product, softmax, sum, mean
        "separate": (width + 4) * q + 4 * (q + k_g) + (g + 2 * g + concept + 1) * per_head + (per_head + mean),
    }


def edited(*changes: tuple[str, str]):
    """The kernel with texts in its source replaced, each of which must be there exactly once."""
    source = Path(cross_attention.__file__).read_text(encoding="utf-8").split("\ndef obstacle")[0]
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"'{old}' is {source.count(old)} times in the kernel, expected once")
        source = source.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "edited.py")
        path.write_text(source, encoding="utf-8")
        return runpy.run_path(str(path))["attention_kernel"]


def compiled(
    capability: int, tensors: tuple[Tensor, ...], split: Sequence[int] = SPLIT, kernel=attention_kernel, **changes
) -> CompiledKernel:
    """What a launch with q, k, v, k_g would run on a GPU of this capability; changes: other compile-time values.

    The GPU need not be there: Triton compiles as on a launch, but for a driver that only says what the GPU would be.
    """
    absent = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),  # 80: compute capability 8.0
        get_current_device=lambda: capability,  # Triton keeps compiled kernels by this number
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(absent)
    values, constants = arguments(*tensors, split, rows=(0,), block_n=BLOCK_N)
    return kernel.warmup(*values, grid=(1,), **constants | changes)


def machine_code(kernel: CompiledKernel) -> tuple[dict[str, int], Counter]:
    """What a program of a compiled kernel needs, and how often each instruction is in it.

    There is no loop, so that is also how often a warp runs it. registers: of a thread; stack, shared, loaded (from
    device memory): bytes; spills, loads128 (of 128 bits), atomics, total: instructions.
    """
    dump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([dump, "--dump-resource-usage", file.name], text=True)
        sass = subprocess.check_output([dump, "-sass", file.name], text=True, stderr=subprocess.DEVNULL)
    needs = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    ops = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M))
    loads = Counter()  # by width in bytes
    for op, count in ops.items():
        if match := re.match(r"LDG\.E(?:\.(U8|S8|U16|S16|64|128))?\b", op):
            loads[{None: 4, "64": 8, "128": 16}.get(match[1]) or int(match[1][1:]) // 8] += count
    return {
        "registers": int(needs["REG"]),
        "stack": int(needs["STACK"]),
        "spills": sum(n for op, n in ops.items() if op.split(".")[0] in ("LDL", "STL")),
        "shared": kernel.metadata.shared,
        "loads128": loads[16],
        "loaded": 32 * OPTIONS["num_warps"] * sum(width * n for width, n in loads.items()),
        "atomics": sum(n for op, n in ops.items() if op.split(".")[0] in ("RED", "REDG", "ATOM", "ATOMG")),
        "total": ops.total() - ops["NOP"],
    }, ops


def without_gpu() -> list[dict]:
    print("no GPU here: nothing is timed. Bytes each layer moves (float16, batch 2, maps of 1 row), from its shapes:\n")
    print("    n    d      main    + fused maps    + separate maps")
    for n, d in LAYERS:
        by = moved(2, 1, n, d, 2)
        share = {key: f"{by[key] / 1e3:8.0f} kB {by[key] / by['main']:4.0%}" for key in ("fused", "separate")}
        print(f"{n:5d} {d:4d} {by['main'] / 1e3:6.0f} kB {share['fused']:>15} {share['separate']:>18}")
    print("\nMachine code of a program with and without maps (float16), compiled for GPUs that are not here:\n")
    print("capability    d   instructions with / without   registers   shared bytes   spills")
    without_maps = edited(WITHOUT_MAPS)
    for capability, d in itertools.product((80, 86, 89, 90), (40, 80, 160)):
        tensors = inputs(2, HEADS, 64, TOKENS, d, sum(SPLIT), torch.float16)
        maps = machine_code(compiled(capability, tensors))[0]
        bare = machine_code(compiled(capability, tensors, kernel=without_maps))[0]
        ratio = maps["total"] / bare["total"]
        print(
            f"{capability / 10:10.1f} {d:4d} {maps['total']:14d} / {bare['total']} = {ratio:.2f}"
            f" {maps['registers']:13d} {maps['shared']:14d} {maps['spills']:8d}"
        )
    return []


def one_hot(q: Tensor, k: Tensor, v: Tensor, k_g: Tensor, values: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """`attention_with_maps` of one concept by two SDPA calls; its maps are rounded to q's dtype before the mean.

    values (g, d): 1 in the first channel of the concept's rows, else 0, so that attention to them is the map.
    """
    shape = len(q[rows]), *k_g.shape  # (rows, h, g, d)
    maps = F.scaled_dot_product_attention(q[rows], k_g.expand(shape), values.expand(shape), scale=1.0)[..., 0]
    return F.scaled_dot_product_attention(q, k, v), maps.float().mean(1, keepdim=True)  # (b, h, n, d), (rows, 1, n)


def to_send(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of the processor for each call, the least of 300 turns, so that others' work does not decide."""
    least = dict.fromkeys(calls, math.inf)
    for _ in range(300):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], 1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    return least


@torch.no_grad()
def tried(
    dtype: torch.dtype, b: int, n: int, d: int, split: Sequence[int] = SPLIT, h: int = HEADS, others: bool = False
) -> dict:
    """One shape on this GPU: is the kernel right there and in a small odd batch, and its times beside plain PyTorch's.

    others: those of SDPA alone and of two SDPA calls too, for one concept.
    """
    split, g = list(split), sum(split)
    shape = {"dtype": str(dtype).removeprefix("torch."), "b": b, "n": n, "d": d, "split": split}
    odd = inputs(3, h, 65, TOKENS, d, g, dtype, "cuda")
    tensors = q, k, v, k_g = inputs(b, h, n, TOKENS, d, g, dtype, "cuda")
    rows = list(range(b // 2, b))
    for each, wanted in ((odd, [2, 0]), (tensors, rows)):
        right, said = errors(cross_attention_with_maps(*each, split, wanted), *each, split, wanted)
        if not right:
            return shape | {"right": False, "errors": said}
    half = slice(b // 2, b)  # a list would be copied to the GPU, which cannot be part of a CUDA graph
    wide = k_g.float()  # as a Probe keeps it for plain PyTorch
    calls = {
        "plain": lambda: attention_with_maps(q, k, v, wide, split, half),
        "fused": lambda: cross_attention_with_maps(q, k, v, k_g, split, rows),
    }
    sent = {f"{name}_sent": least for name, least in to_send(calls).items()}
    if others:
        calls["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v)
        values = torch.zeros_like(k_g[0])  # (g, d)
        values[split[0] :, 0] = 1
        calls["one_hot"] = lambda: one_hot(q, k, v, k_g, values, half)
    times = {name: 1e3 * triton.testing.do_bench_cudagraph(call) for name, call in calls.items()}  # from milliseconds
    return shape | {"right": True, "errors": said} | {name: round(us, 1) for name, us in (times | sent).items()}


def with_gpu() -> list[dict]:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; microseconds\n")
    print("                            of the GPU                                            to send          errors")
    print("dtype     b     n    d     SDPA  SDPA + map  SDPA + SDPA  fused  / SDPA + map    plain  fused    of limits")
    found = []
    for dtype, b, (n, d) in itertools.product((torch.float16, torch.bfloat16), (2, 6), LAYERS):
        one = tried(dtype, b, n, d, others=True)
        found.append(one)
        name = f"{one['dtype']:8} {b:2d} {n:5d} {d:4d} "
        if not one["right"]:
            print(f"{name} WRONG, not timed: {one['errors']}")
            continue
        print(
            f"{name} {one['sdpa']:7.1f} {one['plain']:11.1f} {one['one_hot']:12.1f} {one['fused']:6.1f}"
            f" {one['fused'] / one['plain']:13.2f} {one['plain_sent']:8.1f} {one['fused_sent']:6.1f}    {one['errors']}"
        )
    for dtype in ("float16", "bfloat16"):
        for d in sorted({d for _, d in LAYERS}):
            rows = [one for one in found if (one["dtype"], one["d"]) == (dtype, d)]
            print(f"{dtype}, d {d}: {Verdict.of(rows)}")
    return found


if __name__ == "__main__":
    if len(sys.argv) > 6:  # as kernels/choice.py calls it
        index, dtype, b, h, rows, *grids = sys.argv[1:]
        split = list(map(int, rows.split(",")))
        torch.cuda.set_device(int(index))
        for grid in grids:
            n, d = map(int, grid.split("x"))
            print(json.dumps(tried(getattr(torch, dtype), int(b), n, d, split, int(h))), flush=True)
    elif len(sys.argv) > 1:
        sys.exit(__doc__)
    else:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        rows = without_gpu() if gpu is None else with_gpu()
        print(json.dumps({"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "rows": rows}))
        sys.exit(not all(row["right"] for row in rows))
