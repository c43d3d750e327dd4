"""The terminal: tables readable at 80 columns, one plain line per tensor when piped or very long."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.fidelity import Comparison, Fidelity, check_fidelity
from pytest_quantcheck.checks.verdict import WORST
from pytest_quantcheck.errors import printable
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted, format_count, format_shape, format_size
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 130
MANY = 1000
LEFT = ("tensor", "scheme")
Row = tuple[str, ...]
_NUMBER = re.compile(r"(\d+)")


def print_artifact(artifact: Artifact) -> None:
    """Print every tensor, what is stored beside what it means, then the totals and the findings."""
    live = artifact.container == "live"
    tensors = sorted(artifact.tensors, key=_natural)
    console = open_console()
    if console is None or len(tensors) > MANY:
        _print_columns(_tensor_header(live), _tensor_rows(tensors, live))
    else:
        rows = [_tensor_cells(tensor, live) for tensor in tensors]
        styles = ["" if tensor.quantized else "dim" for tensor in tensors]
        _print_rows(console, _tensor_header(live), rows, styles, top=("scheme", "bits"))
    print()
    _print_totals(artifact)
    _print_findings(artifact.findings)


def print_comparison(comparison: Comparison) -> None:
    """Print the fidelity of every tensor, worst first, then the verdict and the findings."""
    header = ("tensor", "scheme", "SQNR dB", "expected", "gain", "bias", "max error", "worst block")
    console = open_console()
    equal = [row for row in comparison.tensors if row.scheme == "plain" and not row.noise and not row.faults]
    rows = [row for row in comparison.tensors if row not in equal]
    if not rows:
        pass
    elif console is None or len(rows) > MANY:
        _print_columns(header, map(_fidelity_cells, rows))
    else:
        styles = ["red" if row.faults else "dim" if row.scheme == "plain" else "" for row in rows]
        _print_rows(console, header, [_fidelity_cells(row) for row in rows], styles, top=("scheme",))
    total = "" if comparison.sqnr_db is None else f", {comparison.sqnr_db:.2f} dB over the quantized values"
    print(f"\n{counted(len(comparison.tensors), 'tensor')} compared{total}")
    if equal:
        print(f"{len(equal):,} plain tensors are equal to the reference")
    for line in check_fidelity(comparison).details:  # the worst tensors, and under each what is likely
        print(printable(line if line.startswith((" ", "... and ")) else f"error: {line}"))
    _print_findings(
        [found for found in comparison.findings if found.severity != "error" and found.check != "diagnosis"]
    )


def artifact_lines(artifact: Artifact) -> Iterator[str]:
    """Yield the totals of an artifact, one fact a line."""
    logical, stored = artifact.logical_params, artifact.stored_elements
    yield f"logical parameters  {format_count(logical)}"
    if artifact.adapter_params:
        yield f"  of these adapters {artifact.adapter_params:,}"
    if stored != logical:
        yield f"naive numel()       {stored:,}: {stored / logical:.1%} of the truth, it counts packed codes"
    if artifact.trainable_params is not None:
        packed = artifact.frozen_packed_params
        yield f"trainable           {artifact.trainable_params:,} (frozen because packed: {packed:,})"
    if artifact.tied_params:
        yield f"tied, counted once  {artifact.tied_params:,}"
    if artifact.buffers:
        yield f"in buffers          {artifact.buffers:,} values, never counted"
    yield f"quantized           {artifact.quantized_fraction:.1%} of the parameters"
    bits = artifact.bits_per_weight
    parts = [
        f"{value:.3f} {what}" for value, what in ((bits.quantized, "quantized"), (bits.model, "whole model")) if value
    ]
    yield f"bits per weight     {', '.join(parts) or 'none'}"
    yield f"size                {format_size(artifact.file_bytes)} ({artifact.file_bytes:,} bytes)"
    for kind, size in sorted(artifact.bytes.items(), key=lambda item: -item[1]):
        if size:
            yield f"  {kind:<17} {size / artifact.file_bytes:6.1%}  {format_size(size)}"
    for name, total in artifact.schemes.items():
        held = (counted(total.tensors, "tensor"), counted(total.params, "parameter"), format_size(total.bytes))
        yield f"{name:<19} {', '.join(held)}"


def finding_line(finding: Finding) -> str:
    """Return a finding as one printable line."""
    where = f"{finding.tensor}: " if finding.tensor else ""
    return printable(f"{finding.severity}: {where}{finding.message} [{finding.check}]")


def open_console() -> Console | None:
    """A console where the output is a terminal; None where it is piped."""
    import sys

    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _print_totals(artifact: Artifact) -> None:
    print(printable(f"{artifact.source} ({artifact.container})"))
    for line in artifact_lines(artifact):
        print(line)


def _print_findings(findings: Sequence[Finding]) -> None:
    order = ("error", "warning", "note")
    ranked = sorted(findings, key=lambda finding: order.index(finding.severity))
    for finding in ranked[: 2 * WORST]:
        print(finding_line(finding))
    if len(ranked) > 2 * WORST:
        print(f"... and {len(ranked) - 2 * WORST:,} more findings (--json has them all)")


def _tensor_header(live: bool) -> tuple[str, ...]:
    trainable = ("trainable",) if live else ()
    return ("tensor", "logical shape", "values", "stored as", "elements", *trainable, "scheme", "bits", "bytes")


def _tensor_rows(tensors: Iterable[LogicalTensor], live: bool) -> Iterator[Row]:
    """The cells of many tensors; all but the name are made once for those that look alike: the experts of a model."""
    known: dict[object, Row] = {}
    for tensor in tensors:
        stored = tensor.parts[0].stored
        sizes = tuple([part.stored.nbytes for part in tensor.parts])
        alike = (tensor.shape, tensor.scheme, tensor.role, stored.dtype, stored.shape, sizes, stored.requires_grad)
        cells = known.get(alike)
        if cells is None:
            cells = known[alike] = _tensor_cells(tensor, live)[1:]
        yield (printable(tensor.name), *cells)


def _tensor_cells(tensor: LogicalTensor, live: bool) -> tuple[str, ...]:
    return (
        printable(tensor.name),
        format_shape(tensor.shape),
        f"{tensor.params:,}",
        f"{tensor.stored.dtype} {format_shape(tensor.stored.shape)}",
        f"{tensor.stored.elements:,}",
        *((_trains(tensor),) if live else ()),
        tensor.scheme if tensor.role == "parameter" else f"{tensor.scheme} ({tensor.role})",
        f"{tensor.bits_per_weight:.2f}",
        f"{tensor.nbytes:,}",
    )


def _trains(tensor: LogicalTensor) -> str:
    if tensor.role not in ("parameter", "adapter"):
        return "-"
    return "yes" if tensor.trainable else "packed" if tensor.quantized else "no"


def _fidelity_cells(row: Fidelity) -> tuple[str, ...]:
    return (
        printable(row.name),
        row.scheme,
        _db(row.sqnr_db),
        "-" if row.expected_sqnr_db is None else f"{row.expected_sqnr_db:.1f}",
        f"{row.gain:.4f}",
        f"{row.bias:+.4f}",
        f"{row.max_error:.3g}",
        _db(row.min_block_sqnr_db),
    )


def _db(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.2f}"


def _natural(tensor: LogicalTensor) -> list[int | str]:
    """Layer 2 before layer 10: text and numbers take turns, so like is compared with like."""
    parts: list[int | str] = list(_NUMBER.split(tensor.name))
    parts[1::2] = map(int, parts[1::2])
    return parts


def _print_columns(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print aligned columns, the first to the left, names never cut."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    template = "  ".join(f"%{'-' if name in LEFT else ''}{width}s" for name, width in zip(header, widths, strict=True))
    for cells in table:
        print((template % cells).rstrip())


def _print_rows(console: Console, header: Row, rows: Sequence[Row], styles: Sequence[str], top: Sequence[str]) -> None:
    """Print a table where it fits, else two lines a row: the name and the columns of `top`, the others beneath."""
    from rich.text import Text

    if console.width >= WIDE:
        _print_table(console, header, rows, styles)
        return
    above = [header.index(name) for name in top]
    below = [at for at in range(1, len(header)) if at not in above]
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]
    for row, style in zip((header, *rows), ("bold", *styles), strict=True):
        right = "  ".join(row[at].rjust(widths[at]) for at in above)
        gap = console.width - len(row[0]) - len(right)
        first = f"{row[0]}{' ' * gap}{right}" if gap > 1 else f"{row[0]}  {right}"
        second = "  ".join(row[at].rjust(widths[at]) for at in below)
        console.print(Text(f"{first}\n{second.rjust(console.width)}", style=style), soft_wrap=True)


def _print_table(console: Console, header: Row, rows: Sequence[Row], styles: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in header:
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold", no_wrap=name not in LEFT)
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*(Text(cell, style=style) for cell in row))
    console.print(table)
