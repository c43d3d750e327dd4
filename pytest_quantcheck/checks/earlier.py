"""The reference as an earlier quantization would have left it: what a tensor was made of that was quantized twice.

stored = second(first(reference)): against first(reference) it keeps what `second` can keep, against reference less
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pytest_quantcheck.checks.sample import Attempt, Pair, Sample, sqnr_db
from pytest_quantcheck.schemes import packing, rounding
from pytest_quantcheck.tensor import LogicalTensor, Rounding

# What is quantized again in the field: words, how it rounds, and its block; 8 bits are no loss that would show.
FIRST: tuple[tuple[str, rounding.Round, int], ...] = (
    ("NF4 in blocks of 64", rounding.codebook(packing.NF4), 64),
    ("NF4 in blocks of 128", rounding.codebook(packing.NF4), 128),
    ("FP4 in blocks of 64", rounding.codebook(packing.FP4), 64),
    ("symmetric int4 in groups of 128", rounding.symmetric(4), 128),
    ("int4 in groups of 128", rounding.affine(4), 128),
    ("int4 in groups of 64", rounding.affine(4), 64),
    ("int4 in groups of 32", rounding.affine(4), 32),
    ("ggml's Q4_0", rounding.extreme(4), 32),
)
LEAST_MISSING_DB, MOST_MISSING_DB = 0.5, 10.0
SAME_DB = 35.0


def requantized(sample: Sample) -> Iterator[Attempt]:
    """Quantized from values that were quantized before, where rounding the original would have kept more."""
    keeps = sample.rounding_db
    if keeps is None or not keeps - MOST_MISSING_DB < sample.stored_db < keeps - LEAST_MISSING_DB:
        return
    for words, round_, block in FIRST:
        first = _rounding(sample.tensor, round_, block)
        yield Attempt(
            "requantized",
            f"the reference first rounded to {words}",
            partial(_pairs, sample, first),
            "it was made from another quantization, not from the original",
        )


def _rounding(tensor: LogicalTensor, round_: rounding.Round, block: int) -> Rounding:
    if tensor.columns % block:
        return rounding.flat(round_, block, tensor.columns)
    return rounding.grouped(round_, block)


def _pairs(sample: Sample, first: Rounding) -> Iterator[Pair]:
    """The windows against the reference as it was then; none where rounding once more changes nothing."""
    tensor, second = sample.tensor, sample.tensor.rounding
    assert second is not None
    for window in sample.windows:
        if window.start % first.rows or (window.stop % first.rows and window.stop != tensor.rows):
            continue
        before = first.nearest(tensor, window.reference, None)
        if sqnr_db([(second.nearest(tensor, before, None), before)]) > SAME_DB:
            return
        yield window.decoded, before
