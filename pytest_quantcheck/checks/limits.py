"""What is allowed of a tensor, and which limits it breaks.

SQNR      `auto`: what rounding the reference to nearest would keep, less the margin of the encoding; its floor
          where it is not known how the encoding rounds
gain      4 % off what rounding to nearest has, of the tensor and of each shard; off 1 where that is not known
bias      5 % of a standard deviation off none, or off what rounding to nearest has, likewise
block     3 dB for the worst block, where healthy ones are far above
row       3 dB for the worst row, likewise
plain     equal to the reference in the stored dtype, to the bit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Literal, NamedTuple

from pytest_quantcheck.checks.coverage import matches
from pytest_quantcheck.checks.metrics import Fidelity, Sums, ratio_db
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.schemes.rounding import COMPENSATED_DB
from pytest_quantcheck.tensor import LogicalTensor

# A healthy 4-bit format shrinks by 0.5 %; all scales off by 5 % come out at 4.5 %. A format of few levels shrinks by
# its own noise, as rounding to nearest does; where that is not known, or errors are compensated, that much is allowed.
GAIN = 0.04
BIAS = 0.05
# What arithmetic in float32 and scales in 16 bits leave of values that codes meet exactly.
EXACT_DB = 60.0
# A dead block is at 0 dB, one of eight corrupted codes at 2.7, the worst healthy one of NF4 at 12 and more. Formats
# that are hardly better as a whole have healthy blocks below that.
MIN_BLOCK_DB = 3.0
MIN_BLOCK_FROM_DB = 14.0
# Fewer values than this are too few for a mean.
SHARD_VALUES = 4096
# A layer is an outlier where it is this far under the median of its siblings, in dB and in deviations of theirs.
SIBLINGS = 4
OUTLIER_DB = 1.0
OUTLIER_DEVIATIONS = 6.0
MAD = 1.4826  # of a normal distribution, to its standard deviation

Decibels = float | Literal["auto"]


class Limits(NamedTuple):
    """What is allowed. `auto` takes what each tensor's encoding can be expected to keep.

    `min_sqnr_db` may be a mapping of name patterns, the first that matches counts; what none matches is `auto`.
    `equal` requires plain tensors to be the reference in their dtype, to the bit. `max_steps` limits the error in
    quantization steps where those are known: what was rounded to nearest is never off by more than half of one.
    """

    min_sqnr_db: Decibels | Mapping[str, Decibels] = "auto"
    gain: float | Literal["auto"] = "auto"
    bias: float = BIAS
    min_block_sqnr_db: Decibels = "auto"
    max_error: float | None = None
    equal: bool = True
    max_steps: float | None = None


def judge(row: Fidelity, tensor: LogicalTensor, limits: Limits) -> Fidelity:
    """Return the row with what was expected and every limit that is broken."""
    expected, why = _expected(row, tensor, limits)
    faults = [*_not_finite(row)]
    if faults:  # no sum says anything beside them
        return row._replace(expected_sqnr_db=expected, faults=tuple(faults))
    faults += _changed(row, tensor, limits)
    if expected is None:
        faults.append(f"no SQNR is known to expect of {row.scheme}: give min_sqnr_db")
    elif not row.sqnr_db >= expected:
        measured, limit = _told_apart(row.sqnr_db, expected)
        given = _given(row.name, limits) != "auto"
        faults.append(
            f"SQNR {measured} dB is under {limit} dB " + (f"given{why}" if given else f"expected for {row.scheme}{why}")
        )
    faults += _scales(row, tensor, limits)
    faults += _places(row, tensor, limits)
    if limits.max_error is not None and not row.max_error <= limits.max_error:
        faults.append(f"maximum error {row.max_error:.3g} is over {limits.max_error:g}")
    steps = row.max_error_steps
    if limits.max_steps is not None and steps is not None and not steps <= limits.max_steps:
        faults.append(
            f"error of {steps:.3g} steps is over {limits.max_steps:g}: {row.beyond_half_step or 0:,} values are "
            "further than half a step from the reference"
        )
    return row._replace(expected_sqnr_db=expected, faults=tuple(faults))


def _told_apart(measured: float, limit: float) -> tuple[str, str]:
    """Return two numbers in as few digits as show that they differ.

    >>> _told_apart(12.04, 19.23), _told_apart(20.68, 20.7)
    (('12.0', '19.2'), ('20.68', '20.70'))
    """
    for digits in range(1, 7):
        written = f"{measured:.{digits}f}", f"{limit:.{digits}f}"
        if written[0] != written[1]:
            break
    return written


def expects_rounding(tensor: LogicalTensor, limits: Limits) -> bool:
    """Whether anything that is asked of a tensor depends on how its encoding rounds."""
    return _given(tensor.name, limits) == "auto" or limits.max_steps is not None


def require_matches(limits: Limits, names: Iterable[str]) -> None:
    """Raise a ValueError for a pattern of `min_sqnr_db` that matches no tensor."""
    if not isinstance(limits.min_sqnr_db, Mapping):
        return
    names = list(names)
    for pattern in limits.min_sqnr_db:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"min_sqnr_db: pattern `{pattern}` matches no tensor that is compared")


def outliers(rows: Iterable[Fidelity]) -> Iterator[Finding]:
    """Yield a warning for each quantized tensor that is far worse than the same one of other layers."""
    siblings: dict[tuple[str, str], list[Fidelity]] = {}
    for row in rows:
        if row.quantized and math.isfinite(row.sqnr_db):
            siblings.setdefault((_role(row.name), row.scheme), []).append(row)
    for group in siblings.values():
        if len(group) >= SIBLINGS:
            yield from _outliers(group)


def _outliers(group: list[Fidelity]) -> Iterator[Finding]:
    kept = [_kept(row) for row in group]
    middle = median(kept)
    deviation = MAD * median(abs(value - middle) for value in kept)
    allowed = max(OUTLIER_DB, OUTLIER_DEVIATIONS * deviation)
    for row, value in zip(group, kept, strict=True):
        if value < middle - allowed:
            what = (
                f"is {middle - value:.1f} dB worse than the median of {len(group)} like it (SQNR {row.sqnr_db:.1f} dB)"
            )
            yield Finding("outlier", "warning", row.name, what)


def _kept(row: Fidelity) -> float:
    """The SQNR, against what rounding would keep where that is known: layers of other distributions are alike then."""
    rounding = row.rounding_sqnr_db
    return row.sqnr_db - rounding if rounding is not None and math.isfinite(rounding) else row.sqnr_db


def _role(name: str) -> str:
    """The name with the number of the layer left out: what the same tensor of all layers has in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _expected(row: Fidelity, tensor: LogicalTensor, limits: Limits) -> tuple[float | None, str]:
    """The SQNR to require, and where it comes from."""
    block = f" (block {tensor.block})" if tensor.block else ""
    given = _given(row.name, limits)
    if given != "auto":
        return given, block
    rounding = row.rounding_sqnr_db
    if tensor.rounding is None or rounding is None or math.isnan(rounding) or rounding == -math.inf:
        return tensor.floor_db, block
    margin, exact = tensor.rounding.margin_db, max(EXACT_DB, tensor.floor_db or 0.0)
    keeps = f"{rounding:.1f} dB" if rounding < exact else "everything" if rounding == math.inf else f"over {exact:g} dB"
    return min(rounding, exact) - margin, f"{block}: rounding to nearest keeps {keeps}, less {margin:g}"


def _given(name: str, limits: Limits) -> Decibels:
    if not isinstance(limits.min_sqnr_db, Mapping):
        return limits.min_sqnr_db
    return next((floor for pattern, floor in limits.min_sqnr_db.items() if matches(name, pattern)), "auto")


def _not_finite(row: Fidelity) -> Iterator[str]:
    for count, what in ((row.extremes.non_finite, "decoded"), (row.extremes.reference_non_finite, "reference")):
        if count:
            yield f"{count:,} of {row.sums.values:,} {what} values are NaN or infinite"


def _changed(row: Fidelity, tensor: LogicalTensor, limits: Limits) -> Iterator[str]:
    if limits.equal and row.extremes.changed:
        dtype = tensor.stored.dtype
        yield f"{row.extremes.changed:,} of {row.sums.values:,} values are not those of the reference in {dtype}"


def _scales(row: Fidelity, tensor: LogicalTensor, limits: Limits) -> Iterator[str]:
    """Gain and bias, of the whole and of its shards."""
    allowed = _allowed_gain(row, tensor) if limits.gain == "auto" else limits.gain
    for name, sums in _wrong(row, lambda sums: _gain(sums, limits) <= allowed):
        meant = _meant_gain(sums, limits)
        near = abs(meant - 1) < GAIN / 4
        of, share = ("1", "") if near else (f"the {meant:.3f} of rounding to nearest", " of it")
        yield f"gain {sums.gain:.3f}{name} is off {of} by more than {allowed:.2g}{share}: scales are wrong"
    for name, sums in _wrong(row, lambda sums: _bias(sums) <= limits.bias):
        yield f"bias {sums.bias:+.3f} sigma{name} is over {limits.bias:g}: zero points are wrong"


def _wrong(row: Fidelity, is_right: Callable[[Sums], bool]) -> Iterator[tuple[str, Sums]]:
    """The whole where it is wrong in all of its shards or in none; the shards that are wrong where some are."""
    shards = [shard for shard in row.shards if shard.sums.values >= SHARD_VALUES]
    wrong = [shard for shard in shards if not is_right(shard.sums)]
    if len(wrong) < len(shards):
        yield from ((f" of {shard.name}", shard.sums) for shard in wrong)
    if not is_right(row.sums) and len(wrong) in (0, len(shards)):
        yield "", row.sums


def _places(row: Fidelity, tensor: LogicalTensor, limits: Limits) -> Iterator[str]:
    """The worst block and the worst row; what rounding to nearest does no better is nobody's fault."""
    seen = row.extremes
    usual = MIN_BLOCK_DB if (tensor.floor_db or 0) >= MIN_BLOCK_FROM_DB else None
    floor, block = usual if tensor.block else None, ratio_db(seen.lost_block if row.rounds else seen.min_block)
    if limits.min_block_sqnr_db != "auto":
        floor, block = limits.min_block_sqnr_db, row.min_block_sqnr_db
    if floor is not None and not block >= floor:
        yield f"worst block has {block:.1f} dB, under {floor:.1f} dB: a block is dead or corrupt"
    lost = ratio_db(seen.lost_row)
    if row.rounds and usual is not None and not lost >= usual:
        yield f"row {seen.lost_at:,} has {lost:.1f} dB, under {usual:.1f} dB: a row is dead or corrupt"


def _gain(sums: Sums, limits: Limits) -> float:
    """How far the gain is from what it is meant to be, as a share of that; of nothing, nothing is meant to be left."""
    meant = _meant_gain(sums, limits)
    return abs(sums.gain - meant) / abs(meant) if meant else abs(sums.gain)


def _meant_gain(sums: Sums, limits: Limits) -> float:
    """The gain of rounding to nearest, 1 where that is not known; 1 where a limit was given."""
    return sums.rounding_gain if limits.gain == "auto" and math.isfinite(sums.rounding_gain) else 1.0


def _bias(sums: Sums) -> float:
    """How far the bias is from none, or from that of rounding to nearest."""
    return min(abs(sums.bias), abs(sums.bias - sums.rounding_bias))


def _allowed_gain(row: Fidelity, tensor: LogicalTensor) -> float:
    """Levels at the means of what they stand for shrink the whole by the share of the noise."""
    if tensor.floor_db is None or (row.rounds and tensor.rounding and tensor.rounding.margin_db < COMPENSATED_DB):
        return GAIN
    return max(GAIN, 1.5 * 10 ** (-tensor.floor_db / 10))
