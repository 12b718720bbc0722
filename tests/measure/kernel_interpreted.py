"""The kernel's source run by Triton's interpreter: numbers, memory traffic, refusals, the whole loop on the miniature.

  python -m tests.measure.kernel_interpreted           one case of every kind
  python -m tests.measure.kernel_interpreted full      the grid

It prints a line for every check, with `ok` or `FAILED` first. tests/test_kernel.py runs it in a process of its own:
once triton is imported without TRITON_INTERPRET=1 it cannot interpret any more, and with it it cannot compile.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
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
from kernels.choice import for_run
from kernels.cross_attention import arguments

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of the kernel."""

    n: int
    d: int
    dtype: torch.dtype = torch.float32
    b: int = 2
    h: int = 2
    m: int = 77
    split: tuple[int, ...] = (8, 8)  # background and concept rows of each concept
    rows: tuple[int, ...] = (1,)  # whose maps are wanted
    scale: float = 1.0  # of the queries, and with them of all logits
    layout: str = "unet"
    block_n: int = 1024  # pixels of a program; the interpreter takes as long for many as for few

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = inputs(self.b, self.h, self.n, self.m, self.d, sum(self.split), self.dtype, device, self.scale)
        return tuple(laid_out(x, self.layout) for x in tensors)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; what lies between them is NaN."""
    if layout == "gaps":  # odd strides and start, on every axis but the last
        room = x.new_full([s + 1 for s in x.shape[:-1]] + [x.shape[-1] + 3], torch.nan)
        return room[tuple(slice(1, None) for _ in x.shape[:-1]) + (slice(3, None),)].copy_(x)
    # "one for all": the first batch row (head, for k_g) stands for every other
    return {"unet": x, "contiguous": x.contiguous(), "one for all": x[:1].expand(x.shape)}[layout]


def short() -> Iterator[Case]:
    """One case of every kind."""
    for (n, d), dtype in itertools.product(LAYERS[1:], DTYPES):
        yield Case(n, d, dtype)
    yield Case(*LAYERS[0])
    for n, d in ((1, 40), (63, 80), (65, 160), (77, 40), (100, 80), (257, 160)):
        yield Case(n, d)
    yield Case(130, 80, torch.float16, block_n=kernel.BLOCK_N)
    for b, rows in ((1, ()), (1, (0,)), (3, (1, 2)), (4, (2, 0, 3)), (6, (5, 4, 3, 2, 1, 0))):
        yield Case(33, 40, b=b, rows=rows)
    for split in ((1, 1), (1, 8), (9, 3), (16, 16), (8, 8, 8, 8), (8, 8, 1, 3), (1, 1, 20, 5, 3, 9)):
        yield Case(33, 80, torch.float16, split=split)
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
            # the float32 errors of a single pixel with large logits scatter too much to compare two of them
            scale = 1.0 if n == 1 and dtype == torch.float32 else 30.0
            yield Case(n, d, dtype, rows=(0,), scale=scale, block_n=kernel.BLOCK_N)
    for b, d in itertools.product(range(1, 7), (40, 80, 160)):
        for rows in {(), (b - 1,), tuple(range(b // 2, b)), tuple(range(b)), tuple(reversed(range(b)))}:
            yield Case(77, d, b=b, rows=rows)
    first, others = ((1, 1), (1, 8), (7, 2), (9, 8), (31, 1), (1, 31)), ((), (8, 8), (2, 30, 1, 1))
    for one, more, d, dtype in itertools.product(first, others, (40, 80, 160), DTYPES):
        yield Case(65, d, dtype, b=1, rows=(0,), split=one + more)
    for layout, d, dtype in itertools.product(("contiguous", "one for all", "gaps"), (40, 80, 160), DTYPES):
        yield Case(100, d, dtype, b=3, rows=(2, 0), layout=layout, block_n=kernel.BLOCK_N)
    for d, m in itertools.product((1, 8, 16, 24, 32, 48, 64, 96, 112, 128, 144), (1, 16, 24, 63, 64, 65, 77, 80)):
        yield Case(33, d, m=m, h=1)


def poisoned(*args) -> tuple[tuple, dict]:
    """`arguments` of the kernel with NaN in its outputs, so that an entry that nothing writes is noticed."""
    values, constants = arguments(*args)
    for output in values[5:7]:
        output.fill_(torch.nan)
    return values, constants


def numbers(case: Case, function=kernel.attention_kernel, device: str = "cpu") -> tuple[bool, str]:
    tensors, split, rows = case.tensors(device), list(case.split), list(case.rows)
    with patch.multiple(kernel, arguments=poisoned, attention_kernel=function):
        found = kernel.launch(*tensors, split, rows, case.block_n)
    return errors(found, *tensors, split, rows)


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

    def noted(kind: str, access, mask: int):  # mask: its place after the pointers
        def noting(self, pointers, *rest):
            each, wanted = np.broadcast_arrays(pointers.data, rest[mask].data)
            accessed = each[wanted].astype(np.int64)
            owners = [name for name, own in addresses.items() if np.isin(accessed, own).all()]
            assert owners, f"a {kind} outside of every tensor"
            if len(accessed):
                own = addresses[owners[0]]
                found = np.bincount(np.searchsorted(own, accessed), minlength=len(own))
                counts[kind, owners[0]] = counts.get((kind, owners[0]), 0) + found
            return access(self, pointers, *rest)

        return noting

    load, store = noted("read", Builder.create_masked_load, 0), noted("write", Builder.create_masked_store, 1)
    with (
        patch.multiple(Builder, create_masked_load=load, create_masked_store=store),
        patch.object(function, "pre_run_hooks", [launched]),
    ):
        yield counts


def moved(case: Case, function=kernel.attention_kernel) -> tuple[bool, str]:
    """Whether every entry is accessed exactly as often as it should be: q and out once, k and v once a program, ..."""
    blocks = -(-case.n // case.block_n)
    expected = {("read", "q_ptr"): 1, ("read", "k_ptr"): blocks, ("read", "v_ptr"): blocks, ("write", "out_ptr"): 1}
    expected["read", "slot_ptr"] = blocks * case.h
    if case.rows:
        expected |= {("read", "k_g_ptr"): blocks * len(case.rows), ("write", "maps_ptr"): 1}
    try:
        with patch.object(kernel, "attention_kernel", function), traffic(function) as counts:
            kernel.launch(*case.tensors(), case.split, case.rows, case.block_n)
    except InterpreterError as e:
        return False, str(e)
    found = {key: sorted(set(n.tolist())) for key, n in counts.items()}
    said = ", ".join(f"{kind} {name.removesuffix('_ptr')} {'/'.join(map(str, n))}" for (kind, name), n in found.items())
    return found == {key: [n] for key, n in expected.items()}, said


# What must not come back, each by edits of the kernel.
REGRESSIONS = {
    "no batch branch": (
        ("if slot >= 0:", "if True:"),
        ("SPLIT[c + 1], i, n, D,", "SPLIT[c + 1], i, n * (slot >= 0), D,"),
    ),
    "q read twice": (("# -- maps of this head --", "q0 = tile(q_ptr, i, STRIDE_Q[1], n, D, 0, D0)"),),
    "a row too many": (("i[:, None] < size", "i[:, None] <= size"),),
    "a channel too many": (("j[None, :] < D", "j[None, :] <= D"),),
    "rows of the next concept": (("size: tl.constexpr = BACKGROUND + CONCEPT", "size: tl.constexpr = G"),),
}


WRONG_MAPS = {  # the same, of the numbers
    "padding in the softmax": ('s = tl.where(g[None, :] < size, s, float("-inf"))', "pass"),
    "one background row too few": ("g[None, :] < BACKGROUND", "g[None, :] < BACKGROUND - 1"),
}


def refused(**changes) -> str:
    """The error of a call that should fail, one thing about it changed."""
    q, k, v, k_g = inputs(2, 2, 16, 24, 8, 3)
    arguments = {"q": q, "k": k, "v": v, "k_g": k_g, "split": [1, 2], "rows": [1]} | changes
    try:
        out, _ = kernel.cross_attention_with_maps(**arguments)
        if out.requires_grad:
            out.sum().backward()
    except (ValueError, NotImplementedError) as e:
        return str(e)
    return "nothing was refused"


REFUSALS = {  # words of the error, and what is wrong about the call
    "heads of 161 channels": {"q": torch.zeros(2, 2, 16, 161)},
    "expected (b, h, n, d)": {"k": torch.zeros(2, 2, 81, 8), "v": torch.zeros(2, 2, 81, 8)},
    "twice with m <= 80, (h, 3, d)": {"k_g": torch.zeros(2, 4, 8)},
    "split is [3], expected": {"split": [3]},
    "split is [3, 0], expected": {"split": [3, 0]},
    "a concept has 33 guideline rows, expected at most 32": {"k_g": torch.zeros(2, 36, 8), "split": [1, 2, 8, 25]},
    "q, k, v, k_g are": {"k": torch.zeros(2, 2, 24, 8, dtype=torch.float16)},
    "expected float16": {"q": torch.zeros(2, 2, 16, 8, dtype=torch.float64)},
    "last axes are [2,": {"q": torch.zeros(2, 2, 16, 16)[..., ::2]},
    "rows are [1, 1]": {"rows": [1, 1]},
    "rows are [2]": {"rows": [2]},
    "plain attention (fused=None)": {"q": torch.zeros(2, 2, 16, 8, requires_grad=True)},
}


def loop(steps: int) -> tuple[bool, str]:
    """Drawing with the miniature, every picture guided and A the raw map: maps by the kernel, by PyTorch, in float64.

    The kernel's may be twice as far from float64 as PyTorch's, or 1e-5 of the largest value, at any step.
    """
    cfg = DAGConfig(warmup=0, scaling=Scaling(unsafe=0.05, full=1.1, s_max=0.5))

    def draw(choice: str, dtype: torch.dtype) -> list[dag.Step]:
        sd = dag.load(dtype=dtype)
        tokens = dag.GuidelineTokens.from_text(sd, "a red circle", "a blue star")
        tokens = replace(tokens, levels=(0,), lo=(0.0,), hi=(1.0,))
        guidance = dag.DAG(tokens, base="none", cfg=cfg, fused=for_run(choice, sd, [tokens])[0])
        return list(dag.sample(sd, ["a red circle"], guidance, steps, seeds=[0]))

    fused, plain, exact = draw("fused", torch.float32), draw("plain", torch.float32), draw("plain", torch.float64)
    ok, said = all(step.guided.all() for step in fused), []
    for name in ("x", "A"):
        ours, own, truth = (torch.stack([getattr(step, name) for step in run]) for run in (fused, plain, exact))
        error, limit = (((x - truth).abs().max() / truth.abs().max()).item() for x in (ours, own))
        limit = max(1e-5, 2 * limit)
        ok &= error <= limit
        said.append(f"{name} {error:.1e} of {limit:.1e}")
    return ok, ", ".join(said)


def unselected(case: Case) -> tuple[bool, str]:
    """The output is bit for bit the same whether maps are asked for or not: unguided pictures beside guided ones."""
    tensors = case.tensors()
    with_maps, without = (kernel.launch(*tensors, case.split, rows, case.block_n)[0] for rows in (case.rows, ()))
    return torch.equal(with_maps, without), "bit for bit"


def checks(everything: bool) -> Iterator[tuple[str, bool, str]]:
    """kind and case, whether it is as it should be, what was found."""
    torch.manual_seed(0)
    for case in full() if everything else short():
        yield f"numbers {case}", *numbers(case)
    several = Case(65, 40, torch.float16, 3, split=(8, 8, 1, 3), rows=(2, 0), layout="gaps", block_n=64)
    small = [Case(65, 80, block_n=64), several, Case(40, 160, b=3, rows=(), m=80, block_n=16)]
    for case in small:
        yield f"traffic {case}", *moved(case)
    for what, changes in REGRESSIONS.items():
        same, said = moved(several, edited(*changes))
        yield f"regression {what}", not same, said
    same, said = numbers(several, edited(("i[:, None] < size", "i[:, None] < size - 1")))
    yield "regression a row too few", not same, said
    for what, change in WRONG_MAPS.items():
        same, said = numbers(several, edited(change))
        yield f"regression {what}", not same, said
    for words, changes in REFUSALS.items():
        said = refused(**changes)
        yield f"refusal {words}", words in said and "\n" not in said, said
    steps = 6 if everything else 2
    yield f"loop {steps} steps", *loop(steps)
    yield "unselected rows", *unselected(small[0])


def report(checks: Callable[[bool], Iterator[tuple[str, bool, str]]]) -> int:
    """Print each check, of the whole grid if the command line says `full`, as it is made; returns the exit status."""
    failed = 0
    for name, ok, said in checks("full" in sys.argv[1:]):
        print("ok    " if ok else "FAILED", name, "--", said, flush=True)
        failed += not ok
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(report(checks))
