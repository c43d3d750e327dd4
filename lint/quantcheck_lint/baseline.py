"""The baseline: how many findings each file may have per rule, so that a moved line changes nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence

from quantcheck_lint.finding import CannotCheck, Finding
from quantcheck_lint.writing import write_whole

Counts = Counter[tuple[str, str]]
# What could not be checked is never accepted.
NEVER = frozenset({"QC900"})


def counts(findings: Sequence[Finding], path: str) -> Counts:
    """Findings per file (relative to the folder of the baseline) and rule."""
    return Counter((_relative(finding.path, path), finding.code) for finding in findings if finding.code not in NEVER)


def write(path: str, findings: Sequence[Finding]) -> None:
    """Write the baseline at `path`, whole or not at all."""
    files: dict[str, dict[str, int]] = {}
    for (file, code), count in sorted(counts(findings, path).items()):
        files.setdefault(file, {})[code] = count
    document = json.dumps({"schema": 1, "counts": files}, indent=2) + "\n"
    try:
        write_whole(path, document.encode())
    except OSError as error:
        raise CannotCheck(path, error.strerror or "cannot be written", "baseline") from None


def read(path: str) -> Counts:
    """The counts in the file at `path`."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise CannotCheck(path, error.strerror or "cannot be opened", "baseline") from None
    except (ValueError, RecursionError):
        raise CannotCheck(path, "not JSON", "baseline") from None
    try:
        if document["schema"] != 1:
            raise CannotCheck(path, f"schema {document['schema']!r} is unknown", "baseline")
        return Counter(
            {
                (file, code): int(count)
                for file, by_code in document["counts"].items()
                for code, count in by_code.items()
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CannotCheck(path, "not a baseline of quantcheck-lint", "baseline") from None


def beyond(findings: Sequence[Finding], allowed: Counts, path: str) -> list[Finding]:
    """The findings of every file and rule that has more of them than the baseline: which are new cannot be told."""
    found = counts(findings, path)
    return [
        finding
        for finding in findings
        if finding.code in NEVER or found[key := (_relative(finding.path, path), finding.code)] > allowed.get(key, 0)
    ]


def outdated(findings: Sequence[Finding], allowed: Counts, path: str, checked: Sequence[str]) -> int:
    """How many findings the baseline allows in the checked files that are gone."""
    found, files = counts(findings, path), {_relative(file, path) for file in checked}
    return sum(max(0, count - found[key]) for key, count in allowed.items() if key[0] in files)


def _relative(file: str, baseline: str) -> str:
    folder = os.path.dirname(os.path.abspath(baseline))
    return os.path.relpath(os.path.abspath(file), folder).replace(os.sep, "/")
