"""Decoded values against a reference, streamed in windows: SQNR, gain, bias, maximum error, worst block.

    error = decoded - reference
    sqnr_db      10 log10( sum reference^2 / sum error^2 )
    gain         sum(reference * decoded) / sum reference^2      1 is right; a scale off by 5 % shows only here
    bias         mean(error) / standard deviation of the reference      a zero point off by one shows here
    max_error    the largest |error|, in the units of the weights
    min_block    the smallest SQNR of a quantization block: a dead or corrupted block shows only here

Sums are kept in float64. NaN fails every limit. Comparing nothing is a failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks import smoothing
from pytest_quantcheck.checks.pairing import Pair
from pytest_quantcheck.checks.pairing import pair as pair_tensors
from pytest_quantcheck.checks.verdict import WORST, Verdict, worst
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

# A healthy 4-bit format shrinks by 0.5 %; all scales off by 5 % come out at 4.5 %. A format of few levels shrinks by
# its own noise, and that much more is allowed of it.
GAIN = 0.04
BIAS = 0.05
# A dead block is at 0 dB, one of eight corrupted codes at 2.7, the worst healthy one of NF4 at 12 and more. Formats
# that are hardly better as a whole have healthy blocks below that.
MIN_BLOCK_DB = 3.0
MIN_BLOCK_FROM_DB = 14.0
DEFAULT_BLOCK = 64
WINDOW = 1 << 20


class Limits(NamedTuple):
    """What is allowed. `auto` takes what each tensor's encoding is known to keep."""

    min_sqnr_db: float | Literal["auto"] = "auto"
    gain: float | Literal["auto"] = "auto"
    bias: float = BIAS
    min_block_sqnr_db: float | Literal["auto"] = "auto"
    max_error: float | None = None


class Fidelity(NamedTuple):
    """The metrics of one tensor (see the module docstring), what was expected of it, and what is wrong with it."""

    name: str
    scheme: str
    shape: tuple[int, ...]
    signal: float  # sum of squares of the reference
    noise: float  # sum of squares of the error
    gain: float
    bias: float
    max_error: float
    min_block_sqnr_db: float
    expected_sqnr_db: float | None
    faults: tuple[str, ...] = ()

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB, infinite where decoded and reference are equal."""
        return sqnr_db(self.signal, self.noise)


class Comparison(NamedTuple):
    """All tensors that were compared, worst first, and what could not be compared."""

    tensors: tuple[Fidelity, ...]
    findings: tuple[Finding, ...]
    sqnr_db: float | None  # over all values of the quantized tensors together

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing is wrong."""
        return not any(finding.severity == "error" for finding in self.findings)


def compare(
    artifact: Artifact, reference: Artifact, limits: Limits | None = None, *, device: str = "cpu"
) -> Comparison:
    """Compare every parameter of `artifact` with the tensor of the same name in `reference`."""
    limits = limits or Limits()
    pairing = smoothing.undo(pair_tensors(artifact, reference), device)
    rows = [_judge(_measure(pair.tensor, pair.reference, device), pair.tensor, limits) for pair in pairing.pairs]
    findings = list(pairing.findings)
    findings += [Finding("fidelity", "error", row.name, fault) for row in rows for fault in row.faults]
    quantized = [row for row in rows if row.scheme != "plain"]
    if not quantized:
        what = "nothing was compared" if not rows else "no quantized tensor was compared"
        findings.append(Finding("vacuous", "error", None, f"{what} (a check that compared nothing has failed)"))
    total = sqnr_db(sum(row.signal for row in quantized), sum(row.noise for row in quantized)) if quantized else None
    rows.sort(key=_margin)
    findings += _diagnoses([row.name for row in rows if row.faults][:WORST], pairing.pairs, device)
    return Comparison(tuple(rows), tuple(findings), total)


def _diagnoses(names: list[str], pairs: Iterable[Pair], device: str) -> Iterator[Finding]:
    """What is likely wrong with the worst tensors, as notes."""
    from pytest_quantcheck.checks.diagnosis import diagnose

    by_name = {pair.tensor.name: pair for pair in pairs}
    for name in names:
        found = diagnose(by_name[name].tensor, by_name[name].reference, device=device)
        if found is not None:
            yield Finding("diagnosis", "note", name, f"likely {found}")


def check_fidelity(comparison: Comparison) -> Verdict:
    """Turn a comparison into a verdict: worst tensors first."""
    errors = [finding for finding in comparison.findings if finding.severity == "error"]
    likely = [finding for finding in comparison.findings if finding.check == "diagnosis"]
    total = "" if comparison.sqnr_db is None else f", {comparison.sqnr_db:.2f} dB over the quantized values"
    wrong = {finding.tensor for finding in errors if finding.tensor}
    headline = f"fidelity: {counted(len(comparison.tensors), 'tensor')} compared{total}, {len(wrong):,} wrong"
    by_tensor: dict[str | None, list[str]] = {}
    for finding in (*errors, *likely):
        by_tensor.setdefault(finding.tensor, []).append(finding.message)
    order = {row.name: at for at, row in enumerate(comparison.tensors)}
    names = sorted(by_tensor, key=lambda name: order.get(name or "", -1))
    lines = [f"{name + ': ' if name else ''}{'; '.join(by_tensor[name])}" for name in names]
    return Verdict("dequant-fidelity", not errors, headline, tuple(worst(lines)), comparison.findings)


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


def _measure(tensor: LogicalTensor, other: LogicalTensor, device: str) -> Fidelity:
    """Stream both sides and add up; windows end where blocks end."""
    sums = _Sums(tensor.block or DEFAULT_BLOCK)
    step = _rows_per_window(tensor, sums.block)
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        reference = other.decode(start, stop, device)
        sums.add(tensor.decode(start, stop, device).reshape(-1), reference.reshape(-1))
    return sums.result(tensor)


def _rows_per_window(tensor: LogicalTensor, block: int) -> int:
    aligned = block // math.gcd(max(1, tensor.columns), block)
    return max(1, WINDOW // max(1, tensor.columns) // aligned) * aligned


class _Sums:
    """Running sums of one tensor, in float64."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.count = 0
        self.signal = self.noise = self.cross = self.mean = self.drift = 0.0
        self.max_error = 0.0
        self.min_block = math.inf

    def add(self, decoded: torch.Tensor, reference: torch.Tensor) -> None:
        import torch

        if not decoded.numel():
            return
        error = decoded - reference
        signal, noise = (_block_energy(values, self.block) for values in (reference, error))
        self.count += decoded.numel()
        self.signal += float(signal.sum())
        self.noise += float(noise.sum())
        self.cross += float(_block_sums(reference * decoded, self.block).sum())
        self.mean += float(_block_sums(reference, self.block).sum())
        self.drift += float(_block_sums(error, self.block).sum())
        # max() of Python drops NaN on one side; torch keeps it.
        self.max_error = float(torch.maximum(error.abs().max().double().cpu(), torch.tensor(self.max_error).double()))
        ratios = signal[noise > 0] / noise[noise > 0]
        if ratios.numel():
            self.min_block = min(self.min_block, float(ratios.min()))

    def result(self, tensor: LogicalTensor) -> Fidelity:
        mean = self.mean / self.count if self.count else 0.0
        sigma = math.sqrt(max(0.0, self.signal / self.count - mean * mean)) if self.count else 0.0
        drift = self.drift / self.count if self.count else 0.0
        return Fidelity(
            tensor.name,
            tensor.scheme,
            tensor.shape,
            self.signal,
            self.noise,
            gain=self.cross / self.signal if self.signal else 1.0,
            bias=drift / sigma if sigma else drift,
            max_error=self.max_error,
            min_block_sqnr_db=sqnr_db(self.min_block, 1.0) if math.isfinite(self.min_block) else self.min_block,
            expected_sqnr_db=tensor.floor_db,
        )


def _block_sums(values: torch.Tensor, block: int) -> torch.Tensor:
    """Sums over blocks, as float64: short sums in float32, the long one exact enough.

    values  # (n,) float32
    ->      # (ceil(n / block),) float64
    """
    import torch

    whole = len(values) // block * block
    sums = values[:whole].view(-1, block).sum(dim=1).double()
    return sums if whole == len(values) else torch.cat((sums, values[whole:].sum().double().view(1)))


def _block_energy(values: torch.Tensor, block: int) -> torch.Tensor:
    return _block_sums(values * values, block)


def _judge(row: Fidelity, tensor: LogicalTensor, limits: Limits) -> Fidelity:
    """Add what was expected and every limit that is broken."""
    expected = row.expected_sqnr_db if limits.min_sqnr_db == "auto" else limits.min_sqnr_db
    faults = []
    if expected is None:
        faults.append(f"no SQNR is known to expect of {row.scheme}: give min_sqnr_db")
    elif not row.sqnr_db >= expected:
        block = f" (block {tensor.block})" if tensor.block else ""
        faults.append(f"SQNR {row.sqnr_db:.1f} dB is under {expected:.1f} dB expected for {row.scheme}{block}")
    allowed = _allowed_gain(tensor) if limits.gain == "auto" else limits.gain
    if not abs(row.gain - 1) <= allowed:
        faults.append(f"gain {row.gain:.3f} is off 1 by more than {allowed:.2g}: scales are wrong")
    if not abs(row.bias) <= limits.bias:
        faults.append(f"bias {row.bias:+.3f} sigma is over {limits.bias:g}: zero points are wrong")
    floor = _block_floor(tensor, limits)
    if floor is not None and not row.min_block_sqnr_db >= floor:
        faults.append(
            f"worst block has {row.min_block_sqnr_db:.1f} dB, under {floor:.1f} dB: a block is dead or corrupt"
        )
    if limits.max_error is not None and not row.max_error <= limits.max_error:
        faults.append(f"maximum error {row.max_error:.3g} is over {limits.max_error:g}")
    return row._replace(expected_sqnr_db=expected, faults=tuple(faults))


def _block_floor(tensor: LogicalTensor, limits: Limits) -> float | None:
    if limits.min_block_sqnr_db != "auto":
        return limits.min_block_sqnr_db
    return MIN_BLOCK_DB if tensor.block and (tensor.floor_db or 0) >= MIN_BLOCK_FROM_DB else None


def _allowed_gain(tensor: LogicalTensor) -> float:
    """Levels at the means of what they stand for shrink the whole by the share of the noise."""
    return max(GAIN, 1.5 * 10 ** (-tensor.floor_db / 10)) if tensor.floor_db else GAIN


def _margin(row: Fidelity) -> tuple[bool, float]:
    """Faulty rows first, then by how little they are above what was expected."""
    distance = row.sqnr_db - (row.expected_sqnr_db or 0.0)
    return not row.faults, -math.inf if math.isnan(distance) else distance
