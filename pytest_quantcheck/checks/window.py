"""One window of values: sums and extremes, in as few passes over it as there can be.

    decoded, reference, rounded  # (rows, columns) float32, on any device

Short sums (64 values or one block) are float32, long ones float64. Every sum has many terms beside it, so that torch
never splits one of them between threads: the same values give the same bits, however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck import compiled
from pytest_quantcheck.checks.metrics import LOST, WEAK, Extremes, Sums

if TYPE_CHECKING:
    import torch

    from pytest_quantcheck.tensor import Coded, LogicalTensor, Rounding

SHORT = 64
LONG = (4096, 2048, 1024, 512, 256, 128)
HALF_STEP = 0.5 * (1 + 2**-20)  # the error and the step are rounded themselves


class Blocks(NamedTuple):
    """Blocks of `size` values, where a row begins `pitch` values after the one before.

    `pitch` is its columns where blocks run on across rows, else as many full blocks as hold them.
    """

    size: int
    pitch: int


class Rows(NamedTuple):
    """The sums of each row of a window, float64 `[5, rows]` in the order of `Sums`, and what is seen in one place.

    `rounded` are those of what rounding to nearest makes of the reference, where that was asked for.
    """

    sums: torch.Tensor
    rounded: torch.Tensor | None
    columns: int
    extremes: Extremes

    @property
    def weak(self) -> bool:
        """Whether a block or a row makes it worth asking what rounding to nearest would make of it."""
        return min(self.extremes.min_block, self.extremes.min_row) < WEAK

    def over(self, start: int, stop: int) -> Sums:
        """Return the sums over some rows."""
        values = (stop - start) * self.columns
        sums = _added(values, self.sums[:, start:stop])
        return sums if self.rounded is None else sums._replace(rounding=_added(values, self.rounded[:, start:stop]))


def _added(values: int, rows: torch.Tensor) -> Sums:
    signal, noise, cross, total, drift = rows.sum(dim=1).tolist()
    return Sums(values, signal, noise, cross, total, drift)


def blocks_of(tensor: LogicalTensor) -> Blocks:
    """Return the blocks of a tensor, or runs of `SHORT` values of its rows where it has none."""
    size = tensor.block or SHORT
    return Blocks(size, tensor.columns if tensor.flat else -(-tensor.columns // size) * size)


def measure(
    decoded: torch.Tensor, reference: torch.Tensor, rounded: torch.Tensor | None, *, blocks: Blocks, first: int
) -> Rows:
    """Return the sums of each row and the extremes of a window whose first row is `first`; a block starts there too."""
    import torch

    against = _compared_in_loops(reference, blocks) or _compared_by_torch(reference, blocks)
    found = against(decoded)
    more = None if rounded is None else against(rounded)
    non_finite = (0, 0)
    if not bool(torch.isfinite(found.sums).all()):
        non_finite = (int((~torch.isfinite(decoded)).sum()), int((~torch.isfinite(reference)).sum()))
        if not any(non_finite) and decoded.dtype == torch.float32:  # their squares are too large for it
            twice = None if rounded is None else rounded.double()
            return measure(decoded.double(), reference.double(), twice, blocks=blocks, first=first)
    extremes = _places(found, more, first)._replace(non_finite=non_finite[0], reference_non_finite=non_finite[1])
    if found.zeros is None:
        extremes = extremes._replace(zeros=_zeros(decoded), reference_zeros=_zeros(reference))
    return Rows(found.sums, None if more is None else more.sums, decoded.shape[1], extremes)


def measure_coded(
    coded: Coded,
    reference: torch.Tensor,
    rounding: Rounding | None,
    largest: float | None,
    *,
    blocks: Blocks,
    first: int,
) -> Rows | None:
    """Return the same of rows that are decoded, and rounded to nearest, on the way; `largest` is for `whole` formats.

    None where no loops are in use, or a value is not finite.

    reference  # (rows, columns) float32 or bfloat16
    """
    import torch

    loops = compiled.loops("windows")
    if loops is None:
        return None
    sums, rounded = loops.compare_coded(coded, reference, blocks, rounding, largest)
    found, more = _Compared(*sums), None if rounded is None else _Compared(*rounded)
    if not bool(torch.isfinite(found.sums).all()):
        return None
    return Rows(found.sums, None if more is None else more.sums, reference.shape[1], _places(found, more, first))


class _Compared(NamedTuple):
    """One side against the reference: the sums of each row, what blocks have, the largest error."""

    sums: torch.Tensor
    signal: torch.Tensor  # of each block
    noise: torch.Tensor
    max_error: float
    zeros: tuple[int, int] | None = None  # on either side, where they were counted on the way


def _compared_in_loops(reference: torch.Tensor, blocks: Blocks) -> Callable[[torch.Tensor], _Compared] | None:
    """One fused pass for each side, where compiled loops are in use."""
    loops = compiled.loops("windows")
    if loops is None or reference.element_size() != 4:
        return None

    def against(values: torch.Tensor) -> _Compared:
        return _Compared(*loops.compare(values, reference, blocks))

    return against


def _compared_by_torch(reference: torch.Tensor, blocks: Blocks) -> Callable[[torch.Tensor], _Compared]:
    """As few passes as there can be; what is of the reference alone is taken once."""
    import torch

    columns = reference.shape[1]
    width = blocks.size if columns % blocks.size == 0 else min(SHORT, columns)
    long = next((length for length in LONG if columns % length == 0), width)
    scratch = torch.empty(reference.shape, dtype=reference.dtype, device=reference.device)
    short, signal = _energy(torch.mul(reference, reference, out=scratch), width, blocks)
    power, total = _over_rows(short), _over_rows(_short_sums(reference, long))

    def against(values: torch.Tensor) -> _Compared:
        short, noise = _energy(_squared_error(values, reference, scratch), width, blocks)
        largest = float(scratch.amax().sqrt())  # the root of a square is the number again
        product = _over_rows(_short_sums(torch.mul(reference, values, out=scratch), width))
        drift = _over_rows(_short_sums(values, long)) - total
        sums = torch.stack((power, _over_rows(short), product - power, total, drift))
        return _Compared(sums, signal, noise, largest)

    return against


def _places(found: _Compared, rounded: _Compared | None, first: int) -> Extremes:
    """The worst row and the worst block, and the worst of those that rounding to nearest does better."""
    rows, block = _ratio(found.sums[0], found.sums[1]), _ratio(found.signal, found.noise)
    row = int(rows.argmin())
    seen = Extremes(found.max_error, min_block=float(block.amin()), min_row=float(rows[row]), row=first + row)
    if found.zeros is not None:
        seen = seen._replace(zeros=found.zeros[0], reference_zeros=found.zeros[1])
    if rounded is None:
        return seen
    lost = rows.where(rounded.sums[1] * LOST < found.sums[1], math.inf)
    lost_block = block.where(rounded.noise * LOST < found.noise, math.inf)
    at = int(lost.argmin())
    return seen._replace(lost_block=float(lost_block.amin()), lost_row=float(lost[at]), lost_at=first + at)


def in_steps(error: torch.Tensor, steps: torch.Tensor) -> tuple[float, int]:
    """Return the largest error in steps of its own place, and how many are beyond half of one."""
    import torch

    distance = (error / steps).abs_().nan_to_num_(nan=0.0)  # no error over no step is none
    return float(distance.amax()), int(torch.count_nonzero(distance > HALF_STEP))


def _squared_error(values: torch.Tensor, reference: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The squares of the errors, in one pass."""
    import torch

    return torch.ops.aten.mse_loss.out(values, reference, 0, out=out)  # type: ignore[no-any-return]  # 0: no reduction


def _energy(squares: torch.Tensor, width: int, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of squares of `width` values each, and those of the blocks."""
    short, columns = _short_sums(squares, width), squares.shape[1]
    if width == blocks.size and columns % width == 0:
        return short, short
    lines = squares.view(1, -1) if blocks.pitch == columns else squares
    return short, _short_sums(lines, min(blocks.size, lines.shape[1]))


def _over_rows(short: torch.Tensor) -> torch.Tensor:
    import torch

    return short.sum(dim=1, dtype=torch.float64)


def _short_sums(values: torch.Tensor, width: int) -> torch.Tensor:
    """Sums of `width` values each along rows; the last of a row may be shorter.

    values  # (rows, columns)
    ->      # (rows, ceil(columns / width))
    """
    import torch

    whole = values.shape[1] // width * width
    sums = values[:, :whole].reshape(len(values), -1, width).sum(dim=2)
    if whole == values.shape[1]:
        return sums
    return torch.cat((sums, values[:, whole:].sum(dim=1, keepdim=True)), dim=1)


def _ratio(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Signal over noise, infinite where there is no noise or no number."""
    return (signal / noise).nan_to_num_(nan=math.inf, posinf=math.inf)


def _zeros(values: torch.Tensor) -> int:
    """How many values are exactly zero; a float comparison is faster than one that makes booleans."""
    import torch

    ones = torch.eq(values, 0, out=torch.empty_like(values))
    return int(ones.view(-1, ones.shape[-1]).sum(dim=1).sum(dtype=torch.float64))
