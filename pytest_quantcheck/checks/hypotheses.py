"""What can be wrong with a tensor that decodes wrong, in the order in which it is believed.

    conventions  the same stored bytes, decoded again in another way
    orders       the same decoded values in other places
    fits         the same decoded values, and what the reference says is missing
    earlier      the same decoded values, against a reference that was quantized before

A function gets the sample of one tensor and yields attempts. It opens no file and judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pytest_quantcheck.checks import conventions, earlier, fits, orders
from pytest_quantcheck.checks.sample import Attempt, Sample


class Hypothesis(NamedTuple):
    """One row of the table: the names its attempts have, the function that makes them, and what it asks for.

    `fitted`: tried only where no convention explains the fault. `better_db` is what it must gain over what is stored.
    """

    names: tuple[str, ...]
    attempts: Callable[[Sample], Iterator[Attempt]]
    fitted: bool = False
    better_db: float = 1.0


# Conventions before reorderings before fits: of those that explain a fault about as well, the first is named.
HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis((), conventions.readings),  # of the schemes, see `Scheme.alternatives`
    Hypothesis(("nibbles-swapped",), conventions.nibbles),
    Hypothesis(("sign-convention",), conventions.signs),
    Hypothesis(("borrows",), conventions.borrows),
    Hypothesis(("byte-order",), conventions.byte_order),
    Hypothesis(("float-format",), conventions.float_formats),
    Hypothesis(("scale-inverted", "scales-shifted", "scales-transposed"), conventions.scales),
    Hypothesis(("zero-point-off-by-one", "zero-points-not-meant"), conventions.zero_points),
    Hypothesis(("codes-off-by-one",), conventions.code_offsets),
    Hypothesis(("rotary-heads",), conventions.heads),
    Hypothesis(("transposed",), orders.transposed),
    Hypothesis(("rotary-pairs", "rows-permuted"), orders.row_order),
    Hypothesis(("columns-permuted",), orders.column_order),
    Hypothesis(("group-index",), conventions.group_order, fitted=True),
    Hypothesis(("damaged-blocks",), fits.damage, fitted=True, better_db=0.0),
    Hypothesis(("gain", "shard-scales"), fits.gains, fitted=True, better_db=0.5),
    Hypothesis(("row-scales", "channel-scales"), fits.axis_gains, fitted=True),
    Hypothesis(("requantized",), earlier.requantized, fitted=True),
    Hypothesis(("shifted", "zero-points"), fits.offsets, fitted=True),
    Hypothesis(("block-scales",), fits.block_gains, fitted=True),
    Hypothesis(("low-rank-difference",), fits.low_rank, fitted=True),
)
