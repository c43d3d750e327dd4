"""Findings with their source and a caret, for people."""

from __future__ import annotations

from quantcheck_lint.finding import Finding
from quantcheck_lint.formats import Report, concise
from quantcheck_lint.formats.escape import visible

WIDTH = 160


def render(report: Report) -> str:
    """All findings, each with its excerpt, then how many there are."""
    return "\n".join([*(_finding(finding) for finding in report.findings), concise.summary(report)]) + "\n"


def _finding(finding: Finding) -> str:
    parts = [concise.line(finding), *_excerpt(finding)]
    if finding.suggestion:
        parts.append(f"    = help: {visible(finding.suggestion)}")
    return "\n".join([*parts, ""])


def _excerpt(finding: Finding) -> list[str]:
    if not finding.excerpt:
        return []
    gutter = len(str(finding.line + len(finding.excerpt) - 1))
    rows = [f"{' ' * gutter} |"]
    for i, text in enumerate(finding.excerpt):
        begin = finding.column - 1 if i == 0 else len(text) - len(text.lstrip())
        end = finding.end_column - 1 if finding.line + i == finding.end_line else len(text)
        rows += _marked(f"{finding.line + i:>{gutter}} | ", f"{' ' * gutter} | ", text, begin, end)
    return [*rows, f"{' ' * gutter} |"]


def _marked(prefix: str, blank: str, text: str, begin: int, end: int) -> list[str]:
    """A source line and the carets under `begin` to `end`; a long line is cut around them."""
    cut = max(0, min(begin - WIDTH // 4, len(text) - WIDTH))
    shown, lead = visible(text[cut : cut + WIDTH].replace("\t", " ")), visible(text[cut:begin].replace("\t", " "))
    marked = visible(text[begin : min(end, cut + WIDTH)].replace("\t", " "))
    return [(prefix + shown).rstrip(), blank + " " * len(lead) + "^" * max(1, len(marked))]
