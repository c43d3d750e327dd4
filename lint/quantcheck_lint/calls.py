"""What calls and arithmetic do to tensors and their sizes, as far as `flow.py` follows them. One table per kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import libcst as cst

from quantcheck_lint.trees import arguments, called, dotted, number, requires_grad
from quantcheck_lint.values import (
    Each,
    ElementSize,
    Function,
    Items,
    Lookup,
    Number,
    Origin,
    Store,
    Tensor,
    Value,
    either,
    element,
    trained,
)

if TYPE_CHECKING:
    from quantcheck_lint.flow import Flow, Scope

ELEMENTS = frozenset({"numel", "nelement"})
EXACT_SIZES = frozenset({"element_size", "itemsize", "nbytes", "finfo", "iinfo", "_element_size"})
BYTES_PER_ELEMENT = frozenset({0.5, 2.0, 4.0, 8.0, 16.0, 32.0})
BYTES_NAME = re.compile(r"(?:^|_)(?:n?bytes?|bits?|bpp|bpw)(?:_|$)", re.IGNORECASE)
# A buffer of that many elements is made: the number of stored elements is what is wanted.
FILLED = ("zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "resize_", "narrow")
LIKE_ANOTHER = ("new_zeros", "new_ones", "new_empty", "new_full")
TYPED = ("Tensor", "FloatTensor", "HalfTensor", "DoubleTensor", "IntTensor", "LongTensor", "ByteTensor", "BoolTensor")
ALLOCATES = frozenset((*FILLED, *LIKE_ANOTHER, *TYPED))


# Reading a size


@dataclass(frozen=True, slots=True)
class SizeRead:
    """`subject` is the tensor whose elements are counted, `others` the rest of the call's expressions."""

    subject: cst.BaseExpression
    others: tuple[cst.BaseExpression, ...] = ()


def size_read(node: cst.CSTNode) -> SizeRead | None:
    """`p.numel()`, `torch.numel(p)`, `p.shape.numel()`, `math.prod(p.size())`, `reduce(mul, p.shape)`."""
    name = called(node)
    if not isinstance(node, cst.Call):
        return None
    if name in ELEMENTS and isinstance(node.func, cst.Attribute):
        return _numel(node, node.func)
    given = arguments(node)
    if name == "prod" and given:
        subject = _shape_of(given[0])
        return None if subject is None else SizeRead(subject)
    if name == "reduce" and len(given) >= 2:
        subject = _shape_of(given[1])
        return None if subject is None else SizeRead(subject, (given[0],))
    return None


def _numel(node: cst.Call, function: cst.Attribute) -> SizeRead | None:
    if len(node.args) == 1 and dotted(function.value) in {"torch", "torch.Tensor", "th", "Tensor"}:
        return SizeRead(node.args[0].value)
    if node.args:
        return None
    return SizeRead(_shape_of(function.value) or function.value)


def _shape_of(node: cst.BaseExpression) -> cst.BaseExpression | None:
    """`p` for `p.shape`, `p.size()` and both inside `list()`, `tuple()` or a tensor."""
    while called(node) in {"list", "tuple", "tensor", "array", "asarray", "Size", "LongTensor"}:
        assert isinstance(node, cst.Call)
        given = arguments(node)
        if not given:
            return None
        node = given[0]
    if isinstance(node, cst.Attribute) and node.attr.value == "shape":
        return node.value
    if called(node) == "size" and isinstance(node, cst.Call) and not node.args:
        return node.func.value if isinstance(node.func, cst.Attribute) else None
    return None


# Arithmetic


def arithmetic(node: cst.BinaryOperation, left: Value | None, right: Value | None) -> Value | None:
    """The value of `left operator right`: a count stays one when it is scaled, and becomes bytes when it is sized."""
    match node.operator:
        case cst.Add():
            return either(left, right)
        case cst.Subtract():
            return either(left, right) if isinstance(left, Number) or isinstance(right, Number) else left
        case cst.Multiply():
            if (isinstance(left, Number) and left.settled) or (isinstance(right, Number) and right.settled):
                return None
            if isinstance(left, Number):
                return _times(left, node.right, right)
            return _times(right, node.left, left) if isinstance(right, Number) else None
        case cst.Divide() | cst.FloorDivide():
            scaled = number(node.right) is not None or _is_unit(node.right)
            return left if isinstance(left, Number) and (scaled or left.uses) else None
    return None


def _times(count: Number, factor: cst.BaseExpression, value: Value | None) -> Number | None:
    if isinstance(value, (ElementSize, Number)):
        discard(count)
        return None
    if requires_grad(factor) is True:
        return replace(count, trainable=True)
    scale = number(factor)
    if scale is not None:
        return in_memory(count) if scale in BYTES_PER_ELEMENT else count
    name = (dotted(factor) or "").rpartition(".")[2]
    if BYTES_NAME.search(name):
        return in_memory(count)
    return count if _is_unit(factor) else None


def discard(count: Number) -> None:
    """Note that what was added up to `count` is no number of parameters."""
    for use in count.uses:
        use.discarded = True


def in_memory(count: Number) -> Number:
    """`count`, and what was added up to it, as a number of bytes."""
    for use in count.uses:
        use.memory = True
    return replace(count, memory=True)


def _is_unit(node: cst.BaseExpression) -> bool:
    """`MB`, `units.GiB`, `MILLION`: a constant by its spelling."""
    name = (dotted(node) or "").rpartition(".")[2]
    return name.upper() in {"B", "K", "M", "G", "KB", "MB", "GB", "KIB", "MIB", "GIB", "MILLION", "BILLION"}


# Calls


def call(flow: Flow, node: cst.Call, scope: Scope) -> Value | None:
    """The value of a call that is not a size read."""
    name = called(node)
    handler = _CALLS.get(name)
    if handler is not None:
        handled, value = handler(flow, node, scope)
        if handled:
            return value
    return _other(flow, node, scope)


Handled = tuple[bool, "Value | None"]
NOT_MINE: Handled = (False, None)


def _other(flow: Flow, node: cst.Call, scope: Scope) -> Value | None:
    """A function of this source, or anything else: receiver and arguments are visited."""
    name = called(node)
    receiver = flow.value(node.func.value, scope) if isinstance(node.func, cst.Attribute) else None
    full = dotted(node.func)
    function = scope.get(full) if full else flow.value(node.func, scope) if not name else None
    given = [flow.value(arg.value, scope) for arg in node.args if arg.keyword is None]
    named = {arg.keyword.value: flow.value(arg.value, scope) for arg in node.args if arg.keyword is not None}
    if isinstance(function, Function):
        is_method = full is not None and full.startswith(("self.", "cls."))
        return flow.receive(function, given, named, method=is_method)
    if name in ALLOCATES:
        return _allocated(given)
    if name in EXACT_SIZES or name.endswith(("dtype_size", "byte_size", "bytes_per_element")):
        return ElementSize()
    return _method(name, receiver, given)


def _allocated(given: Sequence[Value | None]) -> Value | None:
    for value in given:
        if isinstance(value, Number):
            discard(value)
    # `torch.DoubleTensor([p.numel()])` is a number in a tensor.
    held = element(given[0]) if given else None
    return held if isinstance(held, Number) else None


def _method(name: str, receiver: Value | None, given: Sequence[Value | None]) -> Value | None:
    match receiver:
        case Each() | Lookup() | Store() if name in _METHODS:
            return _METHODS[name](receiver)
        case Tensor() if name in SAME_TENSOR:
            return receiver
        case Number() if name in {"item", "to", "cuda", "cpu", "float", "int", "long"}:
            return receiver
    return None


MOVED = ("detach", "cpu", "cuda", "to", "float", "half", "double", "clone", "contiguous")
RESHAPED = ("view", "reshape", "flatten", "t")
SAME_TENSOR = frozenset((*MOVED, *RESHAPED))


def _values(receiver: Each | Lookup | Store) -> Value | None:
    match receiver:
        case Lookup(of):
            return Each(of)
        case Store(origin):
            return Each(Store(origin))
    return None


def _pairs(receiver: Each | Lookup | Store) -> Value | None:
    values = element(_values(receiver))
    return None if values is None else Each(Items((None, values)))


def _entry(receiver: Each | Lookup | Store) -> Value | None:
    return receiver if isinstance(receiver, Store) else receiver.of


_METHODS: dict[str, Callable[[Each | Lookup | Store], Value | None]] = {
    "values": _values,
    "items": _pairs,
    "get": _entry,
    "pop": _entry,
    "get_tensor": _entry,
    "__next__": _entry,
    "copy": lambda receiver: receiver,
}


def _parameters(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    if not isinstance(node.func, cst.Attribute):
        return NOT_MINE
    _visit(flow, node, scope)
    return True, Each(Tensor(Origin.PARAMETERS))


def _named_parameters(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    if not isinstance(node.func, cst.Attribute):
        return NOT_MINE
    _visit(flow, node, scope)
    return True, Each(Items((None, Tensor(Origin.PARAMETERS)), named=True))


def _stored(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    """A state dict: of a model, or read from a file."""
    if called(node) == "load" and dotted(node.func) not in {"torch.load", "th.load"}:
        return NOT_MINE
    _visit(flow, node, scope)
    return True, Store(Origin.STATE_DICT)


def _visit(flow: Flow, node: cst.Call, scope: Scope) -> None:
    """Evaluate what a call is made on and with, for the places inside."""
    if isinstance(node.func, cst.Attribute):
        flow.value(node.func.value, scope)
    for arg in node.args:
        flow.value(arg.value, scope)


def _sum(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    receiver = flow.value(node.func.value, scope) if isinstance(node.func, cst.Attribute) else None
    given = [flow.value(arg.value, scope) for arg in node.args]
    value = either(receiver, *given[:1])
    of = element(value)
    if isinstance(of, Number):
        for place in of.places:
            place.model = _whole_model(node)
        return True, flow.add_up(of, node)
    if isinstance(of, Each):
        return True, of
    return True, value if isinstance(value, Number) else None


def _whole_model(node: cst.Call) -> cst.BaseExpression | None:
    """`m` for `sum(... for p in m.parameters())` with no other filter than `requires_grad`."""
    loop = node.args[0].value if node.args else None
    if not isinstance(loop, (cst.GeneratorExp, cst.ListComp)) or loop.for_in.inner_for_in is not None:
        return None
    source = loop.for_in.iter
    if called(source) not in {"parameters", "named_parameters"} or not isinstance(source, cst.Call) or source.args:
        return None
    if any(
        not isinstance(test.test, cst.Attribute) or requires_grad(test.test) is not True for test in loop.for_in.ifs
    ):
        return None
    return source.func.value if isinstance(source.func, cst.Attribute) else None


COLLECTED = ("list", "tuple", "set", "frozenset", "iter", "sorted", "reversed", "deque", "islice", "tqdm", "track")
STACKED = ("array", "asarray", "tensor", "as_tensor", "stack", "deepcopy", "copy", "cast")
ROUNDED = ("int", "float", "abs", "round", "str", "Decimal", "int64", "float64")
SAME_ITEMS = (*COLLECTED, *STACKED, *ROUNDED)


def _same(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    """`list(x)` and everything else that iterates like its first argument."""
    given = [flow.value(arg.value, scope) for arg in node.args]
    if not given:
        return True, None
    first = given[0]
    if isinstance(first, Number):
        return True, first
    if isinstance(first, Lookup):
        return True, None
    return True, first


def _mapping(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = [flow.value(arg.value, scope) for arg in node.args]
    first = given[0] if given else None
    of = element(first)
    if isinstance(of, Items) and len(of.items) == 2 and of.items[1] is not None:
        return True, Lookup(of.items[1])
    return True, first if isinstance(first, (Lookup, Store)) else None


def _enumerate(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = [flow.value(arg.value, scope) for arg in node.args]
    of = element(given[0]) if given else None
    return True, None if of is None else Each(Items((None, of)))


def _zip(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    items = tuple(element(flow.value(arg.value, scope)) for arg in node.args)
    return True, Each(Items(items)) if any(item is not None for item in items) else None


def _chain(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    found = []
    for arg in node.args:
        value = flow.value(arg.value, scope)
        found.append(element(element(value)) if arg.star else element(value))
    of = either(*found)
    return True, None if of is None else Each(of)


def _from_iterable(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = [flow.value(arg.value, scope) for arg in node.args]
    of = element(element(given[0])) if given else None
    return True, None if of is None else Each(of)


def _filter(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = arguments(node)
    if len(given) != 2:
        return NOT_MINE
    value = flow.value(given[1], scope)
    of = element(value)
    if of is None:
        flow.value(given[0], scope)
        return True, None
    flow.apply(given[0], [of], scope)
    test = given[0].body if isinstance(given[0], cst.Lambda) else given[0]
    return True, trained(Each(of)) if requires_grad(test) is True else Each(of)


def _map(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = arguments(node)
    if len(given) < 2:
        return NOT_MINE
    of = [element(flow.value(argument, scope)) for argument in given[1:]]
    if dotted(given[0]) in {"torch.numel", "torch.Tensor.numel", "torch.Tensor.nelement", "th.numel", "Tensor.numel"}:
        value: Value | None = flow.mapped(node, of[0])
    else:
        value = flow.apply(given[0], of, scope)
    return True, None if value is None else Each(value)


def _reduce(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = arguments(node)
    if len(given) < 2:
        return NOT_MINE
    of = element(flow.value(given[1], scope))
    for other in given[2:]:
        flow.value(other, scope)
    value = flow.apply(given[0], [None, of], scope) if isinstance(given[0], cst.Lambda) else of
    return True, flow.add_up(value, node) if isinstance(value, Number) else None


def _next(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = [flow.value(arg.value, scope) for arg in node.args]
    return True, element(given[0]) if given else None


def _extreme(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = [flow.value(arg.value, scope) for arg in node.args]
    totals = [value for value in given if isinstance(value, Number)]
    return True, either(*totals) if totals else element(given[0]) if given else None


def _collect(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    """`.append(x)`, `.add(x)`: the container holds what it is given."""
    given = arguments(node)
    if not isinstance(node.func, cst.Attribute) or len(given) != 1:
        return NOT_MINE
    flow.value(node.func.value, scope)
    flow.collect(node.func.value, flow.value(given[0], scope), scope)
    return True, None


def _extend(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    given = arguments(node)
    if not isinstance(node.func, cst.Attribute) or len(given) != 1:
        return NOT_MINE
    flow.value(node.func.value, scope)
    value = flow.value(given[0], scope)
    if isinstance(value, Lookup):
        flow.collect(node.func.value, value.of, scope, lookup=True)
    else:
        flow.collect(node.func.value, element(value), scope)
    return True, None


def _setdefault(flow: Flow, node: cst.Call, scope: Scope) -> Handled:
    _visit(flow, node, scope)
    return True, None


_CALLS: dict[str, Callable[[Flow, cst.Call, Scope], Handled]] = {
    "parameters": _parameters,
    "named_parameters": _named_parameters,
    "state_dict": _stored,
    "load_file": _stored,
    "safe_open": _stored,
    "load": _stored,
    "sum": _sum,
    "fsum": _sum,
    "enumerate": _enumerate,
    "zip": _zip,
    "chain": _chain,
    "from_iterable": _from_iterable,
    "filter": _filter,
    "map": _map,
    "reduce": _reduce,
    "next": _next,
    "max": _extreme,
    "min": _extreme,
    "dict": _mapping,
    "OrderedDict": _mapping,
    "append": _collect,
    "add": _collect,
    "extend": _extend,
    "update": _extend,
    "setdefault": _setdefault,
}
_CALLS |= dict.fromkeys(SAME_ITEMS, _same)
