"""Loading checkpoints: every kind people have gives the same model, lean and strict; any other file gives one line."""

import argparse
import enum
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tracemalloc
import typing
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dag
from dag.config import SD14, SHAPES
from dag.model import MINIATURE, StableDiffusion
from tests.conftest import ROOT
from tests.files import community, full_ema, given, half, original, write_ckpt, write_safetensors
from tests.measure import hostile
from weights import checkpoint, known, pickled
from weights.checkpoint import CheckpointError
from weights.known import EMA, UNET


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(MINIATURE / "shapes.safetensors").items()}


@pytest.fixture(scope="module")
def entries(weights):
    """The miniature as an original checkpoint."""
    return original(SHAPES, weights)


@pytest.fixture(scope="module")
def ckpt(entries, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "model.ckpt"
    write_ckpt(path, entries)
    return path


def same(sd: StableDiffusion, weights: dict[str, torch.Tensor], change=lambda w: w) -> None:
    ours = {name: v for prefix, module in sd.parts().items() for name, v in module.state_dict(prefix=prefix).items()}
    assert ours.keys() == weights.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32 and torch.equal(value, change(weights[name])), name


def test_full_size_names_and_sizes():
    """686 + 248 + 196 tensors and the parameter counts of the published file, whose 1145 entries we write."""
    with torch.device("meta"):
        sd = StableDiffusion(SD14)
    counts = [(len(part.state_dict()), sum(p.numel() for p in part.parameters())) for part in sd.parts().values()]
    assert counts == [(686, 859_520_964), (248, 83_653_863), (196, 123_060_480)]
    assert [layer.factor for layer in sd.unet.cross_attention()] == [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    entries = original(SD14)
    assert len(entries) == 1145
    nbytes = sum(int(np.prod(e.shape)) * e.dtype.itemsize for e in entries.values())
    assert nbytes == 4_264_989_852  # of the tensors of v1-5-pruned-emaonly.safetensors
    averaged = {name for name in full_ema(entries) if name.startswith(EMA)}
    assert len(averaged) == 686  # names without dots stay distinct


# --- what must load


KINDS = {
    "as it is": lambda e: e, "half": half, "averaged": full_ema, "community": community,
    "community, half": lambda e: half(community(e)),
}  # fmt: skip


@pytest.mark.parametrize("container", ["Lightning .ckpt", "bare .ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_model(kind, container, entries, weights, tmp_path):
    made, path = KINDS[kind](entries), tmp_path / "a file of any name"
    if container == ".safetensors":
        write_safetensors(path, made)
    else:
        write_ckpt(path, made, lightning=container.startswith("Lightning"))
    sd = dag.load(path)
    same(sd, weights, (lambda w: w.half().float()) if "half" in kind else lambda w: w)
    assert sd.origin == ("shapes, its EMA UNet" if kind == "averaged" else "shapes")
    assert set(sd.ignored) < set(made) and len(sd.ignored) == len(made) - len(weights)  # each used or of known origin


def test_our_ckpt_is_what_torch_reads(ckpt, entries):
    """torch's own restricted unpickler, told of Lightning's and numpy's names, finds the same tensors in it."""
    inert = type("Inert", (), {"__init__": lambda self, *args: None})
    names = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar")
    with torch.serialization.safe_globals([*((inert, name) for name in names), np.dtype, np.dtypes.Float64DType]):
        content = torch.load(ckpt, weights_only=True)
    assert content["global_step"] == 470000 and set(content) >= {"callbacks", "optimizer_states", "lr_schedulers"}
    file = checkpoint.read(ckpt)
    assert file.entries.keys() == content["state_dict"].keys() == entries.keys()
    for name, value in content["state_dict"].items():
        assert torch.equal(file.tensor(name), value), name
    assert b"numpy.core.multiarray\nscalar" in ckpt.read_bytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves(protocol, tmp_path):
    """Strides, shared storages, parameters, scalars, empty tensors and every dtype, by torch.save itself."""
    base = torch.randn(6, 4)
    saved = {"whole": base, "view": base[1:, 2:], "transposed": base.T, "parameter": torch.nn.Parameter(base + 1)}
    saved |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 5), "expanded": torch.ones(1).expand(4)}
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    saved |= {str(dtype): torch.arange(5).to(dtype) for dtype in kinds}
    saved["channels last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.save(OrderedDict(saved), tmp_path / "x", pickle_protocol=protocol)
    file = checkpoint.read(tmp_path / "x")
    assert file.entries.keys() == saved.keys()
    for name, value in saved.items():
        found = file.tensor(name)
        assert found.dtype == value.dtype and torch.equal(found, value), name
        assert torch.equal(file.tensor(name, dtype=torch.float32), value.float()), name


def test_safetensors_that_is_not_aligned(tmp_path):
    """A header of odd length: the library pads, other writers do not."""
    value = torch.randn(8)
    table = '{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}} '
    hostile.header(table + " " * (len(table) % 2 == 0), value.numpy().tobytes())(tmp_path / "x")
    assert torch.equal(checkpoint.read(tmp_path / "x").tensor("a"), value)


class DictConfig(dict):
    """Stands for omegaconf's class of this name: a dictionary's subclass with attributes of classes of its own."""


class Kind(enum.Enum):
    A = "a"


CONFIG = DictConfig(a=1)
CONFIG.__dict__ |= {"_metadata": typing.Any, "_content": defaultdict(list, a=[Kind.A])}
HYPERPARAMETERS = {
    "argparse": argparse.Namespace(lr=1e-4, logdir=pathlib.Path("logs"), seed=None, kind=Kind),
    "omegaconf": CONFIG,
    "pathlib": pathlib.PurePosixPath("/a/b"),
    "sets": {"set": {1, "a"}, "frozenset": frozenset([2, "b"])},
    "numpy": {"array": np.arange(6.0).reshape(2, 3), "number": np.float32(1.5), "text": np.array(["a"])},
    "keys": {0.5: 1, None: 2, True: 3, 1 << 40: 4, (1, 2): 5, b"6": 6, Kind.A: 7, -1: 8},
    "numbers": [1 << 2100, float("nan"), -1.5, 1 << 70],
    "collections": [deque([1, 2]), Counter("aab"), slice(1, 2), range(3), complex(1, 2), bytearray(b"a")],
    "torch": [torch.float16, torch.device("cpu"), torch.Size([2]), torch.Generator],
    "a function": os.system,
    "a call": hostile.payload(os.system, "touch executed"),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", HYPERPARAMETERS)
def test_what_is_beside_the_weights(kind, protocol, tmp_path, monkeypatch):
    """Hyperparameters of any kind load as placeholders; what they would call is neither imported nor called."""
    monkeypatch.chdir(tmp_path)
    write_ckpt(tmp_path / "x", {"a": given(torch.ones(2))}, protocol=protocol, b=HYPERPARAMETERS[kind])
    assert torch.equal(checkpoint.read(tmp_path / "x").tensor("a"), torch.ones(2))
    assert not (tmp_path / "executed").exists()


def test_a_tensor_of_unknown_origin(entries, weights, tmp_path):
    """It is named in a warning, on one line whatever its name, and told with what is not used."""
    stranger = "stranger\n\x1b[31m"
    write_safetensors(tmp_path / "x", entries | {stranger: given(torch.ones(2))})
    with pytest.warns(UserWarning, match=r"1 of unknown origin \(stranger\\n\\x1b\[31m\)") as said:
        sd = dag.load(tmp_path / "x")
    assert said[0].filename == __file__ and stranger in sd.ignored
    same(sd, weights)
    write_safetensors(tmp_path / "y", entries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dag.load(tmp_path / "y")


def test_no_checksum(tmp_path):
    """torch.save can be told to write none."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(tmp_path / "x").infolist()[0].CRC == 0
    assert torch.equal(checkpoint.read(tmp_path / "x").tensor("a"), torch.ones(3))


def test_links_and_odd_names(ckpt, weights, tmp_path):
    link = tmp_path / "ein Bild  \u65e5\u672c.bin"
    link.symlink_to(ckpt)
    same(dag.load(str(link)), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_requested_dtype(dtype, ckpt):
    sd = dag.load(ckpt, dtype=dtype)
    assert {p.dtype for p in sd.parameters()} == {dtype}
    assert not any(p.requires_grad for p in sd.parameters()) and not sd.training


def test_only_what_is_kept_is_read(entries, tmp_path):
    """Everything but the weights is garbage on the disk, and the model is the same; writes never reach the file."""
    noise = {name: given(torch.full((1000,), torch.nan)) for name in ("betas", "posterior_variance", "model_ema.decay")}
    write_safetensors(tmp_path / "x", entries | noise)
    before = (tmp_path / "x").read_bytes()
    sd = dag.load(tmp_path / "x")
    assert sd.alphas_cumprod.isfinite().all()
    for p in sd.parameters():
        p.zero_()
    assert (tmp_path / "x").read_bytes() == before


MIDDLE = replace(SHAPES, unet=replace(SHAPES.unet, model_channels=64))  # large enough to weigh: 147 MB
MEMORY = """
import ctypes, sys, torch, dag.model
from tests.files import resident
from tests.test_checkpoint import MIDDLE
dtype = getattr(torch, sys.argv[2])
dag.load(dtype=dtype)  # what is allocated once in a process
dag.model.SHAPES = MIDDLE
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)  # glibc may keep what was freed; not so what is measured
trim(0)
before = resident()
sd = dag.load(sys.argv[1], dtype=dtype)
assert sum(p.sum().item() for p in sd.parameters()) != 0
trim(0)
print(resident() - before, sum(p.nbytes for p in sd.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("write, dtype", [(write_ckpt, "float32"), (write_safetensors, "float16")])
def test_memory(write, dtype, tmp_path):
    """Every weight touched once, resident memory has grown by the bytes of the weights kept, not of the file."""
    write(tmp_path / "x", original(MIDDLE))
    argv = [sys.executable, "-c", MEMORY, str(tmp_path / "x"), dtype]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, kept = map(int, done.stdout.split())
    assert 0.5 * kept <= grown <= 1.4 * kept  # the file has 2 times and more; memory freed before may serve again


# --- what must not


def test_there_are_enough_hostile_files():
    assert len(hostile.FILES) >= 60 and len({message for _, message in hostile.FILES.values()}) > 60


@pytest.mark.parametrize("name", hostile.FILES)
def test_hostile_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = hostile.FILES[name]
    line = hostile.said(make, tmp_path / "x.ckpt")
    assert message in line and line.startswith(str(tmp_path)) and line.isprintable()
    assert not (tmp_path / "executed").exists()


HEAVY = (
    "calls bytearray of a terabyte", "a pickle of 200 MB in 200 kB", "directory of 5 MB", "header of 5 MB",
    "a name of 2 MB, 20,000 times",
)  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_no_memory_is_filled(name, tmp_path):
    hostile.FILES[name][0](tmp_path / "x.ckpt")
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path / "x.ckpt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_harmless_program_may_put_where_it_likes(tmp_path):
    """A memo number of 2**31 - 1, for which Python's own machine would take 16 GB, is only a number."""
    hostile.program(b"\x80\x02}r\xff\xff\xff\x7f.")(tmp_path / "x")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        checkpoint.read(tmp_path / "x")


def test_the_payloads_do_work(tmp_path, monkeypatch):
    """What the hostile pickles try to do is done when Python itself loads them: the tests above can fail."""
    monkeypatch.chdir(tmp_path)
    hostile.FILES["pickle that calls os.system"][0](tmp_path / "x")
    pickle.loads((tmp_path / "x").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:.*of unknown origin")
def test_flipped_bytes_of_the_pickle(ckpt, tmp_path):
    """Damage anywhere in the pickle is told by its checksum. With a checksum that fits, it is one line, or harmless; it
    never executes and never shows a traceback.
    """
    whole, path, refused = bytearray(ckpt.read_bytes()), tmp_path / "x.ckpt", 0
    start, field = whole.index(b"data.pkl") + 80, whole.rindex(b"archive/data.pkl") - 46 + 16
    for k in range(30):
        place = start + 193 * k
        whole[place] ^= 0x15
        path.write_bytes(whole)
        whole[place] ^= 0x15
        with pytest.raises(CheckpointError, match="'archive/data.pkl' is not what was written"):
            checkpoint.read(path)
        with open(path, "r+b") as file:
            file.seek(field)
            file.write(bytes(4))  # none
        try:
            dag.load(path)
        except CheckpointError as e:
            assert str(e).isprintable() and "written" not in str(e)
            refused += 1
    assert refused >= 20


INSTRUCTIONS = (
    *b"()]}Ntaesu01Rb.\x81\x85\x86\x87\x8f\x90\x91\x92\x93\x94", b"K\1", b"\x8c\1a", b"q\0", b"h\0", b"h\1", b"\x80\2",
    b"\x80\6", b"cmy\nName\n", b"\x95\2\0\0\0\0\0\0\0", b"ccollections\nOrderedDict\n",
)  # fmt: skip
MISTAKES = ("stack underflow", "unexpected MARK", "could not find MARK", "unsupported pickle", "data was truncated")


def test_the_machine_is_as_strict_as_pythons():
    """Of 20,000 random programs, each that Python's machine refuses for its stack, marks or frames is refused here."""

    class Anything(dict):
        __init__ = __setstate__ = append = extend = add = lambda self, *args, **more: None

    class Python(pickle.Unpickler):
        def find_class(self, module, name):
            return OrderedDict if name == "OrderedDict" else Anything

    rng, seen = random.Random(0), Counter()
    pieces = [bytes([piece]) if isinstance(piece, int) else piece for piece in INSTRUCTIONS]
    for _ in range(20_000):
        program = b"".join(rng.choices(pieces, k=rng.randint(1, 12))) + b"."
        try:
            Python(hostile.io.BytesIO(program)).load()
            found = "accepted"
        except Exception as e:
            found = next((mistake for mistake in MISTAKES if mistake in str(e)), "refused otherwise")
        if found in MISTAKES:
            with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
                pickled.run(program, {})
        seen[found] += 1
    assert min(seen[kind] for kind in (*MISTAKES, "accepted")) >= 50, seen


# --- a file that changes

OUT = UNET + "out.2.weight"


@pytest.fixture
def copy(ckpt, tmp_path):
    """A file of our own, last changed long ago."""
    path = tmp_path / "x"
    path.write_bytes(ckpt.read_bytes())
    os.utime(path, (0, 0))
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # read, mapped
@pytest.mark.parametrize("change", ["cut", "emptied", "overwritten"])
def test_a_file_that_is_changed_before_it_is_read(change, dtype, copy):
    file, size = checkpoint.read(copy), copy.stat().st_size
    if change == "overwritten":
        copy.write_bytes(bytes(size))
    else:
        os.truncate(copy, 1000 if change == "cut" else 0)
    with pytest.raises(CheckpointError, match="x: was changed while it was read"):
        file.tensor(OUT, dtype=dtype)


def test_a_file_that_is_replaced(copy, entries, monkeypatch):
    """The table and the tensors are of one file, even when another takes its name in between."""
    other, run = copy.with_name("other"), pickled.run
    other.write_bytes(bytes(copy.stat().st_size))
    monkeypatch.setattr(pickled, "run", lambda *args: (os.replace(other, copy), run(*args))[1])
    file = checkpoint.read(copy)
    assert not other.exists()
    read, mapped = file.tensor(OUT, dtype=torch.float64), file.tensor(OUT)
    other.write_bytes(b"another")
    os.replace(other, copy)
    assert torch.equal(read.float(), entries[OUT].make()) and torch.equal(mapped, entries[OUT].make())


@pytest.mark.parametrize("change", [lambda copy: os.truncate(copy, 1000), lambda copy: copy.write_bytes(b"")])
def test_a_file_that_is_changed_in_use(change, copy, weights, leases):
    """Who wants to cut it or write over it waits; we are told first, and the weights are whole."""
    sd = dag.load(copy)
    with pytest.raises(CheckpointError, match="x: is being changed while its weights are in use; start again"):
        change(copy)
    same(sd, weights)
    del sd
    os.truncate(copy, 1000)  # nobody needs it now


# --- which file it is


def test_published_files_by_size():
    assert known.by_size(4_265_380_512) == "sd-v1-4.ckpt or v1-5-pruned-emaonly.ckpt"
    assert known.by_size(4_265_146_304) == "v1-5-pruned-emaonly.safetensors"
    assert known.by_size(1) == "unknown SD 1.x checkpoint"


def test_verify(ckpt, monkeypatch):
    digest = checkpoint.sha256(ckpt)
    assert digest == subprocess.run(["sha256sum", ckpt], capture_output=True, text=True).stdout.split()[0]
    size = ckpt.stat().st_size
    with pytest.raises(CheckpointError, match=f"not a published file known here: sha256 {digest}"):
        known.verify(ckpt)
    monkeypatch.setattr(known, "PUBLISHED", (("one.ckpt", size, "0" * 64), ("other.ckpt", 1, None)))
    with pytest.raises(CheckpointError, match="not a published file known here, though of the size of one.ckpt"):
        known.verify(ckpt)
    monkeypatch.setattr(known, "PUBLISHED", (("one.ckpt", size, "0" * 64), ("other.ckpt", size, digest)))
    assert known.verify(ckpt) == "other.ckpt"
