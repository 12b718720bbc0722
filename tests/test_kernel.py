"""The fused kernel: interpreted, compiled, as an operator, the rule that picks it; run on a GPU if there is one."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs

pytest.importorskip("triton")

import dag
import sample
from dag.cam import attention_with_maps
from dag.cli import setup
from dag.config import SD14
from dag.tokens import Reading
from kernels import bench, choice
from kernels import cross_attention as kernel
from kernels.bench import inputs
from kernels.choice import WithoutMaps, for_run
from tests.conftest import ROOT
from tests.measure import kernel_interpreted

GRIDS = ["short", pytest.param("full", marks=pytest.mark.full)]


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
    lines = run(tmp_path, "-m", "tests.measure.kernel_interpreted", grid)
    cases = list(kernel_interpreted.full() if grid == "full" else kernel_interpreted.short())
    kinds = [line.split()[1] for line in lines]
    assert kinds.count("numbers") == len(cases)
    assert set(kinds) == {"numbers", "traffic", "regression", "refusal", "loop", "unselected"}


@pytest.mark.parametrize("grid", GRIDS)
def test_compiled(tmp_path, grid):
    """Tensor-core work, loads, spills, registers, shared memory, instructions; and that regressions are noticed."""
    kinds = [line.split()[1] for line in run(tmp_path, "-m", "tests.measure.kernel_compiled", grid)]
    assert kinds.count("compiled") == (6 * 3 * 2 * 4 if grid == "full" else 3 * 2)
    assert kinds.count("regression") == (12 if grid == "full" else 6)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the bench times it")
def test_bench_without_a_gpu_times_nothing(tmp_path):
    said = "\n".join(run(tmp_path, "-m", "kernels.bench"))
    assert "nothing is timed" in said and "microseconds" not in said


def test_operator():
    """Schema, fake tensors and strides agree with what it returns, and torch.compile sees it as one node."""
    call = (*inputs(3, 2, 20, 24, 8, 9), [1, 3, 2, 3], [2, 0])
    torch.library.opcheck(kernel.operator, call)
    backend = EagerAndRecordGraphs()
    found = torch.compile(lambda: kernel.cross_attention_with_maps(*call), backend=backend, fullgraph=True)()
    (graph,) = backend.graphs
    operators = [str(node.target) for node in graph.graph.nodes if "dag." in str(node.target)]
    assert operators == ["dag.cross_attention_with_maps.default"]
    assert all(map(torch.equal, found, attention_with_maps(*call)))  # on the CPU it is the plain one


@pytest.fixture
def card(monkeypatch, tmp_path):
    """`for_run` on a GPU that is not there: what its trials say is made up, its memory is in a folder of the test."""

    class Card:
        trials = 0
        rows = ({"right": True, "errors": "", "fused": 9.0, "plain": 25.0, "fused_sent": 30.0, "plain_sent": 60.0},)
        surprise = ""

        def choose(self, choice="auto", device="cuda", dtype=torch.float16, split=(8, 8), d=40, heads="mean"):
            layer = SimpleNamespace(factor=2, name="", num_heads=8, to_v=torch.nn.Linear(1, 8 * d))
            unet = SimpleNamespace(cross_attention=lambda: [layer])
            tokens = [
                SimpleNamespace(embedding=torch.zeros(sum(own), 1), split=own, reading=Reading((2,), heads))
                for own in zip(split[::2], split[1::2], strict=True)
            ]
            sd = SimpleNamespace(device=torch.device(device), dtype=dtype, unet=unet, config=SD14)
            return for_run(choice, sd, tokens)

        def trial(self, device, dtype, h, split, grids):
            self.trials += 1
            assert (device.type, h, grids[0][0], len(split) % 2) == ("cuda", 8, 32 * 32, 0)
            return [row | {"d": d} for row in self.rows for _, d in grids], self.surprise

    card = Card()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "trial", card.trial)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(choice, "driver", lambda: 13000)
    return card


def test_auto_is_what_the_trial_favours(card):
    fused, said = card.choose()
    assert fused is kernel.cross_attention_with_maps
    assert said == "fused: the kernel is right on this GPU and takes 0.36 of plain PyTorch's time"
    assert card.choose() == (fused, said) and card.trials == 1  # remembered
    others = {"d": 80}, {"split": (4, 12)}, {"split": (8, 8, 8, 8)}, {"dtype": torch.bfloat16}
    assert [card.choose(**other)[1] for other in others] == 4 * [said]
    assert card.trials == 5  # each of these has a verdict of its own


def test_auto_is_plain_where_the_kernel_loses(card):
    good = card.rows[0]
    for d, changes, words in (
        (
            40,
            {"right": False, "errors": "1.0e+00 of 5.0e-04"},
            "plain: the kernel is wrong on this GPU, error of limit 1.0e",
        ),
        (48, {"fused": 26.0}, "plain: the kernel is slower on this GPU, 26 against 25 us"),
        (64, {"fused_sent": 70.0}, "plain: the kernel is slower on this GPU, 70 against 60 us"),
    ):
        card.rows = (good | changes, good)
        fused, said = card.choose(d=d)
        assert fused is None and said.startswith(words)


def test_bench(monkeypatch, capsys):
    """The table, a verdict for each dtype and width, and rows for the JSON line; clocks and GPU are made up."""
    monkeypatch.setattr(bench, "inputs", lambda *args, real=bench.inputs: real(*args[:7]))
    monkeypatch.setattr(bench, "LAYERS", ((16, 40), (8, 80)))
    monkeypatch.setattr(bench, "to_send", lambda calls: {"plain": 60.0, "fused": 50.0})
    monkeypatch.setattr(bench.triton.testing, "do_bench_cudagraph", lambda call: call()[0].ndim / 100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    rows = bench.with_gpu()
    said = capsys.readouterr().out
    assert len(rows) == 8 and all(row["right"] and row["plain"] == row["fused"] == 40.0 for row in rows)
    assert "a card" in said and said.count("fused: the kernel is right on this GPU and takes 1.00 of") == 4
    monkeypatch.setattr(bench, "cross_attention_with_maps", lambda q, *_: (q * 0, torch.zeros(1)))
    assert not any(row["right"] for row in bench.with_gpu())
    assert capsys.readouterr().out.count("plain: the kernel is wrong on this GPU, error of limit ") == 4


def test_a_surprise_is_plain_and_its_reason(card, monkeypatch):
    card.rows, card.surprise = (), "the trial of the kernel failed: RuntimeError: an illegal memory access"
    assert card.choose() == card.choose() == (None, f"plain: {card.surprise}") and card.trials == 1
    monkeypatch.setattr(choice, "driver", lambda: 1 // 0)
    assert card.choose() == (
        None,
        "plain: no trial could be made (ZeroDivisionError: integer division or modulo by zero)",
    )
    monkeypatch.setattr(choice, "driver", lambda: 13000)
    card.surprise = "the trial of the kernel failed: OutOfMemoryError: CUDA out of memory"
    for trials in (2, 3):  # not remembered: another time there may be enough
        assert card.choose(d=80) == (None, f"plain: {card.surprise}") and card.trials == trials
    card.surprise = "the trial of the kernel did not end (TimeoutExpired)"
    for trials in (4, 5):
        assert card.choose(d=80) == (None, f"plain: {card.surprise}") and card.trials == trials


def test_memory_that_cannot_be_used_costs_a_trial(card, tmp_path, monkeypatch):
    file = tmp_path / "detect-and-guide" / "attention.json"
    card.choose()
    for content in ("{", "[]", '{"a": 1}', '{"a": {"fused": true, "why": "", "more": 1}}'):
        file.write_text(content)
        assert card.choose()[0] is not None
    assert card.trials == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file, not a folder
    assert card.choose()[0] is not None and card.trials == 6


def test_asked_for(card, monkeypatch):
    """What is asked for needs no trial; what the kernel cannot do is an error for "fused" only."""
    assert card.choose("plain") == (None, "plain, as asked")
    for split in ((16, 16), (8, 8, 8, 8, 1, 3)):
        assert card.choose("fused", split=split, d=160) == (kernel.cross_attention_with_maps, "fused, as asked")
    refused = {
        "the queries are float32": {"dtype": torch.float32},
        "the queries are on cpu": {"device": "cpu"},
        "heads of 161": {"d": 161},
        "a concept has 33 guideline rows, expected at most 32": {"split": (8, 8, 8, 25)},
        "it takes the mean over heads, these tokens their max": {"heads": "max"},
    }
    for words, changes in refused.items():
        assert words in card.choose(**changes)[1]
        with pytest.raises(ValueError, match=words):
            card.choose("fused", **changes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="a card is no NVIDIA GPU of compute capability 8.0"):
        card.choose("fused")
    with pytest.raises(ValueError, match="attention is 'flash', expected auto, plain, fused"):
        card.choose("flash")
    assert card.trials == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the trial succeeds")
def test_a_trial_that_dies_is_one_line():
    rows, said = choice.trial(torch.device("cuda", 0), "float16", 8, [8, 8], [(64, 40)])
    assert rows == [] and said.startswith("the trial of the kernel failed: ") and "\n" not in said


def test_unguided_beside_guided(random_model):
    """Methods without maps run the same implementation: a picture in which nothing is found stays the unguided one."""
    calls = []

    def fused(q, k, v, k_g, split, rows):
        calls.append(list(rows))
        out, maps = attention_with_maps(q, k, v, k_g, split, rows)
        return out + 1e-3, maps  # unlike plain attention's

    tokens = dag.GuidelineTokens.from_text(random_model, "a red circle", "a blue star")
    tokens = replace(tokens, levels=(0,), lo=(2.0,), hi=(3.0,))
    hook = WithoutMaps(random_model.unet, [tokens], fused)
    *_, plain = dag.sample(random_model, ["a star"], dag.Guidance(), 2, hooks=[hook])
    *_, guided = dag.sample(random_model, ["a star"], dag.DAG(tokens, fused=fused), 2)
    *_, other = dag.sample(random_model, ["a star"], dag.Guidance(), 2)
    assert torch.equal(plain.x, guided.x) and not torch.equal(plain.x, other.x)
    assert calls == [[]] * (len(calls) // 2) + [[1]] * (len(calls) // 2)


@pytest.mark.full
def test_compiled_unet(monkeypatch):
    """A graph for the estimates of a step, one for the safety estimate of an image, one for those of several; one more
    when the batch changes for the first time."""
    graphs, kinds = [], {0}

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    sd = dag.load(device="cpu")
    tokens = dag.GuidelineTokens.load(ROOT / "weights" / "shapes" / "red-circle.safetensors")
    runs = ["a red circle", "a blue star", "a red circle"], ["a red circle"] * 4, ["a green square"] * 2
    alone = [list(dag.sample(sd, prompts, dag.DAG(tokens), 9)) for prompts in runs]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    setup.compile_unet(sd)
    for prompts, eager in zip(runs, alone, strict=True):
        steps = list(dag.sample(sd, prompts, dag.DAG(tokens), 9))
        kinds |= {min(2, int(step.guided.sum())) for step in steps} | {"another batch" for _ in prompts[3:]}
        assert len(graphs) == len(kinds) >= 2
        assert [step.guided.tolist() for step in steps] == [step.guided.tolist() for step in eager]
        assert all(torch.equal(ours.x, own.x) for ours, own in zip(steps, eager, strict=True))


def test_fused_on_the_cpu_is_one_line(tmp_path, capsys):
    assert sample.main(["--attention", "fused", "--device", "cpu", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    reason = "the queries are on cpu, expected cuda; use auto or plain"
    assert line == f"sample.py: --attention fused: the fused kernel cannot run: {reason}"


def test_fused_without_triton_is_one_line(tmp_path):
    argv = ["--attention", "fused", "--device", "cpu", "--out", str(tmp_path)]
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
        right, said = kernel_interpreted.numbers(replace(case, block_n=kernel.BLOCK_N), device="cuda")
        assert right, f"{case}: {said}"
