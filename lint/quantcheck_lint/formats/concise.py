"""One line per finding: `file:line:column: CODE message`."""

from __future__ import annotations

from quantcheck_lint.finding import Finding
from quantcheck_lint.formats import Report
from quantcheck_lint.formats.escape import visible


def place(finding: Finding) -> str:
    """`file:line:column`, with the cell in a notebook."""
    cell = f"cell {finding.cell}:" if finding.cell is not None else ""
    return visible(f"{finding.path}:{cell}{finding.line}:{finding.column}")


def line(finding: Finding) -> str:
    """A finding in one line; `[*]` marks a fix that is safe, `[-]` one that changes what the code computes."""
    mark = "" if finding.fix is None else " [*]" if finding.fix.safe else " [-]"
    return f"{place(finding)}: {finding.code}{mark} {visible(finding.message)}"


def render(report: Report) -> str:
    """All findings, then how many there are."""
    return "\n".join([*map(line, report.findings), summary(report)]) + "\n"


def summary(report: Report) -> str:
    """How many findings in how many files, and what `--fix` can do about them."""
    count = len(report.findings)
    if not count:
        return "All checks passed!" if not report.errors else "No findings in what could be checked."
    safe = sum(finding.fix is not None and finding.fix.safe for finding in report.findings)
    unsafe = sum(finding.fix is not None and not finding.fix.safe for finding in report.findings)
    found = f"Found {count} finding{'s' * (count != 1)} in {report.files} file{'s' * (report.files != 1)}."
    if safe:
        found += f"\n[*] {safe} fixable with `--fix`."
    if unsafe:
        found += f"\n[-] {unsafe} fixable with `--fix --unsafe-fixes`: the value changes on packed models."
    return found
