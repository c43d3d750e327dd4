"""Checks one source: bytes are filtered, the text is cut down to what matters, libcst decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantcheck_lint.finding import CannotRead, Edit, Finding, Fix
from quantcheck_lint.rules.rule import Detection, Rule
from quantcheck_lint.selection import select
from quantcheck_lint.source import Source
from quantcheck_lint.structure import DEEPEST, Excerpt, Structure

if TYPE_CHECKING:
    import libcst as cst

    from quantcheck_lint.analysis import Analysis

UNREADABLE = "QC900"
SHOWN_LINES = 6


@dataclass(frozen=True, slots=True)
class Checked:
    """The findings in one source, and what kept parts of it from being checked."""

    findings: tuple[Finding, ...] = ()
    unreadable: tuple[CannotRead, ...] = ()


def check(source: Source, rules: Sequence[Rule]) -> Checked:
    """Everything that `rules` object to in `source`."""
    structure = Structure(source.text)
    excerpt = select(structure, rules)
    if excerpt is None:
        return Checked()
    depth, offset = structure.deepest
    if depth > DEEPEST:
        raise CannotRead(f"brackets are nested {depth} deep", f"limit {DEEPEST}", structure.line_of(offset) + 1)
    return _analyse(source, structure, excerpt, rules)


def _analyse(source: Source, structure: Structure, excerpt: Excerpt, rules: Sequence[Rule]) -> Checked:
    from quantcheck_lint.parsing import parse

    findings: list[Finding] = []
    unreadable: list[CannotRead] = []
    for piece, analysis in parse(structure, excerpt, unreadable):
        for rule in rules:
            for detection in rule.check(analysis):
                findings.append(_finding(Context(source, structure, piece, analysis), rule, detection))
    return Checked(tuple(sorted(findings, key=lambda f: (f.line, f.column, f.code))), tuple(unreadable))


@dataclass(frozen=True, slots=True)
class Context:
    """What turns nodes of a piece into places of a source."""

    source: Source
    structure: Structure
    piece: Excerpt
    analysis: Analysis


def _finding(context: Context, rule: Rule, detection: Detection) -> Finding:
    structure, piece, analysis = context.structure, context.piece, context.analysis
    at = analysis.position(detection.node)
    first, last = piece.origin[at.start.line - 1], piece.origin[at.end.line - 1]
    statement = next((line for line in structure.lines if line.first <= first <= line.last), None)
    return Finding(
        path=context.source.path,
        line=first + 1,
        column=at.start.column + 1,
        end_line=last + 1,
        end_column=at.end.column + 1,
        code=rule.code,
        name=rule.name,
        severity=rule.severity,
        message=detection.message,
        suggestion=detection.suggestion,
        fix=_fix(piece, analysis, rule, detection),
        excerpt=tuple(
            structure.slice(line, line).rstrip("\r\n") for line in range(first, min(last, first + SHOWN_LINES - 1) + 1)
        ),
        span=(statement.first + 1, statement.last + 1) if statement else (first + 1, last + 1),
    )


def _fix(piece: Excerpt, analysis: Analysis, rule: Rule, detection: Detection) -> Fix | None:
    if not detection.replace:
        return None
    edits = tuple(_edit(piece, analysis, old, new) for old, new in detection.replace)
    return Fix(edits, detection.imports, safe=rule.fix == "safe")


def _edit(piece: Excerpt, analysis: Analysis, old: cst.CSTNode, new: cst.CSTNode) -> Edit:
    at = analysis.position(old)
    return Edit(
        piece.origin[at.start.line - 1] + 1,
        at.start.column,
        piece.origin[at.end.line - 1] + 1,
        at.end.column,
        analysis.module.code_for_node(new),
    )


def unreadable_finding(path: str, error: CannotRead) -> Finding:
    """QC900: what could not be checked, as a finding beside the others."""
    return Finding(
        path=path,
        line=error.line,
        column=error.column,
        end_line=error.line,
        end_column=error.column,
        code=UNREADABLE,
        name="cannot-parse",
        severity="error",
        message=f"cannot check: {error.what} ({error.rule})",
        span=(error.line, error.line),
    )


def relocated(finding: Finding, path: str) -> Finding:
    """The same finding under another path."""
    return replace(finding, path=path)
