"""The terminal output of `quantcheck predict`: sizes in GB and GiB, 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from pytest_quantcheck.checks.predict import Fit, Predicted, Prediction, Sizes
from pytest_quantcheck.errors import printable
from pytest_quantcheck.quantities import counted, format_count, format_sizes
from pytest_quantcheck.report.sizes import WHAT, Line, columns, print_lines

WIDTH, INDENT = 80, " " * 12
SHOWN = 3


def print_prediction(prediction: Prediction, *, in_full: bool) -> None:
    """Print the model, the recipes as a table or each `in_full`, and what fits."""
    print_lines(_head(prediction))
    if in_full:
        for row in prediction.predicted:
            if row.sizes:
                print_lines(_in_full(row, row.sizes))
    else:
        print_lines(_table(prediction.predicted))
    print_lines(_fitting(prediction.fits, len(prediction.predicted)))
    print_lines([("", ""), ("Weights alone: headers and a tokenizer come on top in the file, a cache and", "dim")])
    print_lines([("activations when it runs.", "dim")])


def _head(prediction: Prediction) -> Iterator[Line]:
    yield printable(prediction.source), "bold"
    yield f"parameters  {format_count(prediction.logical_params)}", ""
    yield f"dtype       {prediction.dtype}, of what stays unquantized", ""


def _table(predicted: Sequence[Predicted]) -> Iterator[Line]:
    yield "", ""
    yield f"{'tensor bytes':>23}{'bits':>8}  recipe", "bold"
    for row in predicted:
        if row.sizes:
            bits = row.sizes.bits_per_weight.model or 0
            yield f"{columns(row.sizes.tensor_bytes)}{bits:8.3f}  {row.recipe:<22}  {row.title}", ""
    refused: dict[str, list[str]] = {}
    for row in predicted:
        if row.refused:
            refused.setdefault(row.refused, []).append(row.recipe)
    for reason, names in refused.items():
        yield "", ""
        yield from ((line, "dim") for line in wrap(printable(f"not {', '.join(names)}: {reason}"), WIDTH))


def _in_full(row: Predicted, sizes: Sizes) -> Iterator[Line]:
    size, bits = sizes.tensor_bytes, sizes.bits_per_weight
    yield "", ""
    yield f"{row.recipe} ({row.title}, {row.container})", "bold"
    yield f"tensors     {format_sizes(size)}, {size:,} bytes", ""
    if row.less:
        yield f"{INDENT}up to {row.less:,} fewer: records spell out values", ""
    quantized = f", {bits.quantized:.3f} where quantized" if bits.quantized else ""
    yield f"bits        {bits.model or 0:.3f} per weight{quantized}", ""
    for kind, nbytes in sizes.bytes.items():
        yield f"{nbytes / size:6.1%}  {columns(nbytes)}  {kind}", ""
    left = sizes.kept if bits.quantized else ()
    if left:
        yield "unquantized", ""
    for group in left:
        what = f"{WHAT[group.kind].removeprefix('unquantized ')}, {counted(group.tensors, 'tensor')}"
        yield f"{group.bytes / size:6.1%}  {columns(group.bytes)}  {what}", ""


def _fitting(fits: Sequence[Fit], recipes: int) -> Iterator[Line]:
    yield "", ""
    yield f"{'fits in':>10}{'':>13}  recipes, largest first", "bold"
    for fit in fits:
        more = len(fit.recipes) - SHOWN
        names = ", ".join(fit.recipes[:SHOWN]) + (f" and {more} smaller" if more > 0 else "")
        yield f"{columns(fit.bytes)}  {names or 'none'}", "" if fit.recipes else "dim"
