"""Checks one source: the text is cut down to what matters, libcst decides, comments have the last word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcheck_lint import suppressions
from quantcheck_lint.finding import CannotRead, Edit, Finding, Fix
from quantcheck_lint.rules.rule import Detection, Rule
from quantcheck_lint.selection import promising, select
from quantcheck_lint.source import Source
from quantcheck_lint.structure import DEEPEST, Excerpt, Structure, risky

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


def lint(source: Source, rules: Sequence[Rule], wanted: Sequence[Rule], timeout: float) -> Checked:
    """Findings of the rules that are `wanted` here, less what comments hide, and the comments that hide nothing."""
    structure = Structure(source.text)  # computes nothing yet
    checked = check(source, wanted, timeout, structure=structure) if wanted else Checked()
    comments = suppressions.find(structure) if suppressions.may_matter(source.text, checked.findings) else []
    findings = suppressions.apply(checked.findings, comments)
    unused = next((rule for rule in rules if rule.code == suppressions.UNUSED), None)
    if unused is not None and not checked.unreadable:
        on = {rule.code for rule in rules}
        found = suppressions.unused(source.path, structure, comments, on, unused.name)
        findings += suppressions.apply(list(found), comments)
    return Checked(in_order(findings), checked.unreadable)


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings of one file from top to bottom."""
    return tuple(sorted(findings, key=lambda finding: (finding.cell or 0, finding.line, finding.column, finding.code)))


def check(
    source: Source,
    rules: Sequence[Rule],
    timeout: float = 10,
    *,
    apart: bool = False,
    structure: Structure | None = None,
) -> Checked:
    """Everything that `rules` object to in `source`; `apart` in the child process, where the parser may die."""
    rules = promising(source.text, rules)
    if not rules:
        return Checked()
    structure = structure or Structure(source.text)
    excerpt = select(structure, rules)
    if excerpt is None:
        return Checked()
    lines = [line for unit in excerpt.units for line in (*unit.headers, *unit.lines)]
    deepest = max(lines, key=lambda line: line.depth)
    if deepest.depth > DEEPEST:
        raise CannotRead(f"brackets are nested {deepest.depth} deep", f"limit {DEEPEST}", deepest.first + 1)
    codes = [rule.code for rule in rules]
    if not apart and risky(structure, lines):
        return _check_apart(source, codes, timeout)
    try:
        return _analyse(source, structure, excerpt, rules, apart=apart)
    except RecursionError:
        if apart:
            raise
        return _check_apart(source, codes, timeout)


def _check_apart(source: Source, codes: Sequence[str], timeout: float) -> Checked:
    from quantcheck_lint.isolation import check_apart  # rarely needed, and it imports a lot

    return check_apart(source, codes, timeout)


def _analyse(source: Source, structure: Structure, excerpt: Excerpt, rules: Sequence[Rule], *, apart: bool) -> Checked:
    from quantcheck_lint.parsing import parse  # libcst is not needed before this point

    piece, analysis, problem = parse(structure, excerpt, rules, apart=apart)
    context = Context(source, structure, piece, analysis)
    findings = [_finding(context, rule, detection) for rule in rules for detection in rule.check(analysis)]
    return Checked(in_order(findings), () if problem is None else (problem,))


@dataclass(frozen=True, slots=True)
class Context:
    """What turns nodes of a piece into places of a source."""

    source: Source
    structure: Structure
    piece: Excerpt
    analysis: Analysis


def _finding(context: Context, rule: Rule, detection: Detection) -> Finding:
    structure, piece = context.structure, context.piece
    at = context.analysis.position(detection.node)
    first, last = piece.origin[at.start.line - 1], piece.origin[at.end.line - 1]
    statement = structure.statement_at(first)
    shown = range(first, min(last, first + SHOWN_LINES - 1) + 1)
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
        fix=_fix(context, rule, detection),
        excerpt=tuple(structure.slice(line, line).rstrip("\r\n") for line in shown),
        span=(statement[0] + 1, statement[1] + 1),
    )


def _fix(context: Context, rule: Rule, detection: Detection) -> Fix | None:
    if not detection.replace:
        return None
    edits = tuple(_edit(context, old, new) for old, new in detection.replace)
    return Fix(edits, detection.imports, safe=rule.fix == "safe")


def _edit(context: Context, old: cst.CSTNode, new: cst.CSTNode) -> Edit:
    at = context.analysis.position(old)
    return Edit(
        context.piece.origin[at.start.line - 1] + 1,
        at.start.column,
        context.piece.origin[at.end.line - 1] + 1,
        at.end.column,
        context.analysis.module.code_for_node(new),
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
