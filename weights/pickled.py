"""The pickle of a .ckpt, run by a machine that cannot do anything but make a table of tensors.

A pickle is a program for a stack machine, and Python's machine will call whatever it is told to. The one below knows
only the instructions a table of tensors is made of; a name is only ever compared with two lists, never imported, and
what is "called" is the few lines here. So nothing in the file can run, whatever it holds.
"""

import pickletools
from itertools import islice
from typing import NamedTuple

import torch

STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
# Names that files of Lightning's time mention: a dictionary key, scores, hyperparameters. Called, they give None.
HARMLESS = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "_codecs.encode", "torch.Size", "torch.device",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType",
    *(str(dtype) for dtype in STORAGES.values()),
}  # fmt: skip
ORDERED, TENSOR, PARAMETER = (
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
)  # fmt: skip
LISTED = HARMLESS | set(STORAGES) | {ORDERED, TENSOR, PARAMETER}


MOST = 500_000  # instructions run; SD 1.4's table takes a tenth of it


class Name(str):
    """The dotted name of a class or function that a pickle asks for."""


class Unlisted(Exception):
    """A name that is on no list."""


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    offset: int  # of its first element, in bytes from the start of the file

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included; 0 for an empty tensor."""
        return 0 if 0 in self.shape else 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


class Storage(NamedTuple):
    """Raw elements that tensors share."""

    dtype: torch.dtype
    numel: int
    begin: int  # bytes from the start of the file


def run(program: bytes, places: dict[str, tuple[int, int]]):
    """Run a pickle and return what it built: containers, numbers, strings and an Entry for each tensor.

    places: key of a storage -> (begin, end) in the file. Raises Unlisted for a name on no list, and anything else for
    a program that makes no sense.
    """
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
        k = marks.pop()
        items = stack[k:]
        del stack[k:]
        return items

    for op, arg, _ in islice(pickletools.genops(program), MOST):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(op.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES":  # Python 2's text, numpy's numbers
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(op.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if op.name == "SETITEM" else since_mark()
                if not all(isinstance(key, str) or type(key) is int and abs(key) < 1 << 31 for key in items[::2]):
                    raise TypeError("a key that may take forever to hash")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_listed(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:  # anything else may take forever to write out
                    raise TypeError("a name that is no text")
                stack.append(_listed(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), places))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(_call(stack.pop(), args))
            case "BUILD":
                stack.pop()  # attributes of an object; none of those we know has any that matter
            case "STOP":
                return stack.pop()
            case _:
                raise ValueError(f"instruction {op.name}")
    raise ValueError("a program without an end")


def _listed(name: str) -> Name:
    if name not in LISTED:
        raise Unlisted(name)
    return Name(name)


def _storage(pid: tuple, places: dict[str, tuple[int, int]]) -> Storage:
    """("storage", class, key, device, elements) -> Storage. Raises for one that is longer than its entry."""
    kind, cls, key, _, numel = pid
    if type(cls) is not Name or type(key) is not str or type(numel) is not int:  # a nested tuple takes forever to hash
        raise TypeError("a storage described by other than names and numbers")
    dtype, (begin, end) = STORAGES[cls], places[key]
    if kind != "storage" or not 0 <= numel * dtype.itemsize <= end - begin:
        raise ValueError("a storage that is not in the file")
    return Storage(dtype, numel, begin)


def _call(name: Name, args: tuple):
    """What a listed name gives: a dictionary, a tensor's Entry, or None."""
    if not isinstance(name, Name):
        raise TypeError("a call of something that is no name")
    if name == ORDERED:
        return {}
    if name == PARAMETER:
        return args[0]
    if name != TENSOR:
        return None
    storage, first, shape, stride = args[:4]
    if type(shape) is not tuple or type(stride) is not tuple:  # a list could still grow
        raise TypeError("a shape that is no tuple")
    if not isinstance(storage, Storage) or len(shape) != len(stride) or len(shape) > 8:
        raise TypeError("a tensor without a storage or strides")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (first, *shape, *stride)):
        raise ValueError("a tensor of impossible shape")
    entry = Entry(storage.dtype, shape, stride, storage.begin + first * storage.dtype.itemsize)
    if first + entry.span > storage.numel:
        raise ValueError("a tensor that reaches out of its storage")
    return entry
