"""All that a person runs, on a device that is not the CPU: CUDA where there is one, else the pretended one."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import dag
import sample
import train_tokens
from dag import DAG, Guidance, GuidelineTokens, sampling
from dag.cam import combine
from dag.cli import annotations, annotators, training
from dag.config import METHODS
from dag.evaluation.baselines import by_name
from tests.conftest import TOKENS
from tests.pretended import AVAILABLE, Counting, MixedDevices, Pretended
from tests.test_tokens import folder
from weights.shapes import world

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "pretended"
pytestmark = pytest.mark.skipif(not (CUDA or AVAILABLE), reason="a pretended device needs torch 2.10")
FILES = [TOKENS / f"{name}.safetensors" for name in ("red-circle", "blue-star")]


@pytest.fixture(autouse=True)
def device():
    with Counting(DEVICE) if CUDA else Pretended() as mode:
        yield mode


@functools.cache
def model(dtype: torch.dtype, where: str = DEVICE) -> dag.StableDiffusion:
    """The miniature, in which an object of any size counts, from the first step on."""
    sd = dag.load(None, where, dtype)
    scaling = replace(sd.config.dag.scaling, min_area=0.0, full=1.01)
    sd.config = replace(sd.config, dag=replace(sd.config.dag, warmup=0, scaling=scaling))
    return sd


def concepts(count: int) -> list[GuidelineTokens]:
    """Tokens that see objects with a rim in any noise."""
    tokens = [GuidelineTokens.load(file) for file in FILES[:count]]
    return [replace(one, min_area=None, lo=(0.2,) * len(one.lo), hi=(0.5,) * len(one.hi)) for one in tokens]


def run(program, *argv, dtype: str = "float32") -> int:
    plain = ["--attention", "plain"] if program is sample else []  # test_kernel.py has the kernel
    return program.main(["--device", DEVICE, "--dtype", dtype, "--debug", *plain, *map(str, argv)])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_run_without_arguments(dtype, tmp_path):
    assert run(sample, "--steps", 1, "--out", tmp_path, dtype=dtype) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["pictures"]) == 8 and report["settings"]["device"] == DEVICE


@pytest.mark.parametrize("b, dtype", [(1, torch.float16), (3, torch.float32)])
@pytest.mark.parametrize("name", METHODS)
def test_methods(name, b, dtype):
    """Every method guides there, with two concepts, and draws what it draws on the CPU."""
    texts, drawn = ["a red circle on grey", "a blue star", ""][:b], []
    for sd in (model(dtype), model(torch.float32, "cpu")):
        method = by_name(name, ["a red circle", "a blue star"], concepts(2))
        method.warmup = 0
        *_, last = dag.sample(sd, texts, method, 2, height=64, width=128)
        assert last.x.device == sd.device and last.guided.any() == (name != "none")
        drawn.append(last.x.cpu())
    # A mask's edge may fall on the other side of a value, in half precision more often: single values may be far apart.
    limit = 0.1 if dtype == torch.float16 else 0.05
    assert (drawn[0] - drawn[1]).abs().mean() < limit * drawn[1].abs().mean()


def test_maps_are_written(tmp_path, monkeypatch):
    """The program with two concepts, in two batches of pictures that are not square."""
    there = model(torch.float16)
    monkeypatch.setattr(dag, "load", lambda *_: there, raising=False)
    argv = ["--prompt", "a red circle", "--n-images", 4, "--batch-size", 3, "--steps", 2, "--save-maps"]
    for k, one in enumerate(concepts(2)):
        one.save(tmp_path / f"{k}.safetensors")
        argv += ["--tokens", tmp_path / f"{k}.safetensors"]
    assert run(sample, *argv, "--height", 64, "--width", 128, "--out", tmp_path, dtype="float16") == 0
    assert len(list(tmp_path.glob("*-maps.npy"))) == 4
    assert all(picture["steps_guided"] for picture in json.loads((tmp_path / "report.json").read_text())["pictures"])


def test_large_pictures_that_are_not_square(tmp_path):
    argv = ["--prompt", "a red circle", "--steps", 1, "--height", 448, "--width", 640]
    assert run(sample, *argv, "--out", tmp_path) == 0
    assert Image.open(tmp_path / "000-a-red-circle.png").size == (640, 448)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_detect(dtype, tmp_path, capsys):
    scene = world.Scene((world.Object("red", "circle", 36, 34, 26),), "grey", "drawing")
    Image.fromarray(world.render(scene)[0]).save(tmp_path / "p.png")
    tokens = [arg for file in FILES for arg in ("--tokens", file)]
    assert run(sample, "--detect", tmp_path / "p.png", *tokens, "--out", tmp_path, dtype=dtype) == 0
    said = capsys.readouterr().out
    assert "a red circle: yes, at the top left" in said and "a blue star: no" in said


def test_token_training(tmp_path, monkeypatch):
    """Pictures drawn on the spot, along their trajectories; then a folder of pictures with noise added."""
    out = tmp_path / "t.safetensors"
    for module in (annotations, training):
        monkeypatch.setattr(module, "STRIDE", 1)
        monkeypatch.setattr(module, "STEPS", 8)
    monkeypatch.setattr(annotators, "CONTRAST", 0.0)
    monkeypatch.setattr(sampling, "sample", functools.partial(sampling.sample, steps=8))
    drawing = ["--n-unsafe", 2, "--n-safe", 1, "--rounds", 1, "--steps", 2]
    assert run(train_tokens, *drawing, "--out", out) == 0
    folder(tmp_path / "data")
    argv = ["--data", tmp_path / "data", "--recipe", "paper", "--steps", 2, "--out", out]
    assert run(train_tokens, *argv, dtype="float16") == 0
    assert GuidelineTokens.load(out).loss > 0


def counted(b: int, count: int, find: bool, device: Counting) -> tuple[int, int, int]:
    """The most that is sent, read and written in a step of b pictures with so many concepts, 0: plain guidance."""
    sd = model(torch.float32, device.device.type)
    scaling = replace(sd.config.dag.scaling, min_area=0.0 if find else 1.0)  # else: what is there is too small
    method = DAG(*concepts(count), cfg=replace(sd.config.dag, scaling=scaling)) if count else Guidance()
    found, loop = [], dag.sample(sd, ["a red circle on grey"] * b, method, 3)
    next(loop)  # prepares
    for _ in range(2):
        device.reset()
        assert next(loop).guided.tolist() == [find] * b
        found.append((device.sent, device.reads.total(), device.writes.total()))
    return tuple(map(max, zip(*found, strict=True)))


CASES = [(b, count) for b in (1, 3) for count in (1, 2)]  # pictures and concepts


def test_reads(device):
    """The host waits for the maps and for whether the latent is finite, whatever the batch, the concepts and what is
    found; it hands over a strength and two lists of indices for each concept that acts. On CUDA the lists are handed
    over inside an operation, where they cannot be counted; tests/measure/gpu.py counts the waits."""
    for b, count in CASES:
        for find in (False, True):
            _, reads, writes = counted(b, count, find, device)
            assert reads == 2 and (CUDA or writes == (3 * count if find else 0)), (b, count, find, reads, writes)


def test_operations(device):
    """A step in which nothing is found sends at most 50 operations more than a plain one, as SD 1.4 would: 7.4 %."""
    plain, looking = (counted(1, count, False, device)[0] for count in (0, 1))
    assert plain < looking <= plain + 50, (plain, looking)


def on_the_cpu(A):
    return A + torch.zeros(A.shape)


def to_numpy(A):
    return A * float(A.numpy().max())


def wrong_index(A):
    return torch.ones(2)[(A > 0).long()]


@pytest.mark.parametrize("fault", [on_the_cpu, to_numpy, wrong_index])
def test_faults_are_caught(fault, monkeypatch):
    """With the file and line of the fault, not of where it came out."""
    monkeypatch.setattr("dag.cam.combine", lambda *args: fault(combine(*args)))
    with pytest.raises((RuntimeError, TypeError)) as caught:
        list(dag.sample(model(torch.float32), ["a"], DAG(*concepts(1)), 1))
    line = fault.__code__.co_firstlineno + 1
    assert CUDA or caught.type is MixedDevices and f"tests/test_device.py:{line}: " in str(caught.value)
