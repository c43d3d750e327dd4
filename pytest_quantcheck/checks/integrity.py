"""Is the checkpoint whole: values are finite, scales and zero points can be, nothing is stored twice, nothing is dead.

    non-finite         a scale, a zero point or a plain weight that is NaN or infinite
    dead-scale         a scale of zero, or so small that it might be, over codes that say something
    zero-point-range   a zero point that no code of this width can reach

That header, file and index agree is the container's business: it refuses what does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted, format_size
from pytest_quantcheck.schemes import rewritten
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

SAMPLE = 4096
CHUNK = 8 << 20
DUPLICATE_MIN = 1 << 16
VANISHED = 1e-20


def check_intact(artifact: Artifact, *, values: bool = True, allow: Sequence[str] = ()) -> Verdict:
    """Require an artifact without errors or warnings; `allow` names findings that may stay.

    With `values`, every scale and every plain weight is read: all must be finite, no scale may be zero over codes that
    are not, zero points must be in reach, and no two large tensors may hold the same bytes. That needs torch.
    """
    findings = list(artifact.findings)
    if not artifact.parameters:
        findings.append(Finding("no-parameters", "error", None, "holds no parameter at all"))
    if values:
        findings += [*_not_finite(artifact), *_dead_scales(artifact), *_zero_points(artifact), *_duplicates(artifact)]
    serious = [finding for finding in findings if finding.severity != "note" and finding.check not in allow]
    size = f"{counted(len(artifact.tensors), 'tensor')}, {format_size(artifact.file_bytes)}"
    headline = f"integrity: {size}, {counted(len(serious), 'finding')}"
    lines = [_line(finding) for finding in sorted(serious, key=lambda finding: finding.severity)]
    return Verdict("checkpoint-intact", not serious, headline, tuple(worst(lines)), tuple(findings))


def _line(finding: Finding) -> str:
    where = f"{finding.tensor}: " if finding.tensor else ""
    return f"{finding.severity}: {where}{finding.message} [{finding.check}]"


def _not_finite(artifact: Artifact) -> Iterator[Finding]:
    for tensor in artifact.tensors:
        if any(part.between for part in tensor.parts):
            yield from _bad_decoded(tensor)
        for part in tensor.parts:
            if _holds_numbers(tensor, part):
                yield from _bad_values(tensor, part)


def _bad_decoded(tensor: LogicalTensor) -> Iterator[Finding]:
    """Scales that are written between the codes are seen by what they make of them."""
    import torch

    bad = 0
    try:
        for start, stop in tensor.windows():
            bad += int((~torch.isfinite(tensor.decode(start, stop))).sum())
    except NotDecodable as error:
        yield Finding("not-checked", "note", tensor.stored.name, f"its scales were not looked at: {error.what}")
        return
    if bad:
        what = f"{bad:,} of {tensor.params:,} values are NaN or infinite once decoded"
        yield Finding("non-finite", "error", tensor.stored.name, what)


def _holds_numbers(tensor: LogicalTensor, part: Part) -> bool:
    if DTYPES[part.stored.dtype].torch is None or not part.stored.elements:
        return False
    floating = DTYPES[part.stored.dtype].kind == "float"
    return floating and (part.kind in ("scales", "zero_points", "codebooks") or not tensor.quantized)


def _bad_values(tensor: LogicalTensor, part: Part) -> Iterator[Finding]:
    import torch

    bad = 0
    for start in range(0, part.stored.elements, CHUNK):
        values = part.stored.load(start, min(start + CHUNK, part.stored.elements))
        bad += int((~torch.isfinite(values.to(torch.float32))).sum())
    # A causal mask is full of -inf; a buffer is nobody's weight.
    if bad and tensor.role != "buffer":
        what = f"{bad:,} of {part.stored.elements:,} values are NaN or infinite"
        yield Finding("non-finite", "error", part.stored.name, what)


def _dead_scales(artifact: Artifact) -> Iterator[Finding]:
    """Scales that make nothing of codes which are something: a block of zeros may have a scale of zero."""
    for tensor in artifact.tensors:
        for part in tensor.parts:
            if part.kind == "scales" and _holds_numbers(tensor, part) and _any_vanishing(part.stored):
                yield from _silenced(tensor, part)


def _any_vanishing(stored: StoredTensor) -> bool:
    return any(
        bool(rewritten.vanishing(stored.load(start, min(start + CHUNK, stored.elements))).any())
        for start in range(0, stored.elements, CHUNK)
    )


def _silenced(tensor: LogicalTensor, part: Part) -> Iterator[Finding]:
    """The values that would be there if vanishing scales were 1."""
    dtype = part.stored.dtype
    change = partial(rewritten.revive, dtype=dtype)
    revived = rewritten.part(tensor, part.name, change, unit=DTYPES[dtype].bits // 8)
    dead = 0
    try:
        for start, stop in tensor.windows():
            there, here = revived.decode(start, stop), tensor.decode(start, stop)
            silent = here.abs() <= VANISHED * there.abs()
            if ((there != here) & ~silent).any():
                return  # zero points are in there too: this zero is one of theirs
            dead += int((silent & (there != 0)).sum())
    except NotDecodable as error:
        yield Finding("not-checked", "note", part.stored.name, f"what its zeros do was not looked at: {error.what}")
        return
    if dead:
        what = f"is zero, or as good as zero, over {dead:,} values whose codes are not"
        yield Finding("dead-scale", "error", part.stored.name, what)


def _zero_points(artifact: Artifact) -> Iterator[Finding]:
    """Zero points that are kept in wider integers than the codes."""
    for tensor in artifact.tensors:
        bits = round(tensor.stored.value_bytes * 8 / tensor.params) if tensor.params else 0
        for part in tensor.parts:
            wide = DTYPES[part.stored.dtype].kind == "int" and DTYPES[part.stored.dtype].bits > bits
            if part.kind == "zero_points" and wide and part.stored.elements == _scales(tensor):
                yield from _out_of_reach(part.stored, bits)


def _scales(tensor: LogicalTensor) -> int:
    """How many scales there are: as many zero points take an integer each, fewer are packed or of an outer level."""
    return max((part.stored.elements for part in tensor.parts if part.kind == "scales"), default=0)


def _out_of_reach(stored: StoredTensor, bits: int) -> Iterator[Finding]:
    low, high, far = -(1 << bits - 1), (1 << bits) - 1, 0
    for start in range(0, stored.elements, CHUNK):
        values = stored.load(start, min(start + CHUNK, stored.elements)).long()
        far += int(((values < low) | (values > high)).sum())
    if far:
        what = f"{far:,} of {stored.elements:,} zero points are out of reach of {bits}-bit codes ({low} to {high})"
        yield Finding("zero-point-range", "error", stored.name, what)


def _duplicates(artifact: Artifact) -> Iterator[Finding]:
    for first, copy in repeated(artifact):
        what = f"holds the same bytes as `{first.name}`: {format_size(copy.nbytes)} could be saved"
        yield Finding("duplicate-tensor", "warning", copy.name, what)


def repeated(artifact: Artifact) -> Iterator[tuple[LogicalTensor, LogicalTensor]]:
    """Yield each large tensor whose bytes another holds before it, as (first, copy); nothing for a live model.

    What is equal in size and in its first bytes is hashed whole.
    """
    if artifact.container == "live":
        return
    candidates = [t for t in artifact.parameters if t.stored.nbytes >= DUPLICATE_MIN]
    for group in _groups(candidates, lambda tensor: (tensor.shape, tensor.stored.dtype, tensor.nbytes)):
        for sampled in _groups(group, lambda tensor: bytes(_chunk(tensor.stored, 0, SAMPLE))):
            if _is_constant(sampled[0].stored):
                continue  # freshly initialised norms and biases are all alike
            for first, *copies in _groups(sampled, _digest):
                for copy in copies:
                    yield first, copy


def _groups(tensors: Iterable[LogicalTensor], key: Callable[[LogicalTensor], object]) -> Iterator[list[LogicalTensor]]:
    groups: dict[object, list[LogicalTensor]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return (group for group in groups.values() if len(group) > 1)


def _chunk(stored: StoredTensor, start: int, stop: int) -> bytearray:
    return stored.source.read(stored.offset + start, stored.offset + min(stop, stored.value_bytes))


def _digest(tensor: LogicalTensor) -> bytes:
    """A digest of all parts: equal codes with other scales are other values."""
    digest = hashlib.blake2b(digest_size=16)
    for part in tensor.parts:
        for start in range(0, part.stored.value_bytes, CHUNK):
            digest.update(_chunk(part.stored, start, start + CHUNK))
    return digest.digest()


def _is_constant(stored: StoredTensor) -> bool:
    width = max(1, DTYPES[stored.dtype].bits // 8)
    chunk = _chunk(stored, 0, SAMPLE)
    return chunk == (chunk[:width] * -(-len(chunk) // width))[: len(chunk)]
