"""What the linter says: findings, and the errors that stop it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Edit:
    """Replace the text between two places (lines from 1, columns from 0, in characters) by `text`."""

    line: int
    column: int
    end_line: int
    end_column: int
    text: str


@dataclass(frozen=True, slots=True)
class Fix:
    """Edits that belong together, the names they need from `pytest_quantcheck`, and whether behaviour is kept."""

    edits: tuple[Edit, ...]
    imports: tuple[str, ...] = ()
    safe: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """One place that a rule objects to. Lines and columns start at 1; `cell` is set in notebooks."""

    path: str
    line: int
    column: int
    end_line: int
    end_column: int
    code: str
    name: str
    severity: str
    message: str
    suggestion: str = ""
    cell: int | None = None
    fix: Fix | None = None
    excerpt: tuple[str, ...] = ()
    # Where a suppression comment may stand: the lines of the statement, in the numbering of the whole source.
    span: tuple[int, int] = (0, 0)


class CannotCheck(Exception):
    """Something stops a whole run: bad usage, bad configuration, a path that is not there."""

    def __init__(self, where: str, what: str, rule: str) -> None:
        super().__init__(f"{where}: {what} ({rule})")


class CannotRead(Exception):
    """One source cannot be checked: `what` is wrong at `line`, against the limit or rule `rule`."""

    def __init__(self, what: str, rule: str, line: int = 1, column: int = 1) -> None:
        super().__init__(what, rule, line, column)
        self.what, self.rule, self.line, self.column = what, rule, line, column
