"""What a recipe is: the tensors that a quantizer writes for a model, by its own default rules.

    Unquantized  ->  Recipe.write  ->  Written: stored tensors under the format's own names, and its configuration

A recipe knows names, dtypes and shapes, never values. What is codes, scales or zero points is not said here: the
schemes read what was written, as they read a real file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pytest_quantcheck import dtypes
from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.tensor import Role, StoredTensor

if TYPE_CHECKING:
    import torch

# linear, conv1d (kept as [in, out]), expert (one matrix of a mixture), stack (the experts of a layer in one tensor):
# what a recipe may encode. head: the output head, which most leave.
Kind = Literal["linear", "conv1d", "head", "embedding", "expert", "stack", "other", "buffer"]

TOWER = re.compile(r"(^|\.)(encoder|vision\w*|visual|audio\w*)\.")  # what is beside a decoder of text
EXPERT = re.compile(r"(?<=\.experts)\.[0-9]+(?=\.)")  # its number, behind those of all experts of a layer
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # modules that pick experts


class Weight(NamedTuple):
    """One tensor of the unquantized checkpoint.

    `own` is its dtype where it is no float. Under the dtypes of `wide` loaders keep it in F32. `copies`: so many
    experts of a layer have one like it, and `name` is the first one's.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    wide: tuple[str, ...] = ()
    own: str | None = None
    copies: int = 1

    @property
    def module(self) -> str:
        """The module it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def layer(self) -> str:
        """The last component of its module: `q_proj`."""
        return self.module.rpartition(".")[2]

    @property
    def linear_shape(self) -> tuple[int, int]:
        """`[N, K]`: outputs and inputs."""
        rows, columns = self.shape
        return (columns, rows) if self.kind == "conv1d" else (rows, columns)


class Unquantized(NamedTuple):
    """An unquantized model: its configuration and every tensor of its checkpoint, a tied head left out.

    `ggml` are its tensors as a GGUF has them where it was read from one, `keys` what that says of it. `weights` is
    empty where that names them in a way that no checkpoint is known to do.
    """

    source: str
    config: Mapping[str, Any]
    dtype: str
    parameters: int
    weights: tuple[Weight, ...]
    tied_head: str | None = None
    ggml: tuple[StoredTensor, ...] = ()
    keys: Mapping[str, str] = {}


def alike(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return one weight for the experts of a layer that have one like it: recipes treat all of them the same.

    >>> alike(Weight(f"layers.3.experts.{number}.up_proj.weight", (2, 3), "expert") for number in range(8))[0].copies
    8
    """
    first: dict[Weight, Weight] = {}
    copies: Counter[Weight] = Counter()
    for weight in weights:
        group = weight._replace(name=EXPERT.sub("", weight.name))
        first.setdefault(group, weight)
        copies[group] += weight.copies
    return tuple(weight._replace(copies=copies[group]) for group, weight in first.items())


class Written(NamedTuple):
    """What a recipe writes. `less`: so many bytes of records at most are not needed, which depends on the values."""

    tensors: Iterable[StoredTensor]
    quantization: Mapping[str, Any] = {}
    less: int = 0


class Recipe(NamedTuple):
    """One family of recipes: the names it answers to, those that tables show, and how it writes a model.

    `write` gets the named groups of `names`. It raises `ValueError` for a model that the quantizer cannot write.
    """

    names: re.Pattern[str]
    shown: tuple[str, ...]
    title: str
    container: str
    write: Callable[[Unquantized, Mapping[str, str]], Written]


class Unwritten(NamedTuple):
    """The `Source` of a tensor that nobody wrote: nothing but a record has content."""

    content: bytes = b""

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of a record."""
        return bytearray(self.content[start:stop])

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Refuse: there are no values."""
        raise NotDecodable("is predicted and has no values", tensor=stored.name)


NOWHERE = Unwritten()


def stored(name: str, dtype: str, *shape: int, role: Role | None = None) -> StoredTensor:
    """Return a tensor that would be written."""
    return StoredTensor(name, dtype, shape, dtypes.nbytes(dtype, prod(shape)), NOWHERE, role=role)


def record(name: str, content: bytes, *, weighed: bool = True) -> StoredTensor:
    """Return a record of bytes that would be written, not `weighed` where it stands for what is no tensor."""
    size = len(content) if weighed else 0
    return StoredTensor(name, "U8", (len(content),), size, Unwritten(content), role=None if weighed else "part")


def plain(weight: Weight, dtype: str) -> StoredTensor:
    """Return the tensor as it is written unquantized, in `dtype` unless it has another in any case."""
    written = weight.own or ("F32" if dtype in weight.wide else dtype)
    return stored(weight.name, written, *weight.shape, role="buffer" if weight.kind == "buffer" else None)


def each(
    model: Unquantized,
    chosen: Callable[[Weight], bool] | None = None,
    encode: Callable[[Weight], Iterable[StoredTensor]] = lambda weight: (),
) -> Iterator[StoredTensor]:
    """Yield what `encode` makes of each chosen weight; the others stay plain, in the dtype of the model."""
    check_known(model)
    for weight in model.weights:
        if chosen is not None and chosen(weight):
            yield from encode(weight)
        else:
            yield plain(weight, model.dtype)


def check_known(model: Unquantized) -> None:
    """Refuse a model of which only llama.cpp's names are known."""
    if not model.weights:
        raise ValueError("the names of this GGUF are llama.cpp's alone: predict from its config.json")


def check_calibrated(model: Unquantized, *, columns: int, rows: int) -> None:
    """Refuse a model that a calibrating quantizer does not write, or not in one way that is known."""
    check_known(model)
    if model.dtype == "F32":
        raise ValueError("is made of a model in 16 bits: give --dtype bf16 or fp16")
    for weight in model.weights:
        if TOWER.search(weight.name):
            raise ValueError(f"`{weight.name}` is of no text decoder: what is quantized of such a model is not fixed")
        if weight.kind == "stack":
            raise ValueError(f"`{weight.name}` holds all experts of a layer: no quantizer is known to write that")
        if in_layers(weight):
            _check_multiple(weight, "outputs", weight.linear_shape[0], rows)
            _check_multiple(weight, "inputs", weight.linear_shape[1], columns)
    if not any(map(in_layers, model.weights)):
        raise ValueError("the model has no linear in a layer")


def _check_multiple(weight: Weight, what: str, size: int, multiple: int) -> None:
    if size % multiple:
        raise ValueError(f"`{weight.name}` has {size:,} {what}, no multiple of {multiple}")


def in_layers(weight: Weight) -> bool:
    """Whether calibrating quantizers encode it: a linear of a layer or of an expert, no router and no head."""
    if weight.kind == "expert":
        return True
    repeated = any(part.isdecimal() for part in weight.module.split("."))
    return weight.kind in ("linear", "conv1d") and repeated and weight.layer not in ROUTERS


def groups(columns: int, group: int) -> int:
    """Return the number of groups of a row, the last one perhaps short; one where `group` is -1."""
    return 1 if group == -1 else -(-columns // group)
