"""An artifact against the record of how it was: no tensor gone, none grown or worse beyond what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple

from pytest_quantcheck.checks.diff import Difference, Outline, TensorChange, difference
from pytest_quantcheck.checks.fidelity import Fidelity
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.quantities import counted, format_shape, format_size, parse_size

SQNR_DROP_DB = 0.1
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


class Growth(NamedTuple):
    """How much more is allowed: a share of what was, or a number of bytes."""

    share: Decimal = Decimal(0)
    bytes: int = 0

    def limit(self, old: int) -> int:
        """The most bytes allowed of what had `old`."""
        return old + int(old * self.share) + self.bytes

    def __str__(self) -> str:
        return f"{(100 * self.share).normalize():f}%" if self.share else format_size(self.bytes)


class Allowed(NamedTuple):
    """What may change: the bytes of the whole and of each tensor, and the SQNR of each tensor."""

    growth: Growth = Growth()
    sqnr_drop_db: float = SQNR_DROP_DB


class Record(NamedTuple):
    """What a baseline keeps of an artifact: who checks it, which version wrote the record, and how it was."""

    by: str  # the name of the configuration, or `test`
    version: str
    outline: Outline


def parse_growth(value: str | int) -> Growth:
    """Return an allowed growth: `2 %`, `10 MB`, or bytes.

    >>> parse_growth("2.5 %").limit(1000), parse_growth("1 kB").limit(1000)
    (1025, 2000)
    """
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match:
        return Growth(share=Decimal(match.group(1)) / 100)
    try:
        size = parse_size(value)
    except ValueError:
        raise ValueError(f"growth `{value}` is neither a share such as `2 %` nor a size such as `10 MB`") from None
    if size < 0:
        raise ValueError(f"growth of {size:,} bytes is negative")
    return Growth(bytes=size)


def with_fidelity(outline: Outline, rows: Sequence[Fidelity]) -> Outline:
    """Return an outline that knows the SQNR of its tensors, in hundredths of a dB; of none is a ValueError."""
    tensors = dict(outline.tensors)
    if not rows:
        raise ValueError("nothing was compared with the reference")
    for row in rows:
        tensors[row.name] = tensors[row.name]._replace(sqnr_db=round(row.sqnr_db, 2))
    return outline._replace(tensors=tensors)


def check_baseline(record: Record | None, outline: Outline, allowed: Allowed, *, where: str) -> Verdict:
    """Require an artifact to be what the record at `where` says, but for what is allowed."""
    if record is None:
        return Verdict("baseline", False, f"baseline: {where} has no record of it", ("record it with an update",))
    changed = difference(record.outline, outline)
    old, new, limit = changed.file_bytes.old, changed.file_bytes.new, allowed.growth.limit(changed.file_bytes.old)
    grown = list(_grown(changed, allowed.growth))
    wrong = [*grown, *_gone(record.outline, outline), *_worse(record.outline, outline, allowed.sqnr_drop_db)]
    share = f" ({changed.file_bytes.growth / old:+.1%})" if old else ""
    headline = (
        f"baseline: {format_size(new)} ({new:,} bytes), recorded {format_size(old)}{share}, "
        f"allowed growth {allowed.growth}, {counted(len(wrong), 'fault')} in {counted(len(outline.tensors), 'tensor')}"
    )
    passed = new <= limit and not wrong and bool(outline.tensors)
    grew = [] if passed else where_it_grew(changed)
    details = (*worst(wrong), *(grew[:1] if grown else grew))  # the tensors are named once
    return Verdict("baseline", passed, headline, details, (), new, limit, "bytes")


def where_it_grew(changed: Difference) -> list[str]:
    """Return what grew since the record, as lines: the byte classes, the three tensors that grew most, and the rest."""
    grown = [change for change in changed.tensors if change.growth > 0]
    lines = [f"  +{format_size(change.growth)}  {change.name}  {_became(change)}" for change in grown[:3]]
    if changed.outside.growth > 0:
        lines.append(f"  +{format_size(changed.outside.growth)}  outside of tensors: headers, padding, other files")
    classes = sorted(changed.classes.items(), key=lambda item: -item[1].growth)[:3]
    named = ", ".join(f"{kind} +{format_size(total.growth)}" for kind, total in classes if total.growth > 0)
    return [f"grown since the baseline: {named}".rstrip(), *lines] if lines else []


def _grown(changed: Difference, growth: Growth) -> Iterator[str]:
    for change in changed.tensors:
        over = change.new_bytes - growth.limit(change.old_bytes)
        if over > 0 and change.growth > 0:
            yield f"{change.name}: {_became(change)}, {format_size(over)} over what is allowed"


def _gone(old: Outline, new: Outline) -> Iterator[str]:
    for name, stored in old.tensors.items():
        now = new.tensors.get(name)
        if now is None:
            yield f"{name}: is gone ({format_shape(stored.shape)}, {stored.scheme})"
        elif now.shape != stored.shape:
            yield f"{name}: is {format_shape(now.shape)}, was {format_shape(stored.shape)}"


def _worse(old: Outline, new: Outline, allowed_db: float) -> Iterator[str]:
    for name, stored in old.tensors.items():
        now = new.tensors.get(name)
        if stored.sqnr_db is None or now is None or now.sqnr_db == stored.sqnr_db:
            continue
        if now.sqnr_db is None:
            yield f"{name}: had {stored.sqnr_db:.2f} dB, and is not compared with a reference now"
        elif not stored.sqnr_db - now.sqnr_db <= allowed_db:
            drop = stored.sqnr_db - now.sqnr_db
            yield (
                f"{name}: SQNR {now.sqnr_db:.2f} dB, was {stored.sqnr_db:.2f} dB: {drop:.2f} dB worse "
                f"(allowed {allowed_db:g})"
            )


def _became(change: TensorChange) -> str:
    if change.old_scheme is None:
        return f"new, {change.new_scheme} {format_size(change.new_bytes)}"
    scheme = "" if change.new_scheme == change.old_scheme else f"{change.new_scheme} "
    return f"{change.old_scheme} {format_size(change.old_bytes)} -> {scheme}{format_size(change.new_bytes)}"
