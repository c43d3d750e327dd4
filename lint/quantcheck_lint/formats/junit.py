"""JUnit XML: one failed test case per finding, one passed test case when there is none."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from quantcheck_lint.finding import Finding
from quantcheck_lint.formats import Report
from quantcheck_lint.formats.concise import place
from quantcheck_lint.formats.escape import visible


def render(report: Report) -> str:
    """The document. Characters that XML forbids are written as escapes."""
    cases = [_case(finding) for finding in report.findings]
    cases += [
        f'<testcase name="cannot check" classname="quantcheck-lint"><error message={_attribute(error)}/></testcase>'
        for error in report.errors
    ]
    cases = cases or ['<testcase name="no findings" classname="quantcheck-lint"/>']
    counts = f'tests="{len(cases)}" failures="{len(report.findings)}" errors="{len(report.errors)}"'
    body = "\n".join(f"    {case}" for case in cases)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<testsuites name="quantcheck-lint" {counts}>\n'
        f'  <testsuite name="quantcheck-lint" {counts}>\n{body}\n  </testsuite>\n</testsuites>\n'
    )


def _case(finding: Finding) -> str:
    name = _attribute(f"{finding.code} {finding.line}:{finding.column}")
    message = finding.message + (f"; {finding.suggestion}" if finding.suggestion else "")
    return (
        f"<testcase name={name} classname={_attribute(finding.path)} file={_attribute(finding.path)} "
        f'line="{finding.line}"><failure type={_attribute(finding.code)} message={_attribute(message)}>'
        f"{escape(place(finding))}</failure></testcase>"
    )


def _attribute(text: str) -> str:
    return quoteattr(visible(text))
