"""How much of a merged adapter survives quantization, per tensor and in all.

    delta    merged - base                              what the adapter adds
    kept     quantized - base                           what is there of it, with the noise of quantization
    db       10 log10( sum delta^2 / sum (kept - delta)^2 )
    gain     sum(delta * kept) / sum delta^2            1: the adapter is there at full strength, 0: it is gone

A low-rank delta is small beside the weights, and quantization noise is a share of the weights: weights at a healthy
20 dB can hold an adapter at less than 1 dB. Under 0 dB the noise is larger than the adapter. Tensors that the adapter
does not touch (delta 0) are not judged. Sums are kept in float64 and streamed in windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.fidelity import sqnr_db
from pytest_quantcheck.checks.pairing import Pairing, pair
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.quantities import counted
from pytest_quantcheck.tensor import LogicalTensor

CHECK = "delta-preserved"
WINDOW = 1 << 20


class Delta(NamedTuple):
    """What is left of the adapter in one tensor; `db` and `gain` as in the module docstring."""

    name: str
    scheme: str
    signal: float  # sum of squares of the delta
    noise: float  # sum of squares of what is added to it or missing
    gain: float
    share: float  # norm of the delta over that of the base weight

    @property
    def db(self) -> float:
        """The delta over the noise in dB."""
        return sqnr_db(self.signal, self.noise)


class Deltas(NamedTuple):
    """The tensors that the adapter touches, worst first, and what could not be compared."""

    tensors: tuple[Delta, ...]
    failures: tuple[tuple[str, str], ...]

    @property
    def db(self) -> float:
        """The delta over the noise in dB, over all tensors together."""
        return sqnr_db(sum(row.signal for row in self.tensors), sum(row.noise for row in self.tensors))


def compare(base: Artifact, merged: Artifact, quantized: Artifact, *, device: str = "cpu") -> Deltas:
    """Compare every tensor that differs between base and merged with what the quantized model has in its place."""
    before, after = pair(quantized, base), pair(quantized, merged)
    failures = [
        (tensor.name, "is an adapter: merge it first") for tensor in merged.parameters if tensor.role == "adapter"
    ]
    failures += [*_unpaired(before, "base"), *_unpaired(after, "merged model")]
    bases = {tensor.name: reference for tensor, reference in before.pairs}
    rows = []
    for tensor, reference in after.pairs:
        if tensor.name not in bases:
            continue  # said above
        try:
            row = _measure(bases[tensor.name], reference, tensor, device)
        except NotDecodable as error:
            failures.append((tensor.name, error.what))
            continue
        if row.signal != 0:  # NaN is no tensor that the adapter leaves alone
            rows.append(row)
    rows.sort(key=lambda row: (not math.isnan(row.db), row.db))
    return Deltas(tuple(rows), tuple(failures))


def check_delta(deltas: Deltas, min_db: float) -> Verdict:
    """Require every tensor that the adapter touches to keep it at `min_db` or more."""
    low = [row for row in deltas.tensors if not row.db >= min_db]
    headline = (
        f"adapter: {deltas.db:.2f} dB survive over {counted(len(deltas.tensors), 'tensor')}, "
        f"{len(low):,} under the allowed min {min_db:g} dB"
    )
    lines = worst([_line(row) for row in low]) + worst([f"{name}: {why}" for name, why in deltas.failures])
    if not deltas.tensors:
        headline = "adapter: no tensor was found that differs between base and merged"
        lines.append("nothing was merged, so nothing was compared (a check that compared nothing has failed)")
    return Verdict(CHECK, not lines, headline, tuple(lines))


def _line(row: Delta) -> str:
    lost = ": the noise is larger than the adapter" if row.db < 0 else ""
    how = f"gain {row.gain:.3f}, the adapter is {100 * row.share:.2f} % of the weight, {row.scheme}"
    return f"{row.name}: {row.db:.2f} dB ({how}){lost}"


def _unpaired(pairing: Pairing, side: str) -> Iterator[tuple[str, str]]:
    """What cannot be compared, in words that say which of the three it is about."""
    for finding in pairing.findings:
        if finding.severity != "note":
            yield finding.tensor or "", finding.message.replace("the reference", f"the {side}")


def _measure(base: LogicalTensor, merged: LogicalTensor, quantized: LogicalTensor, device: str) -> Delta:
    signal = noise = cross = weight = 0.0
    for start, stop in quantized.windows(WINDOW):
        before, after, here = (tensor.decode(start, stop, device).double() for tensor in (base, merged, quantized))
        delta, kept = after - before, here - before
        signal += float(delta.square().sum())
        noise += float((kept - delta).square().sum())
        cross += float((delta * kept).sum())
        weight += float(before.square().sum())
    gain = cross / signal if signal else 1.0
    share = (signal / weight) ** 0.5 if weight else 1.0
    return Delta(quantized.name, quantized.scheme, signal, noise, gain, share)
