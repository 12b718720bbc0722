"""The pickle of a .ckpt, run by a machine that cannot do anything but make a table of tensors.

A pickle is a program for a stack machine, and Python's machine will call whatever it is told to. The one below knows
only the instructions that pickles of data are made of; a name is only ever compared with a list, never imported, and
what is "called" is the few lines here. So nothing in the file can run, whatever it holds. What it asks for beyond
tensors (callbacks, hyperparameters) becomes an inert placeholder.
"""

import pickle
import pickletools
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
ORDERED, TENSOR, PARAMETER = (
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
)  # fmt: skip
LISTED = {*STORAGES, ORDERED, TENSOR, PARAMETER}
MOST = 500_000  # instructions run; SD 1.4's table takes a tenth of it


class Name(str):
    """The dotted name of a listed class or function that a pickle asks for."""


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Stands for anything that is not listed, and for whatever would come of calling or filling it."""

    name: str  # dotted, at most 80 characters of each part


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
    """Run a pickle and return what it built: containers, numbers, strings, an Entry for each tensor, placeholders.

    Dictionaries keep what has a string for its key: nothing else names a tensor.
    places: key of a storage -> (begin, end) in the file. Raises anything for a program that makes no sense.
    """
    stack, marks, memo = [], [], {}  # marks: the stacks below each mark, out of reach until it is taken away
    frame = 0  # where the last one ends

    def since_mark() -> list:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    for op, arg, place in islice(pickletools.genops(program), MOST):
        match op.name:
            case "PROTO":
                if arg > pickle.HIGHEST_PROTOCOL:
                    raise ValueError(f"protocol {arg}")
            case "FRAME":
                if place < frame or place + 9 + arg > len(program):
                    raise ValueError("a frame in a frame, or that reaches out of the program")
                frame = place + 9 + arg
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(op.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING":  # or Python 2's
                stack.append(arg)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":  # numpy's numbers
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Placeholder("builtins.set"))
            case "FROZENSET":
                since_mark()
                stack.append(Placeholder("builtins.frozenset"))
            case "MARK":
                marks.append(stack)
                stack = []
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                since_mark()
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(op.name[-1]))]
                stack.append(tuple(items[::-1]))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if op.name == "APPEND" else since_mark()
                if not isinstance(stack[-1], Placeholder):
                    stack[-1].extend(items)
            case "ADDITEMS":
                since_mark()
                if not isinstance(stack[-1], Placeholder):
                    raise TypeError("items added to what is no set")
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if op.name == "SETITEM" else since_mark()
                named = {key: v for key, v in zip(items[::2], items[1::2], strict=True) if type(key) is str}
                if not isinstance(stack[-1], Placeholder):
                    stack[-1].update(named)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_named(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:  # anything else may take forever to write out
                    raise TypeError("a name that is no text")
                stack.append(_named(module, name))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), places))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if op.name == "NEWOBJ_EX":
                    stack.pop()  # arguments by name; nothing listed takes any
                args = stack.pop()
                stack.append(_call(stack.pop(), args))
            case "BUILD":
                stack.pop()  # attributes of an object; none of those we know has any that matter
                stack[-1]  # raises where there is no object
            case "STOP":
                return stack.pop()
            case _:
                raise ValueError(f"instruction {op.name}")
    raise ValueError("a program without an end")


def _named(module: str, name: str) -> Name | Placeholder:
    dotted = f"{module[:80]}.{name[:80]}"  # cut: a program can ask for megabytes of name 100,000 times
    return Name(dotted) if dotted in LISTED else Placeholder(dotted)


def _storage(pid: tuple, places: dict[str, tuple[int, int]]) -> Storage | Placeholder:
    """("storage", class, key, device, elements) -> Storage. Raises for one that is longer than its entry."""
    kind, cls, key, _, numel = pid
    if isinstance(cls, Placeholder):
        return cls
    if type(cls) is not Name or type(key) is not str or type(numel) is not int:  # a nested tuple takes forever to hash
        raise TypeError("a storage described by other than names and numbers")
    dtype, (begin, end) = STORAGES[cls], places[key]
    if kind != "storage" or not 0 <= numel * dtype.itemsize <= end - begin:
        raise ValueError("a storage that is not in the file")
    return Storage(dtype, numel, begin)


def _call(name: Name | Placeholder, args: tuple):
    """What a name gives: a dictionary, a tensor's Entry, or a placeholder, also for a tensor made of one."""
    if not isinstance(name, Name | Placeholder) or type(args) is not tuple:
        raise TypeError("a call of something that is no name, or with no arguments")
    if name == ORDERED:
        return {}
    if name == PARAMETER:
        return args[0]
    if name != TENSOR:
        return name if isinstance(name, Placeholder) else Placeholder(name)
    storage, first, shape, stride = args[:4]
    if made := [part for part in args[:4] if isinstance(part, Placeholder)]:
        return made[0]
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
