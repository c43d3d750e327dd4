"""The Code Quality report of GitLab."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from quantcheck_lint.finding import Finding
from quantcheck_lint.formats import Report

SEVERITIES = {"error": "major", "warning": "minor", "note": "info"}


def render(report: Report) -> str:
    """The findings as issues, each with a fingerprint that doesn't change when lines move."""
    seen: Counter[str] = Counter()
    return json.dumps([_issue(finding, seen) for finding in report.findings], indent=2) + "\n"


def fingerprint(finding: Finding, seen: Counter[str]) -> str:
    """A hash of file, rule and source line, and of how many alike came before."""
    line = finding.excerpt[0].strip() if finding.excerpt else ""
    key = "\0".join([finding.path, finding.code, line])
    seen[key] += 1
    return hashlib.sha256(f"{key}\0{seen[key]}".encode("utf-8", "surrogatepass")).hexdigest()


def _issue(finding: Finding, seen: Counter[str]) -> dict[str, object]:
    where = f"cell {finding.cell}: " if finding.cell is not None else ""
    return {
        "description": f"{finding.code}: {where}{finding.message}",
        "check_name": finding.code,
        "fingerprint": fingerprint(finding, seen),
        "severity": SEVERITIES[finding.severity],
        "location": {
            "path": finding.path,
            "positions": {
                "begin": {"line": finding.line, "column": finding.column},
                "end": {"line": finding.end_line, "column": finding.end_column},
            },
        },
    }
