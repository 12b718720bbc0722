"""A pretended device: tensors that say they are on another device, hold CPU memory and refuse what a real one refuses.

    with Pretended() as mode:  # tensors made on mode.device, or moved there, are pretended ones
        ...
    mode.sent, mode.reads, mode.writes

`Counting` alone does the same accounts on a real device. Neither says anything of kernels, speed or precision.
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME, ROOT = "pretended", Path(__file__).resolve().parent.parent

FREE = {"_unsafe_view", "_local_scalar_dense"}  # no operations, nor are views and memory that is not filled
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
SLOW = {"convolution", "addmm", "bmm", "mm"}  # in float16 on a CPU


@functools.cache
def register() -> None:
    """Give torch the device guard and hooks that only a backend in C++ would have; for the rest of the process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    module = getattr(torch, NAME)  # torch.compile saves and restores the random numbers of every backend it knows
    module.get_rng_state, module.set_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8), lambda *_: None


class MixedDevices(RuntimeError):
    """What a real device would have refused, with the file and line that asked for it."""


def place() -> str:
    """File and line of the project's innermost code."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the project"


def tensors(x) -> list[torch.Tensor]:
    """All tensors in nested arguments."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [t for y in x for t in tensors(y)] if isinstance(x, (list, tuple)) else []


def mapped(f, x):
    """f of every tensor in nested arguments."""
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, dict):
        return {k: mapped(f, y) for k, y in x.items()}
    return type(x)(mapped(f, y) for y in x) if type(x) in (list, tuple) else x


class Counting(TorchDispatchMode):
    """Counts what the host sends to a device and what it waits for.

    sent: operations, without views. reads: values that the host asks for, by file and line; there it waits for all that
    was sent before. writes: values that it hands over, such as a list of indices; a GPU makes it wait there too.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = torch.device(device, 0)
        self.reset()

    def reset(self) -> None:
        self.sent, self.reads, self.writes = 0, Counter(), Counter()

    def here(self, t: torch.Tensor) -> bool:
        return t.device.type == self.device.type

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        out = self.run(func, args, kwargs, given)
        made = tensors(out)
        if any(map(self.here, given + made)):
            self.count(func, args, given, made)
        return out

    def run(self, func, args, kwargs, given):
        return func(*args, **kwargs)

    def count(self, func, args, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        name = func._schema.name.split("::")[1]
        if name in ("_to_copy", "copy_"):
            source = given[-1]
            if self.here(source) != self.here(made[0]):
                (self.reads if self.here(source) else self.writes)[place()] += 1
                return
        if waits(func, name, args):
            self.reads[place()] += 1
        self.sent += not (func.is_view or name in FREE or "empty" in name)


def waits(func, name: str, args) -> bool:
    """Whether a value on the device decides the result's shape, or is the result."""
    if name in INDEXING:
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool and i.device == args[0].device]
        return bool(masks) and (name == "index" or args[2].numel() > 1)  # one value for all is a masked fill
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class Tensor(torch.Tensor):
    """A tensor on the pretended device; `memory` is where it really lies."""

    @staticmethod
    def __new__(cls, memory: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            device=torch.device(NAME, 0), requires_grad=memory.requires_grad,
        )  # fmt: skip
        self.memory = memory.detach()
        return self

    __torch_dispatch__ = None  # only inside `with Pretended()`

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """What C++ would ask the device about, or does in a way that a wrapper cannot follow."""
        if func in (F.scaled_dot_product_attention, torch.quantile):
            return current().whole(func, args, kwargs or {})
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise MixedDevices(f"{place()}: {func.__name__} of a tensor on {NAME}, expected one on the CPU")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            x, index, *value = args  # a list becomes a tensor, which is handed over
            index = tuple(map(as_index, index)) if isinstance(index, tuple) else as_index(index)
            args = (x, index, *value)
        with torch._C.DisableTorchFunctionSubclass():  # or what is read back would be pretended too
            return func(*args, **(kwargs or {}))


def as_index(i):
    return torch.tensor(i, device=torch.device(NAME, 0)) if isinstance(i, list) else i


def current() -> "Pretended":
    return torch.utils._python_dispatch._get_current_dispatch_mode()


class Pretended(Counting):
    """Runs on the CPU what is asked of the device, if a real one would."""

    def __init__(self):
        register()
        super().__init__(NAME)

    def __enter__(self):
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) asks this mode too
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(self.lifted)
        return super().__exit__(*exception)

    def run(self, func, args, kwargs, given):
        target = kwargs.get("device")
        here = [isinstance(t, Tensor) for t in given]
        if not any(here) and (target is None or torch.device(target).type != NAME):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        self.refuse_mixing(func, name, args, given, here)
        if target is not None:
            here, kwargs = [torch.device(target).type == NAME], kwargs | {"device": torch.device("cpu")}
        out = self.on_memory(func, name, args, kwargs)
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            if out.shape != args[0].shape:
                raise NotImplementedError(f"{place()}: {func} changes the shape in place")
            return args[0]
        return mapped(Tensor, out) if any(here) else out

    def on_memory(self, func, name, args, kwargs):
        def memory(t: torch.Tensor) -> torch.Tensor:
            return t.memory if isinstance(t, Tensor) else t

        args, kwargs = mapped(memory, args), mapped(memory, kwargs)
        if name in SLOW and args[0].dtype == torch.float16:
            return func(*mapped(torch.Tensor.float, args), **kwargs).half()
        return func(*args, **kwargs)

    def whole(self, func, args, kwargs):
        """A function of torch.nn as one operation."""
        self.sent += 1
        given = tensors((args, kwargs))
        self.refuse_mixing(func, func.__name__, args, given, [isinstance(t, Tensor) for t in given])
        return Tensor(self.on_memory(func, func.__name__, args, kwargs))

    def refuse_mixing(self, func, name: str, args, given: list[torch.Tensor], here: list[bool]) -> None:
        if all(here) or name in ("copy_", "_to_copy"):
            return
        fits = [there or t.ndim == 0 for t, there in zip(given, here, strict=True)]  # a number goes anywhere
        if name.endswith("_"):  # but cannot be changed there
            fits[0] = here[0]
        if name in INDEXING:  # an index on the CPU is handed over; one on the device is of no use to the CPU
            fits = [here[0], fits[-1] or name == "index"]
        if not all(fits):
            shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in given)
            raise MixedDevices(f"{place()}: {func} was given {shapes}; expected one device")
