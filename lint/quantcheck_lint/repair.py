"""Fixes files: check, apply, check again, until nothing is left to fix; then the new bytes, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantcheck_lint import document, runner, suppressions
from quantcheck_lint.discovery import Found
from quantcheck_lint.finding import CannotRead, Finding
from quantcheck_lint.fixes import fixed, require_parsable
from quantcheck_lint.structure import Structure, risky

ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Repaired:
    """A file before and after, how many findings were fixed, and what remains."""

    before: bytes
    after: bytes
    fixed: int
    outcome: runner.Outcome


def repair(file: Found, data: bytes, unsafe: bool) -> Repaired:
    """`data` with every fix that may be applied."""
    current, count = data, 0
    for _ in range(ROUNDS):
        seen = runner.look(file, current)
        chosen = [finding for finding in seen.findings if finding.fix is not None and (finding.fix.safe or unsafe)]
        if seen.document is None or not chosen:
            break
        try:
            after, applied = _applied(seen.document, chosen)
        except CannotRead as error:
            seen = replace(seen, unreadable=(*seen.unreadable, error))
            return Repaired(data, current, count, runner.outcome(file, seen))
        if not applied:
            break
        current, count = after, count + applied
    return Repaired(data, current, count, runner.check_data(file, current))


def _applied(found: document.Document, findings: Sequence[Finding]) -> tuple[bytes, int]:
    source = found.source
    structure = Structure(source.text)
    if risky(structure, structure.lines):
        raise CannotRead("nested too deeply to be edited", "fix")
    edits_code = any(finding.code != suppressions.UNUSED for finding in findings)
    if edits_code:
        require_parsable(source.text, "does not parse as a whole, not fixed")
    text, applied = fixed(source.text, findings, source.newline)
    if edits_code:
        require_parsable(text, "does not parse after the fix, not fixed")
    try:
        return found.rebuilt(text), len(applied)
    except UnicodeEncodeError:
        raise CannotRead(f"cannot be written as {source.encoding}", "fix") from None


def annotate(file: Found, data: bytes, reason: str) -> tuple[bytes, int, tuple[str, ...]]:
    """`data` with a `# noqa` for every finding, how many there were, and what could not be checked."""
    seen = runner.look(file, data)
    errors = runner.outcome(file, seen).errors
    findings = [finding for finding in seen.findings if finding.code != suppressions.UNUSED]
    if seen.document is None or not findings:
        return data, 0, errors
    text = suppressions.with_noqa(seen.document.source.text, findings, reason)
    return seen.document.rebuilt(text), len(findings), errors
