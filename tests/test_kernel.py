"""The fused kernel: interpreted, compiled, as an operator, the rule that picks it; run on a GPU if there is one."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import sample
from dag.attention import cross_attention_with_maps, implementation
from kernels import cross_attention as kernel
from kernels.bench import errors, inputs
from tests import kernel_interpreted
from tests.conftest import ROOT

GRIDS = ["short", pytest.param("full", marks=pytest.mark.full)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run(tmp_path, *command: str) -> list[str]:
    """The lines a program prints, in a process that has its own triton and its own cache of compiled kernels."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("FAILED")]
    assert done.returncode == 0 and not wrong, "\n".join(wrong) or done.stderr[-2000:]
    return lines


@pytest.mark.parametrize("grid", GRIDS)
def test_interpreted(tmp_path, grid):
    """Numbers against float64, exact memory traffic, refusals, and the whole loop on the miniature."""
    lines = run(tmp_path, "-m", "tests.kernel_interpreted", grid)
    cases = list(kernel_interpreted.full() if grid == "full" else kernel_interpreted.short())
    kinds = [line.split()[1] for line in lines]
    assert kinds.count("numbers") == len(cases)
    assert set(kinds) == {"numbers", "traffic", "regression", "refusal", "loop"}


@pytest.mark.parametrize("grid", GRIDS)
def test_compiled(tmp_path, grid):
    """Tensor-core work, loads, spills, registers, shared memory, instructions; and that regressions are noticed."""
    kinds = [line.split()[1] for line in run(tmp_path, "-m", "tests.kernel_compiled", grid)]
    assert kinds.count("compiled") == (6 * 3 * 2 * 3 if grid == "full" else 2 * 3)
    assert kinds.count("regression") == (10 if grid == "full" else 5)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the bench times it")
def test_bench_without_a_gpu_times_nothing(tmp_path):
    said = "\n".join(run(tmp_path, "-m", "kernels.bench"))
    assert "nothing is timed" in said and "microseconds" not in said


def test_operator():
    """Schema, fake tensors and strides agree with what it returns, and torch.compile sees it as one node."""
    q, k, v, dk = inputs(3, 2, 20, 24, 8, 3)
    torch.library.opcheck(kernel.operator, (q, k, v, dk, [2, 0]))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(kernel.cross_attention_with_maps, backend=backend, fullgraph=True)
    out, maps = compiled(q, k, v, dk, slice(1, 3))
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes if "dag." in str(node.target)]
    assert operators == ["dag.cross_attention_with_maps.default"]
    plain_out, plain_maps = cross_attention_with_maps(q, k, v, dk, slice(1, 3))
    assert torch.equal(out, plain_out) and torch.equal(maps, plain_maps)  # on the CPU it is the plain one


def test_rule(monkeypatch):
    half = torch.float16
    for choice in ("auto", "plain"):  # auto is plain until the compiled kernel has run once
        for device in (CPU, CUDA):
            assert implementation(choice, device, half) is cross_attention_with_maps
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert implementation("fused", CUDA, half, K=16, d=160) is kernel.cross_attention_with_maps
    refused = {
        (torch.float32, 1, 40): "the queries are float32",
        (half, 17, 40): "17 concept",
        (half, 1, 161): "of 161",
    }
    for (dtype, K, d), words in refused.items():
        with pytest.raises(ValueError, match=words):
            implementation("fused", CUDA, dtype, K, d)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="a card is no NVIDIA GPU of compute capability 8.0"):
        implementation("fused", CUDA, half)
    with pytest.raises(ValueError, match="attention is 'flash', expected auto, plain, fused"):
        implementation("flash", CPU, half)


def test_fused_on_the_cpu_is_one_line(tmp_path, capsys):
    assert sample.main(["--attention", "fused", "--device", "cpu", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        "sample.py: --attention fused: the fused kernel cannot run: the queries are on cpu, expected cuda; "
        "use auto or plain"
    )


def test_fused_without_triton_is_one_line(tmp_path):
    argv = ["--attention", "fused", "--out", str(tmp_path)]
    script = f"import sys; sys.modules['triton'] = None; import sample; sys.exit(sample.main({argv}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "the fused kernel cannot run: kernels/cross_attention.py cannot be imported" in line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the compiled kernel is not run")
@pytest.mark.parametrize("grid", GRIDS)
def test_on_a_gpu(grid):
    """The interpreter's cases by the compiled kernel, in half precision."""
    for case in kernel_interpreted.full() if grid == "full" else kernel_interpreted.short():
        case = replace(case, dtype=torch.float16) if case.dtype == torch.float32 else case
        tensors = case.tensors("cuda")
        measured = errors(kernel.cross_attention_with_maps(*tensors, case.rows), *tensors, list(case.rows))
        assert all(error <= limit for error, limit in measured), f"{case}: {measured}"
