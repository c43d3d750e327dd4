"""What a check answers: passed or not, in one line, and the lines that show where and why."""

from __future__ import annotations

from typing import NamedTuple

from pytest_quantcheck.errors import printable
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import format_shape
from pytest_quantcheck.tensor import LogicalTensor

WORST = 10


class Verdict(NamedTuple):
    """The answer of one check. `headline` carries the numbers; `details` are shown when it failed.

    `measured` and `allowed` are the one number a check is about and its limit, in `unit`, for who draws them.
    """

    check: str
    passed: bool
    headline: str
    details: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    measured: float | None = None
    allowed: float | None = None
    unit: str | None = None

    def __str__(self) -> str:
        return "\n".join(map(printable, [self.headline, *(f"  {line}" for line in self.details)]))


def worst(lines: list[str]) -> list[str]:
    """Return the first ten lines and how many more there are."""
    rest = len(lines) - WORST
    return lines if rest <= 0 else [*lines[:WORST], f"... and {rest:,} more"]


def named(tensor: LogicalTensor) -> str:
    """Return a tensor as a line of a failure message: name, shape, values, how it is written."""
    how = f"{tensor.scheme} {tensor.stored.dtype}" if not tensor.quantized else tensor.scheme
    return f"{tensor.name}  {format_shape(tensor.shape)}  {tensor.params:,}  {how}"
