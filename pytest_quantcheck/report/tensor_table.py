"""Every tensor of an artifact as a row of text: what it weighs, and what it kept where it was compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pytest_quantcheck.errors import printable
from pytest_quantcheck.quantities import format_shape
from pytest_quantcheck.report.run import ArtifactRun

WEIGHT = ("bytes", "bits", "shape", "stored as")
FIDELITY = ("SQNR dB", "expected", "gain", "bias", "max error", "worst block", "verdict")
TEXTS = ("tensor", "shape", "scheme", "stored as", "verdict")


class Table(NamedTuple):
    """A header and its rows, what was compared first and worst on top, the others by size."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def table(artifact: ArtifactRun) -> Table:
    """Return the tensors of the documents `inspect` and `compare`, without the columns of one that is missing.

    Takes names as they are: two that print alike are two rows.
    """
    weighed = _by_name(artifact["inspect"])
    compared = _by_name(artifact["compare"])
    by_size = sorted(weighed, key=lambda name: -sum(weighed[name]["bytes"].values()))
    header = ("tensor", "scheme", *(FIDELITY if compared else ()), *(WEIGHT if weighed else ()))
    return Table(header, [_row(name, weighed, compared) for name in dict.fromkeys([*compared, *by_size])])


def _by_name(document: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    tensors: Iterable[Mapping[str, Any]] = document["tensors"] if document else ()
    return {tensor["name"]: tensor for tensor in tensors}


def _row(name: str, weighed: Mapping[str, Any], compared: Mapping[str, Any]) -> tuple[str, ...]:
    tensor, row = weighed.get(name), compared.get(name)
    fidelity = fidelity_cells(row) if compared else ()
    weight = _weight_cells(tensor) if weighed else ()
    return (printable(name), _scheme(tensor or row or {}), *fidelity, *weight)


def _scheme(tensor: Mapping[str, Any]) -> str:
    role = tensor.get("role", "parameter")
    return f"{tensor['scheme']}{'' if role == 'parameter' else f' ({role})'}"


def _weight_cells(tensor: Mapping[str, Any] | None) -> tuple[str, ...]:
    if tensor is None:
        return ("",) * len(WEIGHT)
    stored = tensor["stored"]
    return (
        f"{sum(tensor['bytes'].values()):,}",
        f"{tensor['bits_per_weight']:.2f}",
        format_shape(tuple(tensor["shape"])),
        f"{stored['dtype']} {format_shape(tuple(stored['shape']))}",
    )


def fidelity_cells(row: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the metrics of one compared tensor as text, in the order of `FIDELITY`."""
    if row is None:
        return ("",) * len(FIDELITY)
    verdict = row["verdict"]
    sqnr = "equal" if verdict == "equal" else _number(row["sqnr_db"], ".2f")
    return (
        sqnr,
        _number(row["expected_sqnr_db"], ".1f"),
        _number(row["gain"], ".4f"),
        _number(row["bias"], "+.4f"),
        _number(row["max_error"], ".3g"),
        "equal" if verdict == "equal" else _number(row["min_block_sqnr_db"], ".2f"),
        verdict,
    )


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
