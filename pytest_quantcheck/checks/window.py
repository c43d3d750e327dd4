"""One window of values: sums and extremes, in as few passes over it as there can be.

    decoded, reference, rounded  # (rows, columns) float32, on any device

Short sums (64 values or one block) are float32, long ones float64. Every sum has many terms beside it, so that torch
never splits one of them between threads: the same values give the same bits, however many there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.checks.metrics import LOST, Extremes, Sums

if TYPE_CHECKING:
    import torch

SHORT = 64
LONG = (4096, 2048, 1024, 512, 256, 128)
HALF_STEP = 0.5 * (1 + 2**-20)  # the error and the step are rounded themselves


class Rows(NamedTuple):
    """The sums of each row of a window, float64 `[8, rows]` in the order of `Sums`, and what is seen in one place."""

    sums: torch.Tensor
    columns: int
    extremes: Extremes

    def over(self, start: int, stop: int) -> Sums:
        """Return the sums over some rows."""
        return Sums((stop - start) * self.columns, *self.sums[:, start:stop].sum(dim=1).tolist())


def measure(
    decoded: torch.Tensor, reference: torch.Tensor, rounded: torch.Tensor | None, *, block: int | None, first: int
) -> Rows:
    """Return the sums of each row and the extremes of a window whose first row is `first`; a block starts there too."""
    import torch

    width = block if block and decoded.shape[1] % block == 0 else min(SHORT, decoded.shape[1])
    long = next((length for length in LONG if decoded.shape[1] % length == 0), width)
    error = decoded - reference
    scratch = torch.empty_like(error)
    parts = [
        _short_sums(torch.mul(reference, reference, out=scratch), width),
        _short_sums(torch.mul(error, error, out=scratch), width),
        _short_sums(torch.mul(reference, error, out=scratch), long),
        _short_sums(reference, long),
        _short_sums(error, long),
    ]
    deviation = None if rounded is None else rounded - reference
    if deviation is not None:
        parts.append(_short_sums(torch.mul(deviation, deviation, out=scratch), width))
        parts.append(_short_sums(torch.mul(reference, deviation, out=scratch), long))
        parts.append(_short_sums(deviation, long))
    sums = torch.stack([part.sum(dim=1, dtype=torch.float64) for part in parts])
    non_finite = [0, 0]
    if not bool(torch.isfinite(sums).all()):
        non_finite = [int((~torch.isfinite(values)).sum()) for values in (decoded, reference)]
        if not any(non_finite) and error.dtype == torch.float32:  # the squares are too large for it, the values are not
            rounded = None if deviation is None else deviation.double() + reference.double()
            return measure(decoded.double(), reference.double(), rounded, block=block, first=first)
    if width == block:
        blocks = [parts[0], parts[1], *parts[5:6]]
    else:
        blocks = [
            _block_energy(values, block or SHORT) for values in (reference, error, deviation) if values is not None
        ]
    extremes = _places(sums, blocks, first, rounds=deviation is not None)._replace(
        max_error=_magnitude(error),
        zeros=_zeros(decoded, scratch),
        reference_zeros=_zeros(reference, scratch),
        non_finite=non_finite[0],
        reference_non_finite=non_finite[1],
    )
    if deviation is None:
        sums = torch.cat((sums, torch.zeros_like(sums[:3])))
    return Rows(sums, decoded.shape[1], extremes)


def _places(sums: torch.Tensor, blocks: list[torch.Tensor], first: int, *, rounds: bool) -> Extremes:
    """The worst row and the worst block, and the worst of those that rounding to nearest does better."""
    rows, block = _ratio(sums[0], sums[1]), _ratio(blocks[0], blocks[1])
    row = int(rows.argmin())
    seen = Extremes(min_block=float(block.amin()), min_row=float(rows[row]), row=first + row)
    if not rounds:
        return seen
    lost = rows.where(sums[5] * LOST < sums[1], math.inf)
    lost_block = block.where(blocks[2] * LOST < blocks[1], math.inf)
    at = int(lost.argmin())
    return seen._replace(lost_block=float(lost_block.amin()), lost_row=float(lost[at]), lost_at=first + at)


def in_steps(error: torch.Tensor, steps: torch.Tensor) -> tuple[float, int]:
    """Return the largest error in steps of its own place, and how many are beyond half of one."""
    import torch

    distance = (error / steps).abs_().nan_to_num_(nan=0.0)  # no error over no step is none
    return float(distance.amax()), int(torch.count_nonzero(distance > HALF_STEP))


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


def _block_energy(values: torch.Tensor, block: int) -> torch.Tensor:
    """The sum of squares of each block where blocks run on across rows; the last may be shorter."""
    import torch

    flat = values.reshape(-1)
    whole = len(flat) // block * block
    energy = flat[:whole].square().view(-1, block).sum(dim=1)
    return energy if whole == len(flat) else torch.cat((energy, flat[whole:].square().sum(dim=0, keepdim=True)))


def _ratio(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Signal over noise, infinite where there is no noise or no number."""
    return (signal / noise).nan_to_num_(nan=math.inf, posinf=math.inf)


def _magnitude(values: torch.Tensor) -> float:
    """The largest magnitude, NaN where there is one."""
    high, low = float(values.amax()), float(values.amin())
    return math.nan if math.isnan(high) else max(high, -low)


def _zeros(values: torch.Tensor, scratch: torch.Tensor) -> int:
    """How many values are exactly zero; a float comparison is faster than one that makes booleans."""
    import torch

    ones = torch.eq(values, 0, out=scratch)
    return int(ones.view(-1, ones.shape[-1]).sum(dim=1).sum(dtype=torch.float64))
