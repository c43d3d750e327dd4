"""What is measured of decoded values against their reference, as records of sums.

    error = decoded - reference
    sqnr_db         10 log10( sum reference^2 / sum error^2 )
    relative_error  sqrt( sum error^2 / sum reference^2 )
    gain            sum(reference * decoded) / sum reference^2      1 is right; a scale off by 5 % shows only here
    bias            mean(error) / standard deviation of the reference      a zero point off by one shows here
    cosine          sum(reference * decoded) / sqrt(sum reference^2 * sum decoded^2)      blind to scales: for display

Sums are float64. NaN stays NaN, and fails every limit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

LOST = 4.0  # 6 dB of noise more than rounding makes
WEAK = 2.0  # signal to noise of a block or a row, 3 dB: worth asking what rounding would make of it


class Sums(NamedTuple):
    """Sums over a run of values; those of two runs are added to those of both."""

    values: int = 0
    signal: float = 0.0  # reference^2
    noise: float = 0.0  # error^2
    cross: float = 0.0  # reference * error
    total: float = 0.0  # reference
    drift: float = 0.0  # error
    rounding: Sums | None = None  # the same of the reference rounded to nearest, over the windows where that was done

    def plus(self, other: Sums) -> Sums:
        """Return the sums over both runs."""
        both = self.rounding.plus(other.rounding) if self.rounding and other.rounding else None
        return Sums(
            self.values + other.values,
            self.signal + other.signal,
            self.noise + other.noise,
            self.cross + other.cross,
            self.total + other.total,
            self.drift + other.drift,
            both or self.rounding or other.rounding,
        )

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB, infinite where decoded and reference are equal."""
        return sqnr_db(self.signal, self.noise)

    @property
    def rounding_sqnr_db(self) -> float:
        """The SQNR that rounding the reference to nearest would have; NaN where that is not known."""
        return self.rounding.sqnr_db if self.rounding else math.nan

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the reference."""
        return math.sqrt(self.noise / self.signal) if self.signal else math.copysign(math.inf, self.noise or -1)

    @property
    def gain(self) -> float:
        """The slope of decoded over reference; 1 is right."""
        return 1 + self.cross / self.signal if self.signal else 1.0

    @property
    def rounding_gain(self) -> float:
        """The slope that rounding the reference to nearest would have; NaN where that is not known."""
        return self.rounding.gain if self.rounding else math.nan

    @property
    def sigma(self) -> float:
        """The standard deviation of the reference."""
        mean = self.total / self.values if self.values else 0.0
        return math.sqrt(max(0.0, self.signal / self.values - mean * mean)) if self.values else 0.0

    @property
    def bias(self) -> float:
        """The mean error, in standard deviations of the reference."""
        mean = self.drift / self.values if self.values else 0.0
        return mean / self.sigma if self.sigma else mean

    @property
    def rounding_bias(self) -> float:
        """The mean error that rounding the reference to nearest would have, likewise; NaN where that is not known."""
        return self.rounding.bias if self.rounding else math.nan

    @property
    def cosine(self) -> float:
        """The cosine of the angle between decoded and reference."""
        decoded = self.signal + 2 * self.cross + self.noise
        return (self.signal + self.cross) / math.sqrt(self.signal * decoded) if self.signal and decoded > 0 else 0.0


class Shard(NamedTuple):
    """Rows of a tensor that belong together: `gate` and `up` of a fused matrix, or a quarter of the rows."""

    name: str
    sums: Sums


class Extremes(NamedTuple):
    """What is seen in one place of a tensor only, and what is counted value by value.

    `min_block` and `min_row` are ratios of signal to noise; `row` is where the latter is. `lost_block` and `lost_row`
    look only at those with `LOST` times the noise of rounding to nearest; row `lost_at` is the latter. `changed` counts
    values of a plain tensor that are not the reference in its dtype. `max_steps` is the largest error in quantization
    steps, and `beyond` counts the values that are further than half a step away.
    """

    max_error: float = 0.0
    min_block: float = math.inf
    min_row: float = math.inf
    row: int = 0
    lost_block: float = math.inf
    lost_row: float = math.inf
    lost_at: int = 0
    zeros: int = 0
    reference_zeros: int = 0
    non_finite: int = 0
    reference_non_finite: int = 0
    changed: int = 0
    max_steps: float = 0.0
    beyond: int = 0

    def plus(self, other: Extremes) -> Extremes:
        """Return what is seen in either run of values."""
        worse = other if other.min_row < self.min_row else self
        lost = other if other.lost_row < self.lost_row else self
        return Extremes(
            _largest(self.max_error, other.max_error),
            min(self.min_block, other.min_block),
            worse.min_row,
            worse.row,
            min(self.lost_block, other.lost_block),
            lost.lost_row,
            lost.lost_at,
            self.zeros + other.zeros,
            self.reference_zeros + other.reference_zeros,
            self.non_finite + other.non_finite,
            self.reference_non_finite + other.reference_non_finite,
            self.changed + other.changed,
            _largest(self.max_steps, other.max_steps),
            self.beyond + other.beyond,
        )


class Fidelity(NamedTuple):
    """The metrics of one tensor, what was expected of it, and what is wrong with it.

    `sums` are over all its values, `shards` over rows that belong together. `rounds` tells whether it is known how the
    encoding rounds, `in_steps` whether errors were measured in steps. `expected_sqnr_db` and `faults` are set by the
    limits.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    sums: Sums
    extremes: Extremes
    shards: tuple[Shard, ...] = ()
    rounds: bool = False
    in_steps: bool = False
    expected_sqnr_db: float | None = None
    faults: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the values are encoded, as opposed to written as plain numbers."""
        return self.scheme != "plain"

    @property
    def signal(self) -> float:
        """The sum of squares of the reference."""
        return self.sums.signal

    @property
    def noise(self) -> float:
        """The sum of squares of the error."""
        return self.sums.noise

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB, infinite where decoded and reference are equal."""
        return self.sums.sqnr_db

    @property
    def rounding_sqnr_db(self) -> float | None:
        """The SQNR of the reference rounded to nearest in the same encoding; None where that is not known."""
        return self.sums.rounding_sqnr_db if self.rounds else None

    @property
    def sampled(self) -> bool:
        """Whether rounding to nearest was tried on a part of the values only."""
        return self.sums.rounding is not None and self.sums.rounding.values < self.sums.values

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the reference."""
        return self.sums.relative_error

    @property
    def gain(self) -> float:
        """The slope of decoded over reference; 1 is right."""
        return self.sums.gain

    @property
    def bias(self) -> float:
        """The mean error, in standard deviations of the reference."""
        return self.sums.bias

    @property
    def cosine(self) -> float:
        """The cosine of the angle between decoded and reference: for display, it is blind to scales."""
        return self.sums.cosine

    @property
    def max_error(self) -> float:
        """The largest error, in the units of the weights."""
        return self.extremes.max_error

    @property
    def max_error_sigmas(self) -> float:
        """The largest error, in standard deviations of the reference."""
        return self.max_error / self.sums.sigma if self.sums.sigma else math.copysign(math.inf, self.max_error or -1)

    @property
    def max_error_steps(self) -> float | None:
        """The largest error, in quantization steps where it is; None where that was not measured."""
        return self.extremes.max_steps if self.in_steps else None

    @property
    def beyond_half_step(self) -> int | None:
        """How many values are further than half a step from the reference: none of what was rounded to nearest."""
        return self.extremes.beyond if self.in_steps else None

    @property
    def min_block_sqnr_db(self) -> float:
        """The SQNR of the worst quantization block, in dB; NaN where any value is none."""
        return math.nan if math.isnan(self.sqnr_db) else ratio_db(self.extremes.min_block)

    @property
    def min_row_sqnr_db(self) -> float:
        """The SQNR of the worst row, in dB; NaN where any value is none."""
        return math.nan if math.isnan(self.sqnr_db) else ratio_db(self.extremes.min_row)

    @property
    def worst_row(self) -> int | None:
        """The index of that row, all leading dimensions counted as rows; None where no row has an error."""
        return self.extremes.row if math.isfinite(self.extremes.min_row) else None

    @property
    def zero_fraction(self) -> float:
        """The share of decoded values that are exactly zero."""
        return self.extremes.zeros / self.sums.values if self.sums.values else 0.0

    @property
    def reference_zero_fraction(self) -> float:
        """The share of reference values that are exactly zero."""
        return self.extremes.reference_zeros / self.sums.values if self.sums.values else 0.0


def sqnr_db(signal: float, noise: float) -> float:
    """Return signal to noise in dB; infinite without noise, NaN where either is not finite.

    >>> sqnr_db(100.0, 1.0), sqnr_db(0.0, 0.0), sqnr_db(0.0, 1.0)
    (20.0, inf, -inf)
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def ratio_db(ratio: float) -> float:
    """Return a ratio of signal to noise in dB, infinite where nothing had noise."""
    return sqnr_db(ratio, 1.0) if math.isfinite(ratio) else ratio


def _largest(one: float, other: float) -> float:
    """The larger of two; NaN where either is, which `max` keeps on one side only."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
