"""Applies fixes to a text. libcst says where and what; everything between the edits keeps its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantcheck_lint.finding import CannotRead, Edit, Finding
from quantcheck_lint.structure import Structure


def fixed(text: str, findings: Sequence[Finding], newline: str) -> tuple[str, list[Finding]]:
    """`text` with the fixes of `findings`, and those that were applied. Fixes that overlap wait for the next round."""
    chosen = _without_overlap(findings)
    names = sorted({name for _, imports in map(_parts, chosen) for name in imports})
    edits = [edit for one, _ in map(_parts, chosen) for edit in one]
    if names:
        from quantcheck_lint.imports import NameTaken, import_edits

        try:
            edits += import_edits(text, names, newline, before=min(edit.line for edit in edits))
        except NameTaken:
            # Another thing of that name lives in this module: what needs the import stays as it is.
            return fixed(text, [finding for finding in chosen if not _parts(finding)[1]], newline)
    return (apply(text, edits), chosen) if edits else (text, [])


def _parts(finding: Finding) -> tuple[tuple[Edit, ...], tuple[str, ...]]:
    return (finding.fix.edits, finding.fix.imports) if finding.fix else ((), ())


def _without_overlap(findings: Sequence[Finding]) -> list[Finding]:
    """From top to bottom, what begins behind the end of what was chosen before."""
    chosen: list[Finding] = []
    end = (0, 0)
    for finding in findings:
        edits = _parts(finding)[0]
        if edits and min((edit.line, edit.column) for edit in edits) >= end:
            chosen.append(finding)
            end = max((edit.end_line, edit.end_column) for edit in edits)
    return chosen


def apply(text: str, edits: Iterable[Edit]) -> str:
    """`text` with every edit made; edits don't overlap."""
    starts = Structure(text).starts
    parts: list[str] = []
    at = 0
    for edit in sorted(edits):
        parts += [text[at : starts[edit.line - 1] + edit.column], edit.text]
        at = starts[edit.end_line - 1] + edit.end_column
    return "".join([*parts, text[at:]])


def require_parsable(text: str, otherwise: str) -> None:
    """`CannotRead` unless libcst parses `text`: what it cannot read is not edited, what a fix breaks not written."""
    import libcst as cst

    try:
        cst.parse_module(text)
    except cst.ParserSyntaxError as error:
        raise CannotRead(otherwise, "fix", error.raw_line) from None
