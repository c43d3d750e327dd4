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
    """The sums of each row of a window, float64 `[5, rows]` in the order of `Sums`, and what is seen in one place.

    `rounded` are those of what rounding to nearest makes of the reference, where that was asked for.
    """

    sums: torch.Tensor
    rounded: torch.Tensor | None
    columns: int
    extremes: Extremes

    def over(self, start: int, stop: int) -> Sums:
        """Return the sums over some rows."""
        values = (stop - start) * self.columns
        sums = _added(values, self.sums[:, start:stop])
        return sums if self.rounded is None else sums._replace(rounding=_added(values, self.rounded[:, start:stop]))


def _added(values: int, rows: torch.Tensor) -> Sums:
    signal, noise, cross, total, drift = rows.sum(dim=1).tolist()
    return Sums(values, signal, noise, cross, total, drift)


def measure(
    decoded: torch.Tensor, reference: torch.Tensor, rounded: torch.Tensor | None, *, block: int | None, first: int
) -> Rows:
    """Return the sums of each row and the extremes of a window whose first row is `first`; a block starts there too."""
    import torch

    columns = decoded.shape[1]
    width = block if block and columns % block == 0 else min(SHORT, columns)
    long = next((length for length in LONG if columns % length == 0), width)
    scratch = torch.empty(reference.shape, dtype=reference.dtype, device=reference.device)
    signal, blocks = _energy(torch.mul(reference, reference, out=scratch), width, block)
    power, total = _over_rows(signal), _over_rows(_short_sums(reference, long))

    def against(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        noise, noise_of_blocks = _energy(_squared_error(values, reference, scratch), width, block)
        largest = float(scratch.amax().sqrt())  # the root of a square is the number again
        product = _over_rows(_short_sums(torch.mul(reference, values, out=scratch), width))
        drift = _over_rows(_short_sums(values, long)) - total
        return torch.stack((power, _over_rows(noise), product - power, total, drift)), noise_of_blocks, largest

    sums, noise, max_error = against(decoded)
    rounded_sums, rounded_noise, _ = (None, None, 0.0) if rounded is None else against(rounded)
    non_finite = [0, 0]
    if not bool(torch.isfinite(sums).all()):
        non_finite = [int((~torch.isfinite(values)).sum()) for values in (decoded, reference)]
        if not any(non_finite) and decoded.dtype == torch.float32:  # their squares are too large for it
            twice = None if rounded is None else rounded.double()
            return measure(decoded.double(), reference.double(), twice, block=block, first=first)
    extremes = _places(sums, rounded_sums, (blocks, noise, rounded_noise), first)._replace(
        max_error=max_error,
        zeros=_zeros(decoded, scratch),
        reference_zeros=_zeros(reference, scratch),
        non_finite=non_finite[0],
        reference_non_finite=non_finite[1],
    )
    return Rows(sums, rounded_sums, columns, extremes)


def _places(
    sums: torch.Tensor,
    rounded: torch.Tensor | None,
    blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    first: int,
) -> Extremes:
    """The worst row and the worst block, and the worst of those that rounding to nearest does better."""
    signal, noise, rounded_noise = blocks
    rows, block = _ratio(sums[0], sums[1]), _ratio(signal, noise)
    row = int(rows.argmin())
    seen = Extremes(min_block=float(block.amin()), min_row=float(rows[row]), row=first + row)
    if rounded is None or rounded_noise is None:
        return seen
    lost = rows.where(rounded[1] * LOST < sums[1], math.inf)
    lost_block = block.where(rounded_noise * LOST < noise, math.inf)
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


def _energy(squares: torch.Tensor, width: int, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of squares of `width` values each, and those of the blocks, which may run on across rows."""
    short = _short_sums(squares, width)
    if width == block:
        return short, short
    return short, _short_sums(squares.view(1, -1), min(block or SHORT, squares.numel()))


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


def _zeros(values: torch.Tensor, scratch: torch.Tensor) -> int:
    """How many values are exactly zero; a float comparison is faster than one that makes booleans."""
    import torch

    ones = torch.eq(values, 0, out=scratch)
    return int(ones.view(-1, ones.shape[-1]).sum(dim=1).sum(dtype=torch.float64))
