"""Findings as one JSON document, versioned by `schema`."""

from __future__ import annotations

import json

from quantcheck_lint.finding import Finding
from quantcheck_lint.formats import Report


def render(report: Report) -> str:
    """The document. Everything outside ASCII is escaped, lone surrogates as well."""
    document = {
        "schema": 1,
        "files": report.files,
        "errors": list(report.errors),
        "findings": [_finding(finding) for finding in report.findings],
    }
    return json.dumps(document, indent=2) + "\n"


def _finding(finding: Finding) -> dict[str, object]:
    fix = finding.fix
    return {
        "path": finding.path,
        "cell": finding.cell,
        "line": finding.line,
        "column": finding.column,
        "end_line": finding.end_line,
        "end_column": finding.end_column,
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity,
        "message": finding.message,
        "suggestion": finding.suggestion or None,
        "fix": None
        if fix is None
        else {
            "safe": fix.safe,
            "imports": list(fix.imports),
            "edits": [
                {
                    "line": edit.line,
                    "column": edit.column + 1,
                    "end_line": edit.end_line,
                    "end_column": edit.end_column + 1,
                    "text": edit.text,
                }
                for edit in fix.edits
            ],
        },
    }
