"""Shared by all tests: no network, no leftovers, one seed; models are built once a session."""

import os
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a process per core instead: threads wait for each other on networks so small

import pytest
import torch

import dag
from dag.config import SHAPES
from dag.model import StableDiffusion

ROOT = Path(__file__).resolve().parent.parent
TOKENS = ROOT / "weights" / "shapes"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every connection is refused, for the whole suite."""

    def refuse(*args, **kwargs):
        raise ConnectionError("the tests must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def leases(tmp_path):
    """Skips where the system does not tell us that a file is about to be changed."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "lease").touch()
    with open(tmp_path / "lease") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except (AttributeError, OSError):
            pytest.skip("no leases here")


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch, tmp_path):
    """Verdicts on the kernel are not kept in the user's own cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Programs take the CPU unless a test names a device: the suite is the same one where there is a GPU."""
    monkeypatch.setattr("dag.cli.setup.default_device", lambda: "cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes() -> StableDiffusion:
    """The miniature with its committed weights."""
    return dag.load()


@pytest.fixture(scope="session")
def random_model() -> StableDiffusion:
    """The miniature's architecture with random weights, none of them zero or one by construction."""
    torch.manual_seed(7)
    sd = StableDiffusion(SHAPES)
    for name, p in sd.named_parameters():
        if p.ndim == 1:  # norms and biases, which start at 1 and 0
            p.data = (1.0 if name.endswith("weight") else 0.0) + 0.1 * torch.randn_like(p)
    return sd.eval().requires_grad_(False)
