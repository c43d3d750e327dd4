"""What `check` does: report, fix, show a diff, add suppressions, keep a baseline."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from quantcheck_lint import runner
from quantcheck_lint.config import Settings
from quantcheck_lint.discovery import Found, discover, excluded_by_name, shown
from quantcheck_lint.finding import CannotCheck, Finding
from quantcheck_lint.formats import Report, renderer
from quantcheck_lint.formats.escape import visible

if TYPE_CHECKING:
    from quantcheck_lint.cli import Options

CLEAN, FINDINGS, CANNOT_CHECK = 0, 1, 2
PROGRAM = "quantcheck-lint"


def say(message: str) -> None:
    """One line on stderr, whatever is in it."""
    click.echo(visible(f"{PROGRAM}: {message}"), err=True)


def _write_out(data: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def check_files(settings: Mapping[str, Settings], options: Options) -> int:
    """Check what lies below the roots."""
    files = list(discover(list(settings.items())))
    if not files:
        return _nothing(settings)
    if options.add_noqa is not None:
        return _annotate(files, options)
    if options.fix or options.unsafe_fixes or options.diff:
        outcome, changed = _repair(files, options)
    else:
        outcome, changed = runner.total(runner.run(files, options.jobs)), 0
    baseline = options.baseline or next((one.baseline for one in settings.values() if one.baseline), None)
    return _conclude(outcome, files, baseline, options, changed)


def _nothing(settings: Mapping[str, Settings]) -> int:
    """No file to check. That is fine only when every path was left out on purpose."""
    roots = ", ".join(settings)
    if all(one.force_exclude and os.path.isfile(root) for root, one in settings.items()):
        say(f"warning: {roots}: excluded, nothing was checked")
        return CLEAN
    say(f"error: {roots}: no Python file or notebook found (nothing was checked)")
    return CANNOT_CHECK


def check_stdin(name: str, settings: Settings, options: Options) -> int:
    """Check what comes from stdin. Fixed code goes to stdout, then findings go to stderr."""
    data = sys.stdin.buffer.read()
    path = os.path.abspath(name) if name != "-" else "-"
    file = Found(path, shown(name) if name != "-" else "-", settings)
    if settings.force_exclude and excluded_by_name(path, settings):
        if options.fix or options.unsafe_fixes:
            _write_out(data)
        return CLEAN
    if options.add_noqa is not None or options.write_baseline:
        raise CannotCheck("-", "stdin cannot be written back", "usage")
    if not (options.fix or options.unsafe_fixes or options.diff):
        return _conclude(runner.check_data(file, data), [file], options.baseline, options, 0)
    from quantcheck_lint.repair import repair

    repaired = repair(file, data, options.unsafe_fixes)
    if options.diff:
        _show_diff(file, repaired.before, repaired.after)
        return _status(repaired.outcome, changed=repaired.before != repaired.after, options=options)
    _write_out(repaired.after)
    report = Report(repaired.outcome.findings, 1, repaired.outcome.errors)
    click.echo(renderer(options.output_format)(report), nl=False, err=True)
    return _status(repaired.outcome, changed=False, options=options)


def _repair(files: Sequence[Found], options: Options) -> tuple[runner.Outcome, int]:
    """Fix every file, or show what would change; what remains, and how many findings are or would be fixed."""
    from quantcheck_lint.repair import repair
    from quantcheck_lint.source import read

    outcomes, count = [], 0
    for file in files:
        try:
            data = read(file.path)
        except OSError:
            outcomes.append(runner.check_file(file))
            continue
        repaired = repair(file, data, options.unsafe_fixes)
        if options.diff:
            _show_diff(file, repaired.before, repaired.after)
            outcomes.append(runner.check_data(file, data) if repaired.fixed else repaired.outcome)
        else:
            if repaired.after != repaired.before:
                _write(file, repaired.after)
            outcomes.append(repaired.outcome)
        count += repaired.fixed
    return runner.total(outcomes), count


def _write(file: Found, data: bytes) -> None:
    from quantcheck_lint.writing import write_whole

    try:
        write_whole(file.path, data)
    except OSError as error:
        raise CannotCheck(file.shown, error.strerror or "cannot be written", "fix") from None


def _show_diff(file: Found, before: bytes, after: bytes) -> None:
    import difflib

    old, new = (data.decode("utf-8", "backslashreplace").splitlines(keepends=True) for data in (before, after))
    for line in difflib.unified_diff(old, new, f"a/{file.shown}", f"b/{file.shown}"):
        click.echo(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n", nl=False)


def _annotate(files: Sequence[Found], options: Options) -> int:
    from quantcheck_lint.repair import annotate
    from quantcheck_lint.source import read

    count, failed = 0, False
    for file in files:
        try:
            data = read(file.path)
        except OSError as error:
            raise CannotCheck(file.shown, error.strerror or "cannot be read", "file") from None
        after, added, errors = annotate(file, data, " ".join((options.add_noqa or "").split()))
        for what in errors:
            say(f"error: {what}")
            failed = True
        if after != data:
            _write(file, after)
        count += added
    if not options.quiet:
        say(f"added {count} suppression{'s' * (count != 1)}")
    return CANNOT_CHECK if failed else CLEAN


def _conclude(
    outcome: runner.Outcome, files: Sequence[Found], baseline: str | None, options: Options, changed: int
) -> int:
    findings: Sequence[Finding] = outcome.findings
    for error in outcome.errors:
        say(f"error: {error}")
    if options.write_baseline:
        return _write_baseline(baseline, outcome)
    if baseline is not None:
        findings = _beyond(findings, baseline, files, options)
    if not options.diff:
        _report(Report(tuple(findings), len(files), outcome.errors), options)
    if changed and not options.quiet:
        say(f"{changed} finding{'s' * (changed != 1)} {'would be ' if options.diff else ''}fixed")
    return _status(runner.Outcome(tuple(findings), outcome.errors), bool(changed) and options.diff, options)


def _write_baseline(baseline: str | None, outcome: runner.Outcome) -> int:
    from quantcheck_lint.baseline import counts, write

    if baseline is None:
        raise CannotCheck("--write-baseline", "no file given", "use --baseline FILE")
    write(baseline, outcome.findings)
    total = counts(outcome.findings, baseline).total()
    say(f"wrote {total} finding{'s' * (total != 1)} to {baseline}")
    return CANNOT_CHECK if outcome.errors else CLEAN


def _beyond(findings: Sequence[Finding], path: str, files: Sequence[Found], options: Options) -> Sequence[Finding]:
    from quantcheck_lint.baseline import beyond, outdated, read

    allowed = read(path)
    gone = outdated(findings, allowed, path, [file.path for file in files])
    if gone and not options.quiet:
        say(f"note: {path} allows {gone} that are gone: lower it with --write-baseline")
    return beyond(findings, allowed, path)


def _report(report: Report, options: Options) -> None:
    text = _statistics(report) if options.statistics else renderer(options.output_format)(report)
    if options.quiet and options.output_format in {"full", "concise"} and not report.findings:
        text = ""
    if options.output_file is None:
        _write_out(text.encode("utf-8", "backslashreplace"))
        return
    from quantcheck_lint.writing import write_whole

    try:
        write_whole(options.output_file, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise CannotCheck(options.output_file, error.strerror or "cannot be written", "--output-file") from None


def _statistics(report: Report) -> str:
    """Findings per rule, most first."""
    names = {finding.code: finding.name for finding in report.findings}
    counted = Counter(finding.code for finding in report.findings)
    rows = [f"{count}\t{code}\t{names[code]}\n" for code, count in sorted(counted.items(), key=lambda c: (-c[1], c[0]))]
    return "".join(rows) or "0\tno findings\n"


def _status(outcome: runner.Outcome, changed: bool, options: Options) -> int:
    if outcome.errors:
        return CANNOT_CHECK
    if options.exit_zero:
        return CLEAN
    return FINDINGS if outcome.findings or changed else CLEAN
