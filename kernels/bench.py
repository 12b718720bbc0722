"""What the fused kernel costs: times on a GPU; without one, the bytes it moves and the machine code it becomes.

  python -m kernels.bench

Shapes are SD 1.4's at 512 x 512 (8 heads, 77 text tokens), 8 concept rows, maps of the conditional half of the batch.
On a GPU every shape is first compared with float64 (exit status 1 if the kernel is wrong), then timed inside a CUDA
graph, so that the times are the GPU's and not Python's: plain (a few lines of PyTorch), SDPA, SDPA + map, fused.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from . import cross_attention
from .cross_attention import BLOCK_N, OPTIONS, arguments, attention_kernel

HEADS, TOKENS, CONCEPTS = 8, 77, 8
LAYERS = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # n, d; DAG reads the second and third
WITHOUT_MAPS = ("if slot >= 0:", "if False:")  # an edit of the kernel, to compare with


def inputs(b, h, n, m, d, K, dtype=torch.float32, device="cpu", scale=1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v, dk laid out as the UNet's: heads side by side in a pixel, q times scale."""
    q, k, v = (torch.randn(b, length, h * d, device=device).to(dtype) for length in (n, m, m))
    q, k, v = (x.unflatten(-1, (h, d)).transpose(1, 2) for x in (q * scale, k, v))  # (b, h, n or m, d)
    return q, k, v, (torch.randn(h, K, d, device=device) / d**0.5).to(dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, dk: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Output and maps, explicitly, all in the dtype of the inputs."""
    p = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)  # (b, h, n, m)
    a = torch.sigmoid(q[rows] @ dk.transpose(1, 2))  # (rows, h, n, K)
    return p @ v, a.mean(1).transpose(1, 2)  # (b, h, n, d), (rows, K, n)


def errors(found: tuple[Tensor, Tensor], q, k, v, dk, rows: list[int]) -> list[tuple[float, float]]:
    """Largest error against float64 of output and, if there are any, maps: (found's, what it may be).

    It may be twice that of PyTorch in the same dtype (SDPA for the output); in float32 three times, because how PyTorch
    rounds there differs with the CPU (twice was passed by 5 % on one), or 5e-6 and 1e-6 if that is more; in bfloat16
    one unit in the last place more than PyTorch's, because the interpreter truncates.
    """
    exact = plain(*(x.double() for x in (q, k, v, dk)), rows)
    own = F.scaled_dot_product_attention(q, k, v), plain(q, k, v, dk, rows)[1]
    measured = []
    for ours, theirs, truth, least in zip(found, own, exact, (5e-6, 1e-6), strict=True):
        if truth.numel() > 0:
            error, limit = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
            if q.dtype == torch.bfloat16:
                limit += torch.finfo(q.dtype).eps * truth.abs().max().item()
            else:
                limit = max(3 * limit, least) if q.dtype == torch.float32 else 2 * limit
            measured.append((error, limit))
    return measured


def moved(b: int, rows: int, n: int, d: int, width: int) -> dict[str, int]:
    """Bytes of device memory read and written if every tensor is once by every step that needs it; width of q's dtype.

    main: q, k, v, out. fused, separate: what the maps add to it, in the kernel or by `guideline_maps` in PyTorch.
    """
    h, m, K = HEADS, TOKENS, CONCEPTS
    q, per_head, mean, dk = rows * h * n * d, 4 * rows * h * K * n, 4 * rows * K * n, h * K * d
    return {
        "main": width * 2 * b * h * d * (n + m),
        "fused": width * dk + 2 * per_head + mean,  # written per head, read again for the mean
        # casts of q and dk, product, sigmoid, mean
        "separate": (width + 4) * (q + dk) + (4 * q + 4 * dk + per_head) + 2 * per_head + (per_head + mean),
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
        spec = spec_from_file_location("edited", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.attention_kernel


class AbsentGPU:
    """Stands in for Triton's driver, so that a kernel is compiled as on a launch, for a GPU that need not be there."""

    def __init__(self, capability: int):
        self.capability = capability  # 80: compute capability 8.0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by this number

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(capability: int, tensors: tuple[Tensor, ...], kernel=attention_kernel, **changes) -> CompiledKernel:
    """What a launch with q, k, v, dk would run on a GPU of this capability; changes: other compile-time values."""
    triton.runtime.driver.set_active(AbsentGPU(capability))
    values, constants = arguments(*tensors, rows=(0,), block_n=BLOCK_N)
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
        usage, sass = (
            subprocess.run([dump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
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


def without_gpu() -> None:
    print("no GPU here: nothing is timed. Bytes each layer moves (float16, batch 2, maps of 1 row), from its shapes:\n")
    print("    n    d      main    + fused maps    + separate maps")
    for n, d in LAYERS:
        by = moved(2, 1, n, d, 2)
        share = {key: f"{by[key] / 1e3:8.0f} kB {by[key] / by['main']:4.0%}" for key in ("fused", "separate")}
        print(f"{n:5d} {d:4d} {by['main'] / 1e3:6.0f} kB {share['fused']:>15} {share['separate']:>18}")
    print("\nMachine code of a program with and without maps (float16), compiled for GPUs that are not here:\n")
    print("capability    d   instructions with / without   registers   shared bytes   spills")
    without_maps = edited(WITHOUT_MAPS)
    for capability in (80, 86, 89, 90):
        for d in (40, 80, 160):
            tensors = inputs(2, HEADS, 64, TOKENS, d, CONCEPTS, torch.float16)
            maps, bare = (machine_code(compiled(capability, tensors, f))[0] for f in (attention_kernel, without_maps))
            ratio = maps["total"] / bare["total"]
            print(
                f"{capability / 10:10.1f} {d:4d} {maps['total']:14d} / {bare['total']} = {ratio:.2f}"
                f" {maps['registers']:13d} {maps['shared']:14d} {maps['spills']:8d}"
            )


def with_gpu() -> int:
    from triton.testing import do_bench_cudagraph as time  # milliseconds

    from dag.attention import cross_attention_with_maps as separate

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; microseconds\n")
    print("dtype     b     n    d   plain   SDPA   SDPA + map   fused   / SDPA   / (SDPA + map)   MB     error / limit")
    status = 0
    for dtype in (torch.float16, torch.bfloat16):
        for b in (2, 6):
            for n, d in LAYERS:
                tensors, half = inputs(b, HEADS, n, TOKENS, d, CONCEPTS, dtype, "cuda"), slice(b // 2, b)
                rows = list(range(b))[half]
                measured = errors(cross_attention.cross_attention_with_maps(*tensors, half), *tensors, rows)
                wrong = any(not error <= limit for error, limit in measured)
                status |= wrong
                said = ", ".join(f"{error:.1e} / {limit:.1e}" for error, limit in measured)
                name = f"{str(dtype).removeprefix('torch.'):8} {b:2d} {n:5d} {d:4d}"
                if wrong:
                    print(f"{name}   WRONG, not timed: {said}")
                    continue
                q, k, v, _ = tensors
                calls = (
                    lambda a=tensors, rows=half: plain(*a, rows),
                    lambda a=(q, k, v): F.scaled_dot_product_attention(*a),
                    lambda a=tensors, rows=half: separate(*a, rows),
                    lambda a=tensors, rows=half: cross_attention.cross_attention_with_maps(*a, rows),
                )
                t = [1000 * time(call) for call in calls]
                by = moved(b, len(rows), n, d, 2)
                print(
                    f"{name} {t[0]:7.1f} {t[1]:6.1f} {t[2]:12.1f} {t[3]:7.1f} {t[3] / t[1]:8.2f} {t[3] / t[2]:16.2f}"
                    f" {(by['main'] + by['fused']) / 1e6:8.2f}   {said}"
                )
    return status


if __name__ == "__main__":
    sys.exit(with_gpu() if torch.cuda.is_available() else without_gpu())
