"""Checks many files: reads each once, filters by bytes, and hands what is left to the engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from quantcheck_lint import document, engine, suppressions
from quantcheck_lint.discovery import Found
from quantcheck_lint.engine import UNREADABLE
from quantcheck_lint.finding import CannotRead, Finding
from quantcheck_lint.rules.rule import Rule
from quantcheck_lint.selection import promising, wanted
from quantcheck_lint.source import read

# Below this many files a second process costs more than it saves.
WORTH_A_PROCESS = 1500
PER_TASK = 100


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one file. `errors` are one line each, for stderr."""

    findings: tuple[Finding, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """One look at a document: findings as they are in its text, and what could not be checked."""

    document: document.Document | None = None
    findings: tuple[Finding, ...] = ()
    unreadable: tuple[CannotRead, ...] = ()


def run(files: Sequence[Found], jobs: int) -> Iterator[Outcome]:
    """The outcome of every file, in order."""
    jobs = jobs or (min(os.cpu_count() or 1, 8) if len(files) >= WORTH_A_PROCESS else 1)
    if jobs <= 1 or len(files) < 2:
        yield from map(check_file, files)
        return
    size = max(1, min(PER_TASK, -(-len(files) // jobs)))
    tasks = [files[i : i + size] for i in range(0, len(files), size)]
    for outcomes in _in_processes(tasks, jobs):
        yield from outcomes


def _in_processes(tasks: Sequence[Sequence[Found]], jobs: int) -> Iterator[list[Outcome]]:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(_check_files, task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield [_check_alone(file) for file in task]


def _check_files(files: Sequence[Found]) -> list[Outcome]:
    return [check_file(file) for file in files]


def _check_alone(file: Found) -> Outcome:
    """A file of a task that killed its process: one process each, so that only the culprit is lost."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(check_file, file).result()
        except BrokenProcessPool:
            return outcome(file, Round(unreadable=(CannotRead("the process that checked it died", "libcst"),)))


def check_file(file: Found) -> Outcome:
    """The findings in one file."""
    try:
        data = read(file.path)
    except OSError as error:
        return outcome(file, Round(unreadable=(CannotRead(error.strerror or "cannot be read", "file"),)))
    return check_data(file, data)


def check_data(file: Found, data: bytes) -> Outcome:
    """The findings in the bytes of one file."""
    return outcome(file, look(file, data))


def look(file: Found, data: bytes) -> Round:
    """Filter by bytes, then read and check what is left."""
    rules = file.settings.rules_for(file.path)
    chosen = wanted(data, rules)
    if not chosen and not any(marker in data for marker in suppressions.MARKERS):
        return Round()
    return _check(file, data, rules, chosen)


def _check(file: Found, data: bytes, rules: Sequence[Rule], chosen: Sequence[Rule]) -> Round:
    """Read and check; whatever goes wrong with one file is said about that file."""
    try:
        found = document.read(file.shown, data, file.settings.max_file_size)
        checked = engine.lint(found.source, rules, chosen, file.settings.timeout)
    except CannotRead as error:
        # What holds nothing to look at needs no reading, whatever is wrong with it.
        matters = promising(data.decode("latin-1"), chosen)
        return Round(unreadable=(error,) if matters else ())
    except (RecursionError, MemoryError) as error:
        return Round(unreadable=(CannotRead("too complex", type(error).__name__),))
    except Exception as error:
        # A mistake of ours about one file must not take the findings of the others with it.
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return Round(unreadable=(CannotRead(f"internal error: {what}", "please report"),))
    return Round(found, checked.findings, checked.unreadable)


def outcome(file: Found, seen: Round) -> Outcome:
    """What is said about one file."""
    findings = list(seen.findings)
    errors: list[str] = []
    if any(rule.code == UNREADABLE for rule in file.settings.rules_for(file.path)):
        for error in seen.unreadable:
            findings.append(engine.unreadable_finding(file.shown, error))
            errors.append(f"{file.shown}:{error.line}: {error.what} ({error.rule})")
    if seen.document is not None:
        findings = [seen.document.located(finding) for finding in findings]
    return Outcome(engine.in_order(findings), tuple(errors))


def total(outcomes: Iterable[Outcome]) -> Outcome:
    """All findings and errors together."""
    findings: list[Finding] = []
    errors: list[str] = []
    for outcome in outcomes:
        findings.extend(outcome.findings)
        errors.extend(outcome.errors)
    return Outcome(tuple(findings), tuple(errors))
