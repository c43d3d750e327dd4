"""A few windows of a tensor and of its reference, decoded: enough to try a hypothesis, whatever the tensor's size.

    windows  at most four, whole rows, evenly spread, each starting where a block does; one more at a known fault
    head     the first rows, more of them: whole attention heads for questions about the order of rows

Both are decoded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.checks import metrics
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]

VALUES = 1 << 18
WINDOWS = 4
HEAD_VALUES = 1 << 20
HEAD_ROWS = 512
ALIGNED = 64  # rows; packed words of outputs start there


class Window(NamedTuple):
    """Rows `start` up to `stop` as they decode and as they should be, both float32 (rows, columns)."""

    start: int
    stop: int
    decoded: torch.Tensor
    reference: torch.Tensor


class Attempt(NamedTuple):
    """One thing to try: `pairs` gives decoded and reference of every window, had the other convention been used.

    `words` complete "with ..."; `advice` says what to change where it decodes right.
    """

    name: str
    words: str
    pairs: Callable[[], Iterable[Pair]]
    advice: str = ""


class Sample:
    """The windows of one pair of equal shape, read once; one of them around the row `near`, where that is given."""

    def __init__(self, tensor: LogicalTensor, reference: LogicalTensor, *, device: str, near: int | None) -> None:
        self.tensor = tensor
        self.reference = reference
        self.device = device
        self.near = near

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The windows that every hypothesis is tried on."""
        rows, grid = self.tensor.rows, self.tensor.rounding.rows if self.tensor.rounding else 1
        size = -(-max(1, VALUES // WINDOWS // max(1, self.tensor.columns)) // grid) * grid
        if WINDOWS * size >= rows:
            return (self.window(0, rows),)
        aligned = math.lcm(ALIGNED, grid, _rows_of_block(self.tensor))
        starts = {(rows - size) * at // (WINDOWS - 1) // aligned * aligned for at in range(WINDOWS)}
        spans = {start: start + size for start in starts}
        if self.near is not None:
            unit = math.lcm(grid, _rows_of_block(self.tensor))
            start = self.near // unit * unit
            spans[start] = min(rows, start + max(size, unit))
        return tuple(self.window(*span) for span in sorted(spans.items()))

    @cached_property
    def head(self) -> Window:
        """The first rows."""
        return self.window(0, min(self.tensor.rows, HEAD_ROWS, max(1, HEAD_VALUES // max(1, self.tensor.columns))))

    @cached_property
    def stored_db(self) -> float:
        """The SQNR of the windows as they are stored."""
        return sqnr_db((window.decoded, window.reference) for window in self.windows)

    @cached_property
    def rounded(self) -> tuple[Window, ...]:
        """The windows, decoded from the reference rounded to nearest; none where that is not known for a part."""
        rounding = self.tensor.rounding
        if rounding is None or rounding.whole:
            return ()
        return tuple(one._replace(decoded=rounding.nearest(self.tensor, one.reference, None)) for one in self.windows)

    @cached_property
    def rounding_db(self) -> float | None:
        """The SQNR of the windows rounded to nearest in this encoding; None where that is not known for a part."""
        return sqnr_db((one.decoded, one.reference) for one in self.rounded) if self.rounded else None

    def window(self, start: int, stop: int) -> Window:
        """Decode some rows of both sides."""
        decoded = self.tensor.decode(start, stop, self.device).view(stop - start, -1)
        reference = self.reference.decode(start, stop, self.device)
        return Window(start, stop, decoded, reference.reshape(decoded.shape))


def sqnr_db(pairs: Iterable[Pair]) -> float:
    """Return signal to noise of pairs of decoded and reference, in dB, NaN where there is none."""
    signal = noise = 0.0
    for decoded, reference in pairs:
        signal += float(reference.double().square().sum())
        noise += float((decoded.double() - reference.double()).square().sum())
    return metrics.sqnr_db(signal, noise)


def _rows_of_block(tensor: LogicalTensor) -> int:
    """After how many rows a block that runs on across rows starts with a row again."""
    return tensor.block // math.gcd(max(1, tensor.columns), tensor.block) if tensor.block else 1
