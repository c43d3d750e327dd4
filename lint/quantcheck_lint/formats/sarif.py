"""SARIF 2.1.0, for code scanning."""

from __future__ import annotations

import json
import os
from collections import Counter
from urllib.parse import quote

from quantcheck_lint import __version__
from quantcheck_lint.finding import Edit, Finding
from quantcheck_lint.formats import Report
from quantcheck_lint.formats.gitlab import fingerprint
from quantcheck_lint.rules import RULES
from quantcheck_lint.rules.rule import Rule

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def render(report: Report) -> str:
    """One run with every rule, every finding with its fix, and a notification for what could not be checked."""
    seen: Counter[str] = Counter()
    run = {
        "tool": {
            "driver": {
                "name": "quantcheck-lint",
                "version": __version__,
                "informationUri": "https://pypi.org/project/pytest-quantcheck/",
                "rules": [_rule(rule) for rule in RULES],
            }
        },
        "columnKind": "unicodeCodePoints",
        "invocations": [
            {
                "executionSuccessful": not report.errors,
                "toolExecutionNotifications": [
                    {"level": "error", "message": {"text": error}} for error in report.errors
                ],
            }
        ],
        "results": [_result(finding, seen) for finding in report.findings],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(rule: Rule) -> dict[str, object]:
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.why.strip()},
        "help": {"text": f"{rule.what.strip()}\n\n{rule.instead.strip()}"},
        "defaultConfiguration": {"level": rule.severity, "enabled": not rule.preview},
    }


def _result(finding: Finding, seen: Counter[str]) -> dict[str, object]:
    codes = [rule.code for rule in RULES]
    where = f"cell {finding.cell}: " if finding.cell is not None else ""
    suggestion = f"; {finding.suggestion}" if finding.suggestion else ""
    location = {"uri": _uri(finding.path)}
    result: dict[str, object] = {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": finding.severity,
        "message": {"text": f"{where}{finding.message}{suggestion}"},
        "locations": [{"physicalLocation": {"artifactLocation": location, "region": _region(finding)}}],
        "partialFingerprints": {"quantcheckLint/v1": fingerprint(finding, seen)},
    }
    if finding.fix is not None and finding.cell is None:
        change = {"artifactLocation": location, "replacements": [_replacement(edit) for edit in finding.fix.edits]}
        text = finding.suggestion or "remove what is not needed"
        result["fixes"] = [{"description": {"text": text}, "artifactChanges": [change]}]
    return result


def _region(finding: Finding) -> dict[str, int]:
    return {
        "startLine": finding.line,
        "startColumn": finding.column,
        "endLine": finding.end_line,
        "endColumn": finding.end_column,
    }


def _replacement(edit: Edit) -> dict[str, object]:
    deleted = {
        "startLine": edit.line,
        "startColumn": edit.column + 1,
        "endLine": edit.end_line,
        "endColumn": edit.end_column + 1,
    }
    return {"deletedRegion": deleted, "insertedContent": {"text": edit.text}}


def _uri(path: str) -> str:
    encoded = quote(os.fsencode(path))
    return f"file://{encoded}" if path.startswith("/") else encoded
