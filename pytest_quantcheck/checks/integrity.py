"""Is the checkpoint whole: values are finite, nothing is stored twice, nothing is dead.

That header, file and index agree is the container's business: it refuses what does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted, format_size
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

SAMPLE = 4096
CHUNK = 8 << 20
DUPLICATE_MIN = 1 << 16


def check_intact(artifact: Artifact, *, values: bool = True, allow: Sequence[str] = ()) -> Verdict:
    """Require an artifact without errors or warnings; `allow` names findings that may stay.

    With `values`, every scale and every plain weight is read: all must be finite, and no two large tensors may hold
    the same bytes. That needs torch.
    """
    findings = list(artifact.findings)
    if not artifact.parameters:
        findings.append(Finding("no-parameters", "error", None, "holds no parameter at all"))
    if values:
        findings += [*_not_finite(artifact), *_duplicates(artifact)]
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


def _duplicates(artifact: Artifact) -> Iterator[Finding]:
    """Tensors of one size whose bytes are the same; what is only equal in its first bytes is hashed whole."""
    if artifact.container == "live":
        return
    candidates = [t for t in artifact.parameters if t.stored.nbytes >= DUPLICATE_MIN]
    for group in _groups(candidates, lambda stored: (stored.dtype, stored.nbytes)):
        for sampled in _groups(group, lambda stored: bytes(_chunk(stored, 0, SAMPLE))):
            for same in _groups(sampled, _digest):
                first, *copies = same
                for copy in copies:
                    if _is_constant(copy.stored):
                        continue  # freshly initialised norms and biases are all alike
                    what = f"holds the same bytes as `{first.name}`: {format_size(copy.nbytes)} could be saved"
                    yield Finding("duplicate-tensor", "warning", copy.name, what)


def _groups(tensors: Iterable[LogicalTensor], key: Callable[[StoredTensor], object]) -> Iterator[list[LogicalTensor]]:
    groups: dict[object, list[LogicalTensor]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor.stored), []).append(tensor)
    return (group for group in groups.values() if len(group) > 1)


def _chunk(stored: StoredTensor, start: int, stop: int) -> bytearray:
    return stored.source.read(stored.offset + start, stored.offset + min(stop, stored.nbytes))


def _digest(stored: StoredTensor) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, stored.nbytes, CHUNK):
        digest.update(_chunk(stored, start, start + CHUNK))
    return digest.digest()


def _is_constant(stored: StoredTensor) -> bool:
    width = max(1, DTYPES[stored.dtype].bits // 8)
    chunk = _chunk(stored, 0, SAMPLE)
    return chunk == chunk[:width] * (len(chunk) // width)
