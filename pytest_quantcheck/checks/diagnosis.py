"""The likely fault of a tensor that decodes wrong, proved by trying.

    expected  what the encoding can keep of this sample: rounding to nearest, or its floor, or 6 dB a bit less 10
    tried     the SQNR of the sample as a hypothesis reads it
    named     tried >= expected, and better than stored by a decibel; of several the first within a decibel of the best

What nothing proves is told by its signature in gain and bias, and what has no signature is not told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from pytest_quantcheck.checks.hypotheses import HYPOTHESES
from pytest_quantcheck.checks.sample import Attempt, Sample, sqnr_db
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.tensor import LogicalTensor

BETTER_DB = 1.0
HOPELESS_DB = 6.0
GAIN, BIAS = 0.04, 0.05
UNRELATED = 0.1


class Diagnosis(NamedTuple):
    """What is likely wrong with one tensor.

    `name` is short and stable, `words` complete "with ..." where `tried_db` proves them and stand alone where it is
    None. `advice` says what to look at. Both SQNR are those of the sample.
    """

    name: str
    words: str
    stored_db: float
    tried_db: float | None = None
    advice: str = ""

    def __str__(self) -> str:
        if self.tried_db is None:
            return f"{self.name}: {self.words}"
        tried = "no error" if self.tried_db == math.inf else f"{self.tried_db:.1f} dB"
        proof = f"{self.name}: with {self.words}: {tried} (stored: {self.stored_db:.1f} dB)"
        return f"{proof}; {self.advice}" if self.advice else proof


def diagnose(
    tensor: LogicalTensor, reference: LogicalTensor, *, device: str = "cpu", near: int | None = None
) -> Diagnosis | None:
    """Return what is likely wrong with a tensor that does not decode to its reference, or None where nothing shows.

    Both have the same shape. A bounded sample is decoded, `near` a row among it where that is known to be wrong.
    """
    if not tensor.params:
        return None
    sample = Sample(tensor, reference, device=device, near=near)
    if not all(window.reference.isfinite().all() for window in sample.windows) or math.isinf(sample.stored_db):
        return None  # no error, or no reference
    proved = list(_proved(sample))
    if not proved:
        return _signature(sample)
    best = max(db for _, db in proved)
    attempt, db = next((attempt, db) for attempt, db in proved if db >= best - BETTER_DB)
    return Diagnosis(attempt.name, attempt.words, sample.stored_db, db, attempt.advice)


def _proved(sample: Sample) -> Iterator[tuple[Attempt, float]]:
    expected, stored = _expected_db(sample), sample.stored_db
    found = False
    for hypothesis in HYPOTHESES:
        if found and hypothesis.fitted:
            return
        for attempt in hypothesis.attempts(sample):
            db = _tried_db(attempt, expected)
            if db >= expected and (math.isnan(stored) or db >= stored + hypothesis.better_db):
                found = found or not hypothesis.fitted
                yield attempt, db


def _tried_db(attempt: Attempt, expected: float) -> float:
    """The SQNR of an attempt; NaN where the other convention does not fit the parts, or a window is hopeless."""
    pairs = []
    try:
        for decoded, reference in attempt.pairs():
            if not sqnr_db([(decoded, reference)]) >= expected - HOPELESS_DB:
                return math.nan
            pairs.append((decoded, reference))
    except FormatError:
        return math.nan
    return sqnr_db(pairs) if pairs else math.nan


def _expected_db(sample: Sample) -> float:
    tensor, rounding = sample.tensor, sample.tensor.rounding
    if rounding is not None and sample.rounding_db is not None:
        return sample.rounding_db - max(rounding.margin_db, BETTER_DB)
    if tensor.floor_db is not None:
        return tensor.floor_db
    bits = 8 * tensor.parts[0].bytes[0][1] / tensor.params
    return min(28.0, max(5.0, 6 * bits - 10))


def _signature(sample: Sample) -> Diagnosis | None:
    """Words for what gain and bias say, where they say one thing."""
    stored = sample.stored_db
    if not any(window.decoded.any() for window in sample.windows):
        return Diagnosis("zeros", "every value decodes to zero: scales or codes were never written", stored)
    gain, bias = _gain_and_bias(sample)
    if math.isnan(gain) or math.isinf(gain):
        return None
    if abs(gain) < UNRELATED and stored < 0:
        words = (
            f"values that have nothing to do with the reference (gain {gain:.2f}): other weights, or codes in disorder"
        )
        return Diagnosis("unrelated", words, stored)
    if abs(gain - 1) < GAIN and abs(bias) > BIAS:
        words = f"bias {bias:+.2f} sigma at gain {gain:.2f}: what a zero point off by one gives"
        return Diagnosis("bias", words, stored)
    return None


def _gain_and_bias(sample: Sample) -> tuple[float, float]:
    import torch

    decoded = torch.cat([window.decoded for window in sample.windows]).double()
    reference = torch.cat([window.reference for window in sample.windows]).double()
    signal, sigma = float(reference.square().sum()), float(reference.std(correction=0))
    if not signal or not sigma:
        return math.nan, math.nan
    return float((reference * decoded).sum()) / signal, float((decoded - reference).mean()) / sigma
