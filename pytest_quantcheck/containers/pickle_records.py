"""A pickle as inert records: an interpreter that imports nothing and calls nothing.

A pickle is a program for a stack machine. Ours knows the opcodes that `torch.save` writes (protocols 2 to 5) and a
table of globals: what rebuilds a tensor becomes a record of storage, offset, shape and strides; what is harmless and of
no interest (devices, random states, numpy scalars) becomes an `Inert`. Any other global is a `FormatError` naming it.

Source: torch 2.13, torch/_weights_only_unpickler.py and torch/_utils.py; Python's pickletools for the opcodes.
Departs from torch: keys of dicts are text and small integers only (shared nested tuples as a key keep torch busy for
ever), no key may be set twice, and memory and time are bounded by the limits below, whatever the pickle claims.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pytest_quantcheck.dtypes import BITS, OF_TORCH
from pytest_quantcheck.errors import FormatError

PICKLE_LIMIT = 64 << 20
OPCODE_LIMIT = 8_000_000
OBJECT_LIMIT = 2_000_000
MEMO_LIMIT = 1_000_000
LINE_LIMIT = 512
MAX_COUNT = 2**63 - 1
MAX_KEY = 2**60  # larger integers can be made to collide in a dict

# Bytes of one element, by torch's name of the dtype; those without a safetensors name can be weighed, not read.
WIDTHS = {name.removeprefix("torch."): max(8, BITS[dtype]) // 8 for name, dtype in OF_TORCH.items()} | {
    "complex32": 4,
    "complex128": 16,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}  # fmt: skip


class Global(NamedTuple):
    """A name that the pickle wants imported. It stays a name."""

    name: str


class Storage(NamedTuple):
    """A run of bytes outside the pickle: its key, and how many elements of a dtype it has."""

    dtype: str
    key: str
    elements: int

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.elements * WIDTHS[self.dtype]


class Tensor(NamedTuple):
    """A view of a storage; `offset` and `strides` count elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    fault: str = ""  # why its values are not those of the storage


class Wrapper(NamedTuple):
    """A tensor subclass that holds other tensors: its class, logical shape, and attributes."""

    kind: Global
    shape: tuple[int, ...]
    state: Mapping[object, object]


@dataclass
class Inert:
    """What the pickle would have made by calling `name`; nobody did."""

    name: str
    args: object = ()
    state: object = field(default=None)


class Pickle(NamedTuple):
    """The value of a pickle, where it ended, and the storages it named."""

    value: object
    stop: int
    storages: Mapping[str, Storage]


def run(raw: bytes | bytearray, start: int = 0) -> Pickle:
    """Return the value of the pickle at byte `start` of `raw` as records."""
    machine = _Machine(raw, start)
    try:
        machine.run()
    except FormatError as error:
        raise FormatError(f"pickle: {error.what} (byte {machine.at:,})") from None
    if len(machine.stack) != 1 or machine.marks:
        raise FormatError(f"pickle: ends with {len(machine.stack)} values on its stack (1)")
    return Pickle(machine.stack[0], machine.at, machine.storages)


class _Machine:
    """The state of one run: the stack, the marks in it, the memo and what has been counted."""

    def __init__(self, raw: bytes | bytearray, start: int) -> None:
        self.raw, self.at = raw, start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.objects = 0

    def run(self) -> None:
        for _ in range(OPCODE_LIMIT):
            opcode = self.byte()
            if opcode == 0x2E:  # STOP
                return
            step = _STEPS.get(opcode)
            if step is None:
                raise FormatError(f"opcode 0x{opcode:02x} is none that torch.save writes")
            step(self)
        raise FormatError(f"more than {OPCODE_LIMIT:,} opcodes")

    def take(self, count: int) -> bytes | bytearray:
        """Return the next `count` bytes."""
        stop = self.at + count
        if stop > len(self.raw):
            raise FormatError(f"wants {count:,} bytes, {len(self.raw) - self.at:,} are left: truncated")
        piece = self.raw[self.at : stop]
        self.at = stop
        return piece

    def byte(self) -> int:
        """Return the next byte as a number."""
        at = self.at
        self.at = at + 1
        try:
            return self.raw[at]
        except IndexError:
            raise FormatError("ends before its last opcode: truncated") from None

    def number(self, width: int) -> int:
        """Return the next unsigned little-endian number."""
        return int.from_bytes(self.take(width), "little")

    def text(self, count: int) -> str:
        try:
            return self.take(count).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise FormatError("a string is not UTF-8") from None

    def line(self) -> str:
        stop = self.raw.find(b"\n", self.at, self.at + LINE_LIMIT)
        if stop < 0:
            raise FormatError(f"a name without an end (limit {LINE_LIMIT} bytes)")
        text = self.text(stop - self.at)
        self.at = stop + 1
        return text

    def push(self, value: object) -> None:
        """Push a new object, which takes memory."""
        self.objects += 1
        if self.objects > OBJECT_LIMIT:
            raise FormatError(f"more than {OBJECT_LIMIT:,} objects")
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise FormatError("takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise FormatError("takes a value from an empty stack")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise FormatError("has no mark where one belongs")
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def mark(self) -> None:
        if len(self.marks) >= OBJECT_LIMIT:
            raise FormatError(f"more than {OBJECT_LIMIT:,} marks")
        self.marks.append(len(self.stack))

    def put(self, index: int) -> None:
        self.memo[index] = self.top()
        if len(self.memo) > MEMO_LIMIT:
            raise FormatError(f"memo of more than {MEMO_LIMIT:,} entries")

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise FormatError(f"memo has no entry {index:,}")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise FormatError("takes a value from an empty stack")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(values)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise FormatError(f"sets items of a {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes, int, type(None))) or (isinstance(key, int) and abs(key) >= MAX_KEY):
                raise FormatError(f"a {_kind(key)} is a key of a dict (only text and small integers may be)")
            if key in target:
                raise FormatError(f"the key `{str(key)[:200]}` is set twice")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise FormatError(f"appends to a {_kind(target)}")
        target.extend(values)

    def global_named(self, module: object, name: object) -> None:
        full = f"{module}.{name}"
        if full not in _CALLS and full not in _NAMES and not full.startswith(_NAMESPACES):
            raise FormatError(f"names `{full[:200]}`, which no state dict needs: refused, nothing was run")
        self.push(Global(full))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise FormatError("a global whose name is no text")
        self.global_named(module, name)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.push(_call(function, args))

    def new_object(self) -> None:
        args, cls = self.pop(), self.pop()
        if not isinstance(cls, Global) or not (cls.name.startswith(_NAMESPACES) or cls.name in _DICTS):
            raise FormatError(f"makes an object of {_called(cls)}")
        self.push({} if cls.name in _DICTS else Inert(cls.name, args))

    def build(self) -> None:
        """Set attributes: kept for inert records, no news of a dict (`_metadata` of a state dict)."""
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):
            raise FormatError(f"sets attributes of a {_kind(target)}")

    def persistent(self) -> None:
        storage = _storage(self.pop())
        if self.storages.setdefault(storage.key, storage) != storage:
            raise FormatError(f"storage `{storage.key[:200]}` has two sizes or types")
        self.push(storage)

    def frame(self) -> None:
        size = self.number(8)
        if size > len(self.raw) - self.at:
            raise FormatError(f"a frame of {size:,} bytes, {len(self.raw) - self.at:,} are left: truncated")

    def protocol(self) -> None:
        version = self.byte()
        if not 2 <= version <= 5:
            raise FormatError(f"protocol {version} (2 to 5)")


_Step = Callable[[_Machine], None]


def _long(machine: _Machine, count: int) -> None:
    if count > 255:
        raise FormatError(f"an integer of {count:,} bytes (limit 255)")
    machine.push(int.from_bytes(machine.take(count), "little", signed=True))


def _append_one(machine: _Machine) -> None:
    value = machine.pop()
    machine.append([value])


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


_STEPS: dict[int, _Step] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    ord("K"): lambda m: m.stack.append(m.byte()),
    ord("M"): lambda m: m.push(m.number(2)),
    0x8A: lambda m: _long(m, m.byte()),
    0x8B: lambda m: _long(m, m.number(4)),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push(m.text(m.number(4))),
    0x8C: lambda m: m.push(m.text(m.byte())),
    0x8D: lambda m: m.push(m.text(m.number(8))),
    ord("U"): lambda m: m.push(m.text(m.byte())),
    ord("T"): lambda m: m.push(m.text(m.number(4))),
    ord("C"): lambda m: m.push(bytes(m.take(m.byte()))),
    ord("B"): lambda m: m.push(bytes(m.take(m.number(4)))),
    0x8E: lambda m: m.push(bytes(m.take(m.number(8)))),
    0x96: lambda m: m.push(bytes(m.take(m.number(8)))),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    0x8F: lambda m: m.push([]),
    ord(")"): lambda m: m.stack.append(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    0x91: lambda m: m.push(tuple(m.pop_mark())),
    ord("a"): _append_one,
    ord("e"): lambda m: m.append(m.pop_mark()),
    0x90: lambda m: m.append(m.pop_mark()),
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    ord("q"): lambda m: m.put(m.byte()),
    ord("r"): lambda m: m.put(m.number(4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.byte()),
    ord("j"): lambda m: m.get(m.number(4)),
    ord("c"): lambda m: m.global_named(m.line(), m.line()),
    0x93: _Machine.stack_global,
    ord("R"): _Machine.reduce,
    0x81: _Machine.new_object,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}


def _storage(pid: object) -> Storage:
    """What torch's persistent id says: ('storage', type, key, location, elements), in old files a view of one too."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise FormatError("a persistent id that is no storage")
    _, cls, key, location, elements = pid[:5]
    dtype = _storage_dtype(cls)
    if dtype is None or not isinstance(key, str) or not isinstance(location, str) or not _is_size(elements):
        raise FormatError("a storage without a type, a key, a location or a size")
    if len(pid) == 6 and pid[5] is not None:
        raise FormatError(f"storage `{key[:200]}` is a view of another (torch before 0.4): not read")
    return Storage(dtype, key, elements)


def _storage_dtype(cls: object) -> str | None:
    return STORAGES.get(cls.name.rpartition(".")[2]) if isinstance(cls, Global) else None


def _call(function: object, args: object) -> object:
    """Return the record of a call. Nothing is called but the functions of this module."""
    make = _CALLS.get(function.name) if isinstance(function, Global) else None
    if make is None and isinstance(function, Global) and function.name.startswith(_NAMESPACES):
        return Inert(function.name, args)
    if make is None or not isinstance(args, tuple):
        raise FormatError(f"calls {_called(function)}")
    assert isinstance(function, Global)
    try:
        return make(function.name, *args)
    except TypeError:  # the wrong number of arguments
        raise FormatError(f"calls `{function.name}` with {len(args)} arguments") from None


def _tensor(name: str, storage: object, offset: object, shape: object, strides: object, *more: object) -> Tensor:
    """`_rebuild_tensor`, and v2 with (requires_grad, hooks, metadata)."""
    metadata = more[2] if len(more) > 2 else None
    typed = _of(storage, Storage, name)
    return _checked(name, typed, offset, shape, strides, typed.dtype, metadata)


def _tensor_of_dtype(  # v3: an untyped storage, and the dtype
    name: str,
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> Tensor:
    torch_name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
    if torch_name not in WIDTHS:
        raise FormatError(f"`{name}` of no dtype")
    return _checked(name, _of(storage, Storage, name), offset, shape, strides, torch_name, metadata)


def _checked(
    name: str, storage: Storage, offset: object, shape: object, strides: object, dtype: str, metadata: object
) -> Tensor:
    sizes, steps = _sizes(shape, name), _sizes(strides, name)
    if not _is_size(offset) or len(sizes) != len(steps):
        raise FormatError(f"`{name}` with offset, shape and strides that do not fit")
    assert isinstance(offset, int)
    last = (
        offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1 if all(sizes) else offset
    )
    if last * WIDTHS[dtype] > storage.nbytes and all(sizes):
        raise FormatError(
            f"a tensor {str(list(sizes))[:200]} of {dtype} reaches byte {last * WIDTHS[dtype]:,} of storage "
            f"`{storage.key[:200]}`, which has {storage.nbytes:,}"
        )
    fault = "its conjugate or negative is meant (torch metadata)" if metadata else ""
    return Tensor(storage, offset, sizes, steps, dtype, fault)


def _quantized(name: str, storage: object, offset: object, shape: object, strides: object, *more: object) -> Tensor:
    found = _tensor(name, storage, offset, shape, strides)
    return found._replace(fault=f"it is a torch.ao quantized tensor ({found.dtype}), which no scheme decodes")


def _parameter(name: str, value: object, *more: object) -> object:
    """`_rebuild_parameter`: a parameter is the tensor it holds."""
    return _of(value, (Tensor, Wrapper), name)


def _subclass(name: str, function: object, cls: object, args: object, state: object) -> object:
    """`_rebuild_from_type_v2`: a tensor with attributes, or a subclass that holds tensors."""
    if function == Global("torch._tensor._rebuild_from_type_v2"):
        raise FormatError(f"`{name}` of itself")
    value = _call(function, args)
    if isinstance(value, Wrapper):
        attributes = state[0] if isinstance(state, tuple) and state else state
        return value._replace(state=_of(attributes, dict, name))
    if cls not in (Global("torch.Tensor"), Global("torch.nn.parameter.Parameter")):
        raise FormatError(f"`{name}` of {_called(cls)}")
    return _of(value, Tensor, name)


def _wrapper(name: str, cls: object, dtype: object, shape: object, *more: object) -> Wrapper:
    return Wrapper(_of(cls, Global, name), _sizes(shape, name), {})


def _dict(name: str, *args: object) -> dict[object, object]:
    if args and args != ([],):
        raise FormatError(f"`{name}` with arguments")
    return {}


def _size(name: str, shape: object) -> object:
    return _of(shape, (tuple, list), name)


def _inert(name: str, *args: object) -> Inert:
    return Inert(name, args)


def _of(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise FormatError(f"`{name}` of a {_kind(value)}")
    return value


def _sizes(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 64 or not all(_is_size(size) for size in value):
        raise FormatError(f"`{name}` with a shape that is no list of up to 64 sizes (0 to 2^63-1)")
    return tuple(value)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _kind(value: object) -> str:
    return f"`{value.name[:200]}`" if isinstance(value, (Global, Inert)) else type(value).__name__


def _called(value: object) -> str:
    return f"`{value.name[:200]}`" if isinstance(value, Global) else f"a {_kind(value)}"


_CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.Counter": _inert,
    "torch.device": _inert,
    "torch.serialization._get_layout": _inert,
    "torch._utils._rebuild_sparse_tensor": _inert,
    "torch._utils._rebuild_nested_tensor": _inert,
    "torch._utils._rebuild_meta_tensor_no_storage": _inert,
    "_codecs.encode": _inert,
    "builtins.bytearray": _inert,
    "builtins.complex": _inert,
    "builtins.set": _inert,
    "__builtin__.bytearray": _inert,
    "__builtin__.complex": _inert,
    "__builtin__.set": _inert,
    "numpy.dtype": _inert,
    **{f"numpy.{core}.multiarray.{name}": _inert for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
}
_DICTS = frozenset({"collections.OrderedDict"})
# Names that stand for themselves: types of storages and numbers, classes that a call is given.
_NAMES = frozenset(
    {
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.storage.UntypedStorage",
        "numpy.ndarray",
        *(f"torch.{cuda}{name}" for cuda in ("", "cuda.") for name in STORAGES),
        *(f"torch.{name}" for name in WIDTHS),
        *(f"torch.per_{kind}" for kind in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")),
        "torch.per_channel_affine_float_qparams",
    }
)
# Classes of these libraries are kept by name, as the kind of a tensor subclass and of its attributes.
_NAMESPACES = ("torchao.",)
