"""Two artifacts hold the same weights: every part of every tensor, bit for bit.

    names      the same on both sides, or known to be one another's (`pairing`); buffers that are not saved, and copies
               that nobody uses, only where both are live
    fused      plain tensors that are one stack on one side and many on the other: the values, bit for bit
    tensor     the same scheme, the same logical shape, the same role
    part       the same dtype, the same number of bytes, the same bytes: codes, scales, zero points, codebooks, indices

What a format says beside its tensors (a block size, an offset) is a record of its own wording on each side, so it is
held to what it does: where the two layouts differ, the decoded values have to be equal bit for bit. The same holds for
codes that are packed otherwise in memory than on disk. Bytes are read in windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

from pytest_quantcheck import dtypes
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.coverage import matches
from pytest_quantcheck.checks.pairing import Pairing
from pytest_quantcheck.checks.pairing import pair as pair_tensors
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.checks.views import is_view
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.finding import Finding, Severity
from pytest_quantcheck.quantities import counted, format_shape
from pytest_quantcheck.tensor import COUNTED, LogicalTensor, Part, StoredTensor

WINDOW = 4 << 20
CHECK = "same-weights"
EXACT = frozenset({"F32", "F16", "BF16"})  # what float32 holds to the bit


class _Pair(NamedTuple):
    """The two sides of one name, and whether both are of one container."""

    one: LogicalTensor
    other: LogicalTensor
    alike: bool


def check_same_weights(one: Artifact, other: Artifact, *, skip: Sequence[str] = ()) -> Verdict:
    """Require every tensor to be on both sides and bit-equal; `skip` are patterns of tensors that are left out."""
    findings: list[Finding] = []
    alike = one.container == other.container
    here, there = _by_name(one), _by_name(other)
    pairs = [_Pair(tensor, there[tensor.name], alike) for tensor in _selected(one, skip) if tensor.name in there]
    alone = (
        replace(one, tensors=tuple(tensor for tensor in _selected(one, skip) if tensor.name not in there)),
        replace(other, tensors=tuple(tensor for tensor in _selected(other, skip) if tensor.name not in here)),
    )
    renamed = pair_tensors(*alone)
    pairs += [_Pair(tensor, match, alike) for tensor, match in renamed.pairs]
    findings += _unmatched(alone, renamed, alike=alike)
    for pair in pairs:
        findings += _compare(pair)
    if not any(pair.one.role != "buffer" and pair.one.params for pair in pairs):
        what = "no weight was compared (a check that compared nothing has failed)"
        findings.append(Finding(CHECK, "error", None, what))
    return _verdict(one, other, len(pairs), findings)


def _verdict(one: Artifact, other: Artifact, compared: int, findings: list[Finding]) -> Verdict:
    errors = [finding for finding in findings if finding.severity == "error"]
    wrong = len({finding.tensor for finding in errors if finding.tensor})
    sources = f"`{one.source}` and `{other.source}`"
    headline = f"same weights: {counted(compared, 'tensor')} of {sources} compared, {wrong:,} wrong"
    lines = [f"{finding.tensor + ': ' if finding.tensor else ''}{finding.message}" for finding in errors]
    return Verdict(CHECK, not errors, headline, tuple(worst(lines)), tuple(findings))


def _by_name(artifact: Artifact) -> dict[str, LogicalTensor]:
    """The tensors by name, those that are tied to another under their own names too."""
    tensors = {tensor.name: tensor for tensor in artifact.tensors}
    return {alias: tensors[first] for alias, first in artifact.aliases.items() if first in tensors} | tensors


def _selected(artifact: Artifact, skip: Sequence[str]) -> Iterator[LogicalTensor]:
    return (tensor for tensor in artifact.tensors if not any(matches(tensor.name, pattern) for pattern in skip))


def _unmatched(alone: tuple[Artifact, Artifact], renamed: Pairing, *, alike: bool) -> Iterator[Finding]:
    """What no name of the other side stands for, and what is of another shape there."""
    shapes = {finding.tensor: finding for finding in renamed.findings if finding.check == "shape"}
    for finding in shapes.values():
        yield finding._replace(check=CHECK)
    missing = {finding.tensor for finding in renamed.findings} - shapes.keys()
    compared = {tensor.name for tensor, _ in renamed.pairs}
    for artifact, side in zip(alone, ("first", "second"), strict=True):
        for tensor in artifact.tensors:
            if tensor.name in missing or (tensor.role not in COUNTED and tensor.name not in compared):
                yield _alone(tensor, side, alike=alike)


def _alone(tensor: LogicalTensor, side: str, *, alike: bool) -> Finding:
    """A file has no buffers that are not saved, and no copies that PEFT keeps aside."""
    optional = tensor.role in ("buffer", "shadow", "tied") and not alike
    severity: Severity = "note" if optional else "error"
    what = f"{tensor.scheme} {format_shape(tensor.shape)} is on the {side} side only"
    return Finding(CHECK, severity, tensor.name, what)


def _compare(pair: _Pair) -> Iterator[Finding]:
    """Yield what differs; what cannot be read is not the same."""
    try:
        for fault in _differences(pair):
            yield Finding(CHECK, "error", pair.one.name, fault)
    except FormatError as error:
        yield Finding(CHECK, "error", pair.one.name, f"cannot be compared: {error.what}")


def _differences(pair: _Pair) -> Iterator[str]:
    one, other = pair.one, pair.other
    if is_view(other):
        yield from _fused_differences(one, other)
        return
    if one.scheme != other.scheme:
        yield f"is {one.scheme} on one side, {other.scheme} on the other"
        return
    if one.shape != other.shape:
        yield f"is {format_shape(one.shape)} on one side, {format_shape(other.shape)} on the other"
        return
    if pair.alike and one.role != other.role:
        yield f"is a {one.role} on one side, a {other.role} on the other"
    codes = list(_part_differences(one.parts[0], other.parts[0]))
    rest = list(_rest(pair))
    if one.layout == other.layout:
        yield from (*codes, *rest)
        return
    # Codes that differ under another layout may be the same codes packed otherwise.
    if not codes:
        yield from rest
    values = _value_differences(one, other)
    if values:
        yield f"{_layouts(one.layout, other.layout)}, and {values}"
        yield from (*codes, *rest) if codes else ()


def _fused_differences(one: LogicalTensor, other: LogicalTensor) -> Iterator[str]:
    """What differs from a view of several tensors: their parts lie elsewhere, so the values are held to the bit."""
    written = {part.stored.dtype for part in (*one.parts, *other.parts)}
    if one.quantized or other.quantized or len(written) > 1 or not written <= EXACT:
        what = counted(len(other.parts), "part")
        yield f"is fused on one side only ({what} there): bit-equality is said of plain tensors of one dtype alone"
        return
    values = _value_differences(one, other)
    if values:
        yield values


def _rest(pair: _Pair) -> Iterator[str]:
    """What differs in all parts but the first, which holds the codes."""
    mine, theirs = (
        {part.name: part for part in tensor.parts[1:] if _counts(part, alike=pair.alike)}
        for tensor in (pair.one, pair.other)
    )
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in theirs or name not in mine:
            yield f"`{name}` is on the {'first' if name in mine else 'second'} side only"
        else:
            yield from _part_differences(mine[name], theirs[name])


def _counts(part: Part, *, alike: bool) -> bool:
    """Whether a part has to be there: records are worded by the container, and empty ones hold a place."""
    return bool(part.stored.elements) and (alike or part.kind != "bookkeeping")


def _part_differences(one: Part, other: Part) -> Iterator[str]:
    mine, theirs = one.stored, other.stored
    sizes = [dtypes.nbytes(stored.dtype, stored.elements) for stored in (mine, theirs)]
    if mine.dtype != theirs.dtype or sizes[0] != sizes[1]:
        yield f"`{one.name}` is {_stored(mine)} on one side, {_stored(theirs)} on the other"
        return
    different, first = 0, None
    for start in range(0, sizes[0], WINDOW):
        stop = min(start + WINDOW, sizes[0])
        ours, rest = _read(mine, start, stop), _read(theirs, start, stop)
        if ours != rest:
            count, at = _different_bytes(ours, rest)
            different += count
            first = first or (start + at, ours[at], rest[at])
    if first is not None:
        at, ours_at, theirs_at = first
        share = f"{different:,} of {sizes[0]:,} bytes differ"
        yield f"`{one.name}`: {share}, the first at byte {at:,} (0x{ours_at:02x} and 0x{theirs_at:02x})"


def _stored(stored: StoredTensor) -> str:
    return f"{stored.dtype} {list(stored.shape)}"


def _read(stored: StoredTensor, start: int, stop: int) -> bytearray:
    return stored.source.read(stored.offset + start, stored.offset + stop)


def _different_bytes(one: bytearray, other: bytearray) -> tuple[int, int]:
    """How many bytes differ, and where the first is."""
    import torch

    unequal = torch.frombuffer(one, dtype=torch.uint8) != torch.frombuffer(other, dtype=torch.uint8)
    return int(unequal.sum()), int(unequal.nonzero()[0])


def _layouts(one: Any, other: Any) -> str:
    """The fields in which two layouts differ."""
    fields = getattr(one, "_fields", ())
    if not fields or fields != getattr(other, "_fields", ()):
        return f"is laid out as {one} on one side, as {other} on the other"
    different = [
        f"{name} {mine} and {theirs}"
        for name, mine, theirs in zip_longest(fields, one or (), other or ())
        if mine != theirs
    ]
    return f"is laid out differently ({', '.join(different)})"


def _value_differences(one: LogicalTensor, other: LogicalTensor) -> str | None:
    """How far decoded values are apart, None where they are equal bit for bit."""
    import torch

    different, largest = 0, 0.0
    for start, stop in one.windows():
        mine, theirs = one.decode(start, stop), other.decode(start, stop)
        unequal = mine.view(torch.int32) != theirs.view(torch.int32)
        if unequal.any():
            different += int(unequal.sum())
            largest = max(largest, float((mine - theirs).abs().nan_to_num(nan=torch.inf).max()))
    if not different:
        return None
    return f"{different:,} of {one.params:,} decoded values differ, by at most {largest:.3g}"
