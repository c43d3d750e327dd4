"""Fidelity as a grid: one per stack of layers, a row per module, a column per layer, the SQNR as a shade.

Shades go from the lowest to the highest SQNR of the quantized tensors that passed, over at least `LEAST_SPAN` dB, so
that noise does not look like a pattern. Several tensors in one place (the experts of a layer) show the worst of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pytest_quantcheck.checks.layers import LAYER
from pytest_quantcheck.checks.tree import INDEX

SHADES = 7
LEAST_SPAN = 3.0  # dB

Row = Mapping[str, Any]  # a tensor of the document of `compare`


class Cell(NamedTuple):
    """The tensors of one module in one layer: the worst SQNR, its shade from 0 (low), how many, and how many failed."""

    worst: float | None
    shade: int | None
    tensors: int
    failed: int
    names: tuple[str, ...]


class Grid(NamedTuple):
    """One stack of layers; a place without a tensor is None."""

    stack: str
    layers: tuple[int, ...]
    modules: dict[str, tuple[Cell | None, ...]]
    low: float
    high: float


def grids(comparison: Mapping[str, Any]) -> list[Grid]:
    """Return a grid for each stack of layers with quantized tensors, and for plain ones that failed."""
    rows = [row for row in comparison["tensors"] if row["scheme"] != "plain" or row["verdict"] == "failed"]
    low, high = _span([row["sqnr_db"] for row in rows if row["sqnr_db"] is not None and row["verdict"] != "failed"])
    stacks: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        if match := LAYER.match(row["name"]):
            module = INDEX.sub("*", f".{row['name'][match.end() :]}")[1:].removesuffix(".weight")
            stacks.setdefault(match.group(1), {}).setdefault((module, int(match.group(2))), []).append(row)
    return [_grid(stack, places, low, high) for stack, places in stacks.items()]


def _span(values: Iterable[float]) -> tuple[float, float]:
    found = sorted(values) or [0.0]
    return min(found[0], found[-1] - LEAST_SPAN), found[-1]


def _grid(stack: str, places: Mapping[tuple[str, int], list[Row]], low: float, high: float) -> Grid:
    layers = tuple(sorted({layer for _, layer in places}))
    modules = sorted({module for module, _ in places})
    cells = {module: tuple(_cell(places.get((module, layer), []), low, high) for layer in layers) for module in modules}
    return Grid(stack, layers, cells, low, high)


def _cell(rows: list[Row], low: float, high: float) -> Cell | None:
    if not rows:
        return None
    known = [row["sqnr_db"] for row in rows if row["sqnr_db"] is not None]
    worst = min(known) if known else None
    shade = None if worst is None else min(SHADES - 1, max(0, int((worst - low) / (high - low) * SHADES)))
    failed = sum(row["verdict"] == "failed" for row in rows)
    return Cell(worst, shade, len(rows), failed, tuple(row["name"] for row in rows[:3]))
