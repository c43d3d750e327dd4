"""The size of a model that nobody has quantized yet: what a recipe writes, read by the schemes as a file would be.

    tensor bytes = what the tensors of the written files have, exactly
    file bytes   = tensor bytes + headers, metadata and padding

Only tensor bytes are predicted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pytest_quantcheck import recipes
from pytest_quantcheck.artifact import BitsPerWeight, of_container, uncollected
from pytest_quantcheck.checks.unquantized import unquantized
from pytest_quantcheck.checks.why import Kind, plain_kind
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.quantities import parse_size
from pytest_quantcheck.recipes.recipe import Unquantized, Written, alike
from pytest_quantcheck.tensor import COUNTED, ByteClass, Container, LogicalTensor, StoredTensor

# What people have: memory of accelerators is sold in GB and is GiB.
BUDGETS = ("8 GiB", "12 GiB", "16 GiB", "24 GiB", "48 GiB", "80 GiB")


class Kept(NamedTuple):
    """Unquantized parameters of one kind."""

    kind: Kind
    tensors: int
    params: int
    bytes: int


class Sizes(NamedTuple):
    """The tensors that a recipe writes, added up: bytes by class and what stays unquantized, largest first."""

    params: int
    tensor_bytes: int
    bytes: Mapping[ByteClass, int]
    bits_per_weight: BitsPerWeight
    kept: tuple[Kept, ...]


class Predicted(NamedTuple):
    """What one recipe makes of the model, or why it makes nothing.

    `tensors` has one of those that the experts of a layer have alike. The records of some formats spell out values: up
    to `less` bytes may be missing of `sizes`.
    """

    recipe: str
    title: str
    container: str
    tensors: tuple[LogicalTensor, ...] = ()
    sizes: Sizes | None = None
    less: int = 0
    refused: str | None = None


class Fit(NamedTuple):
    """A budget as it was written, its bytes, and the recipes of which the tensors are within it, largest first."""

    budget: str
    bytes: int
    recipes: tuple[str, ...]


class Prediction(NamedTuple):
    """What recipes make of a model, and what of it fits."""

    source: str
    logical_params: int
    dtype: str
    predicted: tuple[Predicted, ...]
    fits: tuple[Fit, ...]


def predict(
    path: str | os.PathLike[str], names: Sequence[str] = (), *, dtype: str | None = None, fits: Sequence[str] = ()
) -> Prediction:
    """Return the exact tensor bytes of the model at a path under each recipe; without names, under all that suit it.

    Raises `ValueError` for an unknown recipe, and for a named one that cannot write the model.
    """
    budgets = [(budget, parse_size(budget)) for budget in fits or BUDGETS]
    for name in names:
        recipes.named(name)
    with uncollected():
        model = unquantized(path, dtype)
        model = model._replace(weights=alike(model.weights))
        rows = tuple(predicted(name, model) for name in names or recipes.shown())
    for row in rows:
        if row.refused and names:
            raise ValueError(f"recipe `{row.recipe}`: {row.refused}")
    fitting = tuple(Fit(budget, size, _within(size, rows)) for budget, size in budgets)
    return Prediction(model.source, model.parameters, model.dtype, rows, fitting)


def predicted(name: str, model: Unquantized) -> Predicted:
    """Return what one recipe makes of a model, or why it cannot."""
    recipe, options = recipes.named(name)
    try:
        written = recipe.write(model, options)
        tensors = {stored.name: stored for stored in written.tensors}
    except ValueError as error:
        return Predicted(name, recipe.title, recipe.container, refused=str(error))
    artifact = of_container(_container(recipe.container, f"{model.source} as {name}", tensors, model, written))
    copies = {weight.name: weight.copies for weight in model.weights}
    sizes = _sizes([(tensor, copies.get(tensor.name, 1)) for tensor in artifact.tensors])
    if sizes.params != model.parameters:
        what = f"recipe `{name}` writes {sizes.params:,} parameters of {model.parameters:,}"
        raise FormatError(what, file=model.source)
    return Predicted(name, recipe.title, recipe.container, artifact.tensors, sizes, written.less)


def _sizes(tensors: Sequence[tuple[LogicalTensor, int]]) -> Sizes:
    """Tensors and how many copies there are of each; a tied head that is written twice is not dead here."""
    classes: Counter[ByteClass] = Counter()
    params: Counter[bool] = Counter()
    nbytes: Counter[bool] = Counter()
    for tensor, copies in tensors:
        for kind, size in tensor.bytes.items():
            classes[kind] += copies * size
        if tensor.role in COUNTED:
            params[tensor.quantized] += copies * tensor.params
            nbytes[tensor.quantized] += copies * tensor.nbytes
    bits = BitsPerWeight(
        8 * nbytes[True] / params[True] if params[True] else None,
        8 * nbytes.total() / params.total() if params.total() else None,
    )
    return Sizes(params.total(), classes.total(), dict(classes.most_common()), bits, _kept(tensors))


def _kept(tensors: Sequence[tuple[LogicalTensor, int]]) -> tuple[Kept, ...]:
    groups: dict[Kind, list[tuple[LogicalTensor, int]]] = {}
    for tensor, copies in tensors:
        if tensor.role in COUNTED and not tensor.quantized:
            groups.setdefault(plain_kind(tensor), []).append((tensor, copies))
    rows = (
        Kept(
            kind,
            sum(copies for _, copies in same),
            sum(copies * tensor.params for tensor, copies in same),
            sum(copies * tensor.nbytes for tensor, copies in same),
        )
        for kind, same in groups.items()
    )
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _container(
    kind: str, source: str, tensors: Mapping[str, StoredTensor], model: Unquantized, written: Written
) -> Container:
    """The tensors as a container without headers; recipes tell what is tied, there are no values to compare."""
    config = {**model.config, "tie_word_embeddings": False}
    config.pop("quantization_config", None)
    if written.quantization:
        config["quantization_config"] = dict(written.quantization)
    size = sum(stored.nbytes for stored in tensors.values())
    return Container(kind, source, tensors, size, configs={"config.json": config})


def _within(size: int, rows: Sequence[Predicted]) -> tuple[str, ...]:
    fitting = [(row.sizes.tensor_bytes, row.recipe) for row in rows if row.sizes]
    return tuple(name for nbytes, name in sorted(fitting, key=lambda row: -row[0]) if nbytes <= size)
