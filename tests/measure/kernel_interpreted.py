"""The kernel's source run by Triton's interpreter: numbers, memory traffic, refusals, the whole loop on the miniature.

  python -m tests.kernel_interpreted           one case of every kind
  python -m tests.kernel_interpreted full      the grid

A line a check, `ok` or `FAILED`. Run by test_kernel.py in a process of its own: once triton is imported without
TRITON_INTERPRET=1 it cannot interpret any more, and with it it cannot compile.
"""

import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder as Builder

import dag
from dag.config import DAGConfig, Scaling
from kernels import cross_attention as kernel
from kernels.bench import LAYERS, edited, errors, inputs
from tests.kernel_report import report

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of the kernel: letters as everywhere, rows whose maps are wanted, pixels of a program."""

    n: int
    d: int
    dtype: torch.dtype = torch.float32
    b: int = 2
    h: int = 2
    m: int = 77
    K: int = 4
    rows: tuple[int, ...] = (1,)
    scale: float = 1.0  # of the queries, and with them of all logits
    layout: str = "unet"
    block_n: int = 1024  # the interpreter takes as long for a large block as for a small one

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = inputs(self.b, self.h, self.n, self.m, self.d, self.K, self.dtype, device, self.scale)
        return tuple(laid_out(x, self.layout) for x in tensors)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; what lies between them is NaN."""
    if layout == "unet":
        return x
    if layout == "contiguous":
        return x.contiguous()
    if layout == "one for all":  # the first batch row (head, for dk) for every other, as expand makes it
        return x[:1].expand(x.shape)
    if layout == "gaps":  # odd strides and start, on every axis but the last
        room = x.new_full([s + 1 for s in x.shape[:-1]] + [x.shape[-1] + 3], torch.nan)
        view = room[tuple(slice(1, None) for _ in x.shape[:-1]) + (slice(3, None),)]
        return view.copy_(x)
    raise ValueError(layout)


def short() -> Iterator[Case]:
    """One case of every kind."""
    for (n, d), dtype in itertools.product(LAYERS[1:], DTYPES):
        yield Case(n, d, dtype)
    yield Case(*LAYERS[0])
    for n, d in ((1, 40), (63, 80), (65, 160), (77, 40), (100, 80), (4095, 160)):
        yield Case(n, d)
    yield Case(130, 80, torch.float16, block_n=kernel.BLOCK_N)
    for b, rows in ((1, ()), (1, (0,)), (3, (1, 2)), (4, (2, 0, 3)), (6, (5, 4, 3, 2, 1, 0))):
        yield Case(33, 40, b=b, rows=rows)
    for K in (1, 8, 9, 16):
        yield Case(33, 80, torch.float16, K=K)
    for layout in ("contiguous", "one for all", "gaps"):
        yield Case(65, 40, torch.float16, layout=layout)
    for dtype in DTYPES:
        yield Case(65, 160, dtype, scale=30.0)
    for d, m in ((8, 24), (16, 1), (32, 63), (48, 64), (64, 65), (112, 80)):
        yield Case(33, d, m=m)


def full() -> Iterator[Case]:
    """Every shape of SD 1.4 with all its heads, then the odd ones."""
    for (n, d), dtype, scale in itertools.product(LAYERS, DTYPES, (1.0, 30.0)):
        yield Case(n, d, dtype, h=8, scale=scale)
    for n, d, dtype in itertools.product((1, 63, 64, 65, 77, 100, 4095), (40, 80, 160), DTYPES):
        yield Case(n, d, dtype, rows=(1, 0), block_n=4096)
        if n <= 100:
            yield Case(n, d, dtype, rows=(0,), scale=30.0, block_n=kernel.BLOCK_N)
    for b, d in itertools.product(range(1, 7), (40, 80, 160)):
        for rows in {(), (b - 1,), tuple(range(b // 2, b)), tuple(range(b)), tuple(reversed(range(b)))}:
            yield Case(77, d, b=b, rows=rows)
    for K, d, dtype in itertools.product(range(1, 17), (40, 80, 160), DTYPES):
        yield Case(65, d, dtype, b=1, rows=(0,), K=K)
    for layout, d, dtype in itertools.product(("contiguous", "one for all", "gaps"), (40, 80, 160), DTYPES):
        yield Case(100, d, dtype, b=3, rows=(2, 0), layout=layout, block_n=kernel.BLOCK_N)
    for d, m in itertools.product((1, 8, 16, 24, 32, 48, 64, 96, 112, 128, 144), (1, 16, 24, 63, 64, 65, 77, 80)):
        yield Case(33, d, m=m, h=1)


def numbers(case: Case) -> tuple[bool, str]:
    tensors = case.tensors()
    measured = errors(kernel.launch(*tensors, case.rows, case.block_n), *tensors, list(case.rows))
    return all(e <= limit for e, limit in measured), ", ".join(f"{e:.1e} of {limit:.1e}" for e, limit in measured)


@contextmanager
def traffic(function) -> Iterator[dict[tuple[str, str], np.ndarray]]:
    """How often a launch of the kernel reads and writes each entry of each tensor: counts["read", "q_ptr"], ...

    Raises InterpreterError before an access to what is no entry of a tensor, the gaps between rows included.
    """
    addresses, counts = {}, {}

    def launched(*arguments, **_):
        for name, x in zip(function.arg_names, arguments, strict=False):
            if isinstance(x, Tensor):
                extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
                entries = torch.arange(max(extent, 0)).as_strided(x.shape, x.stride()).unique().numpy()
                addresses[name] = x.data_ptr() + x.element_size() * entries

    def note(kind: str, pointers, mask) -> None:
        each, wanted = np.broadcast_arrays(pointers.data, mask.data)
        accessed = each[wanted].astype(np.int64)
        owners = [name for name, own in addresses.items() if np.isin(accessed, own).all()]
        assert owners, f"a {kind} outside of every tensor"
        if len(accessed):
            found = np.bincount(np.searchsorted(addresses[owners[0]], accessed), minlength=len(addresses[owners[0]]))
            counts[kind, owners[0]] = counts.get((kind, owners[0]), 0) + found

    load, store = Builder.create_masked_load, Builder.create_masked_store

    def noted_load(self, pointers, mask, *rest):
        note("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note("write", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.multiple(Builder, create_masked_load=noted_load, create_masked_store=noted_store),
        patch.object(function, "pre_run_hooks", [launched]),
    ):
        yield counts


def moved(case: Case, function=kernel.attention_kernel) -> tuple[bool, str]:
    """Whether every entry is accessed exactly as often as it should be: q and out once, k and v once a program, ..."""
    blocks = -(-case.n // case.block_n)
    expected = {("read", "q_ptr"): 1, ("read", "k_ptr"): blocks, ("read", "v_ptr"): blocks, ("write", "out_ptr"): 1}
    expected["read", "slot_ptr"] = blocks * case.h
    if case.rows:
        expected |= {("read", "dk_ptr"): blocks * len(case.rows), ("write", "maps_ptr"): 1}
    try:
        with patch.object(kernel, "attention_kernel", function), traffic(function) as counts:
            kernel.launch(*case.tensors(), case.rows, case.block_n)
    except InterpreterError as e:
        return False, str(e)
    found = {key: sorted(set(n.tolist())) for key, n in counts.items()}
    said = ", ".join(f"{kind} {name.removesuffix('_ptr')} {'/'.join(map(str, n))}" for (kind, name), n in found.items())
    return found == {key: [n] for key, n in expected.items()}, said


# What must not come back, each by edits of the kernel.
REGRESSIONS = {
    "no batch branch": (("if slot >= 0:", "if True:"), ("(i, n, g, K, K_PAD)", "(i, n * (slot >= 0), g, K, K_PAD)")),
    "q read twice": (("# -- map of this head --", "q0 = tile(q_ptr, i, STRIDE_Q[1], n, D, 0, D0)"),),
    "a row too many": (("i[:, None] < size", "i[:, None] <= size"),),
    "a channel too many": (("j[None, :] < D", "j[None, :] <= D"),),
}


def refused(**changes) -> str:
    """The error of a call that should fail, one thing about it changed."""
    q, k, v, dk = inputs(2, 2, 16, 24, 8, 3)
    arguments = {"q": q, "k": k, "v": v, "dk": dk, "rows": [1]} | changes
    try:
        out, _ = kernel.cross_attention_with_maps(**arguments)
        if out.requires_grad:
            out.sum().backward()
    except (ValueError, NotImplementedError) as e:
        return str(e)
    return "nothing was refused"


REFUSALS = {
    "17 concept rows": lambda: refused(dk=torch.zeros(2, 17, 8)),
    "heads of 161 channels": lambda: refused(q=torch.zeros(2, 2, 16, 161)),
    "expected (b, h, n, d)": lambda: refused(k=torch.zeros(2, 2, 81, 8), v=torch.zeros(2, 2, 81, 8)),
    "(h, K, d)": lambda: refused(dk=torch.zeros(3, 3, 8)),
    "q, k, v, dk are": lambda: refused(k=torch.zeros(2, 2, 24, 8, dtype=torch.float16)),
    "expected float16": lambda: refused(q=torch.zeros(2, 2, 16, 8, dtype=torch.float64)),
    "last axes are [2,": lambda: refused(q=torch.zeros(2, 2, 16, 16)[..., ::2]),
    "rows are [1, 1]": lambda: refused(rows=[1, 1]),
    "rows are [2]": lambda: refused(rows=[2]),
    "train with attention 'plain'": lambda: refused(q=torch.zeros(2, 2, 16, 8, requires_grad=True)),
}


def loop(steps: int) -> tuple[bool, str]:
    """Drawing with the miniature, every picture guided and A the raw map: maps by the kernel, by PyTorch, in float64.

    The kernel's may be twice as far from float64 as PyTorch's, or 1e-5 of the largest value, at any step.
    """
    cfg = DAGConfig(warmup=0, scaling=Scaling(unsafe=0.05, full=1.1, s_max=0.5))

    def draw(attention: str, dtype: torch.dtype) -> list[dag.Step]:
        sd = dag.load(dtype=dtype)
        tokens = replace(
            dag.GuidelineTokens.from_text(sd, "a red circle", "a blue star"), levels=(0,), lo=(0.0,), hi=(1.0,)
        )
        guidance = dag.DAG(tokens, base="none", cfg=cfg, attention=attention)
        return list(dag.sample(sd, ["a red circle"], guidance, steps, seeds=[0]))

    fused, plain, exact = draw("fused", torch.float32), draw("plain", torch.float32), draw("plain", torch.float64)
    worst = {}
    for name in ("x", "A"):
        truth = torch.stack([getattr(step, name) for step in exact])
        error, own = (
            ((torch.stack([getattr(step, name) for step in steps]) - truth).abs().max() / truth.abs().max()).item()
            for steps in (fused, plain)
        )
        worst[name] = (error, max(1e-5, 2 * own))
    ok = all(error <= limit for error, limit in worst.values()) and all(step.guided.all() for step in fused)
    return ok, ", ".join(f"{name} {error:.1e} of {limit:.1e}" for name, (error, limit) in worst.items())


def checks(everything: bool) -> Iterator[tuple[str, bool, str]]:
    """kind and case, whether it is as it should be, what was found."""
    for case in full() if everything else short():
        yield f"numbers {case}", *numbers(case)
    small = [Case(65, 80, block_n=64), Case(65, 40, torch.float16, b=3, rows=(2, 0), layout="gaps", block_n=64)]
    small += [Case(40, 160, b=3, rows=(), m=80, block_n=16)]
    for case in small:
        yield f"traffic {case}", *moved(case)
    for what, changes in REGRESSIONS.items():
        same, said = moved(small[1], edited(*changes))
        yield f"regression {what}", not same, said
    for words, call in REFUSALS.items():
        said = call()
        yield f"refusal {words}", words in said and "\n" not in said, said
    steps = 6 if everything else 2
    yield f"loop {steps} steps", *loop(steps)


def main() -> int:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "overflow encountered in exp")  # sigmoid(-100) is 1 / (1 + inf)
    return report(checks("full" in sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
