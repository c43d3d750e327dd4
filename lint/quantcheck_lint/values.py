"""What an expression may hold, as far as counting parameters is concerned. `None` means: nothing known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias, TypeVar

import libcst as cst


class Origin(Enum):
    """Where a tensor was taken from."""

    PARAMETERS = "parameters()"
    STATE_DICT = "a state dict"
    LOOKALIKE = "a parameter-like name"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; `trainable` once a filter on `requires_grad` let it through."""

    origin: Origin
    trainable: bool = False


@dataclass(frozen=True, slots=True)
class Items:
    """A tuple; `named` is an element of `named_parameters()` as it comes, before it is unpacked."""

    items: tuple[Value | None, ...]
    named: bool = False
    # The loop variable that holds the tuple, and the loop: what a fix unpacks.
    target: cst.Name | None = None
    loop: cst.CSTNode | None = None


@dataclass(frozen=True, slots=True)
class Each:
    """Anything that is iterated over and gives `of`."""

    of: Value


@dataclass(frozen=True, slots=True)
class Lookup:
    """A mapping with the values `of`."""

    of: Value


@dataclass(frozen=True, slots=True)
class Store:
    """A state dict, an opened file of tensors or a parameter-like name: a mapping of tensors, maybe nested."""

    origin: Origin
    iterable: bool = False


@dataclass(eq=False, slots=True)
class Use:
    """One time that a place is added up."""

    trainable: bool
    memory: bool = False
    discarded: bool = False


@dataclass(eq=False, slots=True)
class Place:
    """One expression that reads the number of elements of one tensor."""

    node: cst.BaseExpression
    subject: cst.BaseExpression | None
    origin: Origin
    guarded: bool
    # Set where the "tensor" is a tuple of `named_parameters()`.
    packed: Items | None = None
    uses: dict[int, Use] = field(default_factory=dict)
    # The model of `sum(p.numel() for p in model.parameters())`: what `count_params` would be called on.
    model: cst.BaseExpression | None = None


@dataclass(frozen=True, slots=True)
class Number:
    """A number of elements: read at `places` and not added up yet, or already added up as `uses`."""

    places: tuple[Place, ...] = ()
    uses: tuple[Use, ...] = ()
    trainable: bool = False
    memory: bool = False
    # A sum that got a name: what is done with the name later says nothing about the sum.
    settled: bool = False


@dataclass(frozen=True, slots=True)
class ElementSize:
    """Bytes or bits per element, asked of the tensor or its dtype."""


@dataclass(eq=False, slots=True)
class Function:
    """A function of this source: what calls gave it and what it gives back."""

    node: cst.FunctionDef | cst.Lambda
    received: dict[str, Value] = field(default_factory=dict)
    returns: Value | None = None


T = TypeVar("T")
Value: TypeAlias = Tensor | Items | Each | Lookup | Store | Number | ElementSize | Function


def either(*values: Value | None) -> Value | None:
    """What holds when one of several values does: the first that is known, numbers put together."""
    known = sorted((value for value in values if value is not None), key=_is_lookalike)
    counted = [value for value in known if isinstance(value, Number)]
    if len(counted) > 1:
        return Number(
            places=unique(place for number in counted for place in number.places),
            uses=unique(use for number in counted for use in number.uses),
            trainable=all(number.trainable for number in counted),
            memory=all(number.memory for number in counted),
            settled=any(number.settled for number in counted),
        )
    if len(known) > 1 and all(isinstance(value, Items) for value in known):
        return _either_items([value for value in known if isinstance(value, Items)])
    return known[0] if known else None


def _is_lookalike(value: Value) -> bool:
    return isinstance(value, (Store, Tensor)) and value.origin is Origin.LOOKALIKE


def _either_items(rows: list[Items]) -> Items:
    width = min(len(row.items) for row in rows)
    return Items(tuple(either(*(row.items[i] for row in rows)) for i in range(width)))


def unique(values: Iterable[T]) -> tuple[T, ...]:
    """The values, each once, in order."""
    return tuple({id(value): value for value in values}.values())


def element(value: Value | None) -> Value | None:
    """What iterating over `value` gives."""
    match value:
        case Each(of):
            return of
        case Store(origin, iterable=True):
            return Store(origin, iterable=True)
    return None


def trained(value: Value | None) -> Value | None:
    """`value` after a filter on `requires_grad`."""
    match value:
        case Tensor() | Number():
            return replace(value, trainable=True)
        case Items(items):
            return replace(value, items=tuple(trained(item) for item in items))
        case Each(of):
            return Each(trained(of) or of)
        case Lookup(of):
            return Lookup(trained(of) or of)
    return value


def settled(value: Value | None) -> Value | None:
    """`value` once it got a name: what happens to it from here on says nothing about the sums in it."""
    return replace(value, settled=True) if isinstance(value, Number) and value.uses else value


def tensor(value: Value | None) -> Tensor | None:
    """`value` where a tensor is expected: an entry of a state dict is one."""
    if isinstance(value, Tensor):
        return value
    return Tensor(value.origin) if isinstance(value, Store) else None


def has_tensor(value: Value | None) -> bool:
    """Whether a tensor is within reach of `value`."""
    match value:
        case Tensor() | Store():
            return True
        case Items(items):
            return any(has_tensor(item) for item in items)
        case Each(of) | Lookup(of):
            return has_tensor(of)
    return False
