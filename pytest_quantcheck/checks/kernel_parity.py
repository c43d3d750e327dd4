"""What the library computes of each layer at run time, against our decode of the same bytes.

    error    |library - stored|, per value
    allowed  4 roundings of the library's precision at the largest magnitude of the block: 2 eps max|stored|
    sqnr_db  10 log10( sum stored^2 / sum error^2 )

The precision is the coarsest of the decoded tensor and of the parts that are floats. `stored` is decoded in float32
from the codes, scales and tables that the layer holds, so a difference is not quantization noise: the library does not
compute what was stored. Every quantized layer has to be compared, or to be left out by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks import kernels
from pytest_quantcheck.checks.coverage import matches
from pytest_quantcheck.checks.fidelity import sqnr_db
from pytest_quantcheck.checks.kernels import Layer
from pytest_quantcheck.checks.pairing import Pairing, pair
from pytest_quantcheck.checks.verdict import WORST, Verdict
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.quantities import counted, format_shape
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

CHECK = "kernel-parity"
ROUNDINGS = 4  # of the code or the table, of the scale, of the zero point, of the product
WINDOW = 1 << 20


class Wrong(NamedTuple):
    """The blocks in which the library's values are not the stored ones, and the first such value."""

    blocks: int
    of_blocks: int
    width: int
    at: tuple[int, int]  # row and column
    library: float
    stored: float


class Parity(NamedTuple):
    """One layer: how far the library's values are from the stored ones, and both from the reference if there is one."""

    name: str
    scheme: str
    shape: tuple[int, ...]
    block: int | None
    sqnr_db: float
    wrong: Wrong | None
    stored_sqnr_db: float | None
    library_sqnr_db: float | None
    library: str  # package and version
    place: str
    call: str
    script: str | None


class Parities(NamedTuple):
    """All layers that were compared, worst first, and why others could not be."""

    layers: tuple[Parity, ...]
    failures: tuple[tuple[str, str], ...]


def compare(
    layers: Iterable[Layer], artifact: Artifact, reference: Artifact | None = None, *, skip: Sequence[str] = ()
) -> Parities:
    """Compare every quantized layer of an artifact that no pattern of `skip` matches; `layers` are those known."""
    wanted = {
        tensor.name: tensor
        for tensor in artifact.tensors
        if tensor.quantized and not any(matches(tensor.name, pattern) for pattern in skip)
    }
    pairing = None if reference is None else pair(artifact, reference)
    rows, failures = [], []
    for layer in layers:
        if wanted.pop(layer.tensor.name, None) is None:
            continue
        try:
            rows.append(_parity(layer, _counterpart(layer.tensor, pairing)))
        except FormatError as error:
            failures.append((layer.tensor.name, error.what))
        except Exception as error:  # whatever a library raises is its answer
            what = f"{layer.package} cannot decode it here: {type(error).__name__}: {error}".splitlines()[0]
            failures.append((layer.tensor.name, what))
    failures += [(name, "no library is known to decode it: hold its forward to it, and skip it") for name in wanted]
    rows.sort(key=lambda row: (row.wrong is None, row.sqnr_db))
    return Parities(tuple(rows), tuple(failures))


def check_kernel_parity(parities: Parities) -> Verdict:
    """Turn a comparison into a verdict; the worst layer comes with all that a bug report needs."""
    wrong = [row for row in parities.layers if row.wrong is not None]
    where = f" on {parities.layers[0].place}" if parities.layers else ""
    compared = counted(len(parities.layers), "layer")
    headline = f"kernel parity: {compared} compared{where}, {len(wrong):,} computed from other values than are stored"
    lines = [line for row in wrong[:WORST] for line in _lines(row)]
    if len(wrong) > WORST:
        lines.append(f"... and {len(wrong) - WORST:,} more")
    lines += [f"{name}: {why}" for name, why in parities.failures[:WORST]]
    if wrong and wrong[0].script:
        lines += ["reproduce:", *(f"  {line}" for line in wrong[0].script.splitlines())]
    if not parities.layers and not parities.failures:
        lines.append("no quantized layer was compared (a check that compared nothing has failed)")
    return Verdict(CHECK, not lines, headline, tuple(lines))


def _lines(row: Parity) -> Iterator[str]:
    wrong = row.wrong
    assert wrong is not None
    block = f", block {row.block}" if row.block else ""
    yield (
        f"{row.name}: {row.library} decodes {row.scheme} {format_shape(row.shape)}{block} on {row.place} "
        f"to values that are {row.sqnr_db:.1f} dB from the stored ones"
    )
    row_at, column = wrong.at
    yield (
        f"  {wrong.blocks:,} of {wrong.of_blocks:,} blocks of {wrong.width} differ, the first at row {row_at:,}, "
        f"column {column:,}: {wrong.library:.6g} where {wrong.stored:.6g} is stored"
    )
    if row.stored_sqnr_db is not None and row.library_sqnr_db is not None:
        kept = f"{row.stored_sqnr_db:.1f} dB are stored, {row.library_sqnr_db:.1f} dB are computed"
        yield f"  against the reference: {kept}"
    yield f"  compare `{row.call}` with `inspect(model).tensor({row.name!r}).decode()`"


def _counterpart(tensor: LogicalTensor, pairing: Pairing | None) -> LogicalTensor | None:
    if pairing is None:
        return None
    for own, reference in pairing.pairs:
        if own.name == tensor.name:
            return reference
    raise FormatError(
        next((found.message for found in pairing.findings if found.tensor == tensor.name), "is not compared")
    )


def _parity(layer: Layer, reference: LogicalTensor | None) -> Parity:
    import torch

    tensor = layer.tensor
    with torch.inference_mode():
        theirs = layer.kernel.dequantize(layer.owner)
    if theirs is None:
        raise FormatError("no library is known to decode it: hold its forward to it, and skip it")
    if theirs.numel() != tensor.params:
        raise FormatError(f"{layer.package} decodes it to {list(theirs.shape)}, it is {list(tensor.shape)}")
    device = str(theirs.device)
    # The coarsest precision that the decode can have: of its result and of the floats it starts from.
    epsilon = max(torch.finfo(dtype).eps for dtype in (theirs.dtype, *kernels.precisions(tensor)))
    sums = _Sums(tensor, epsilon)
    library = theirs.reshape(tensor.rows, tensor.columns)
    for start, stop in _windows(tensor, sums.width):
        stored = tensor.decode(start, stop, device)
        sums.add(start, library[start:stop].float(), stored)
        if reference is not None:
            sums.add_reference(library[start:stop].float(), stored, reference.decode(start, stop, device))
    return sums.result(layer, theirs.device)


def _windows(tensor: LogicalTensor, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges that end where blocks end."""
    whole = width // math.gcd(max(1, tensor.columns), width)
    step = max(1, WINDOW // max(1, tensor.columns) // whole) * whole
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


class _Sums:
    """Running sums of one layer, in float64."""

    def __init__(self, tensor: LogicalTensor, epsilon: float) -> None:
        self.tensor = tensor
        self.width = tensor.block if tensor.block and tensor.block <= WINDOW else max(1, tensor.columns)
        self.allowed = ROUNDINGS * epsilon / 2
        self.signal = self.noise = 0.0
        self.truth = self.stored_noise = self.library_noise = 0.0
        self.compared_with_reference = False
        self.wrong_blocks = self.blocks = 0
        self.first: tuple[tuple[int, int], float, float] | None = None

    def add(self, start: int, library: torch.Tensor, stored: torch.Tensor) -> None:
        theirs, ours = (_in_blocks(values, self.width) for values in (library, stored))  # (blocks, width)
        error = (theirs - ours).abs()
        self.signal += _energy(ours)
        self.noise += _energy(error)
        # NaN on both sides is no difference, on one side it is.
        wrong = ~(error <= self.allowed * ours.abs().amax(dim=1, keepdim=True)) & ~(theirs.isnan() & ours.isnan())
        wrong &= theirs != ours  # infinities that agree
        self.blocks += len(ours)
        count = int(wrong.any(dim=1).sum())
        self.wrong_blocks += count
        if count and self.first is None:
            at = int(wrong.view(-1).nonzero()[0])
            where = divmod(start * self.tensor.columns + at, self.tensor.columns)
            self.first = where, float(theirs.view(-1)[at]), float(ours.view(-1)[at])

    def add_reference(self, library: torch.Tensor, stored: torch.Tensor, truth: torch.Tensor) -> None:
        self.compared_with_reference = True
        self.truth += _energy(truth)
        self.stored_noise += _energy(stored - truth)
        self.library_noise += _energy(library - truth)

    def result(self, layer: Layer, device: torch.device) -> Parity:
        tensor, wrong = layer.tensor, None
        if self.first is not None:
            wrong = Wrong(self.wrong_blocks, self.blocks, self.width, *self.first)
        kept = (self.stored_noise, self.library_noise) if self.compared_with_reference else None
        script = layer.kernel.reproduce
        return Parity(
            tensor.name,
            tensor.scheme,
            tensor.shape,
            tensor.block,
            sqnr_db(self.signal, self.noise),
            wrong,
            None if kept is None else sqnr_db(self.truth, kept[0]),
            None if kept is None else sqnr_db(self.truth, kept[1]),
            kernels.version(layer.package) if wrong else layer.package,
            kernels.place(device),
            layer.kernel.call,
            script(tensor, str(device)) if wrong and script else None,
        )


def _in_blocks(values: torch.Tensor, width: int) -> torch.Tensor:
    """The values, a block to a row; the last block is filled up with zeros."""
    import torch

    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, width)


def _energy(values: torch.Tensor) -> float:
    return float((values * values).sum(dim=-1).double().sum())
