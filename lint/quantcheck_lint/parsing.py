"""From pieces of text to analyses: the only place where sources are parsed to find something."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from quantcheck_lint.analysis import Analysis
from quantcheck_lint.finding import CannotRead
from quantcheck_lint.rules.rule import Rule
from quantcheck_lint.structure import Excerpt, Structure, Unit, risky


def parse(
    structure: Structure, excerpt: Excerpt, rules: Sequence[Rule], *, apart: bool
) -> tuple[Excerpt, Analysis, CannotRead | None]:
    """The analysis of the excerpt; when it doesn't parse, of the whole source; when that doesn't, of units that do.

    A unit that doesn't parse is a problem when a rule has something to look at in it, and none of ours otherwise.
    """
    try:
        return excerpt, Analysis(excerpt.text, structure.text), None
    except cst.ParserSyntaxError as error:
        problem = _problem(error, excerpt.origin)
    if apart or not risky(structure, structure.lines):
        # The cut may have gone wrong where the source is fine.
        everything = Excerpt(structure.text, tuple(range(len(structure.starts))), excerpt.units)
        try:
            return everything, Analysis(structure.text, structure.text), None
        except cst.ParserSyntaxError:
            pass
    good = [unit for unit in excerpt.units if _parses(structure, unit)]
    matters = any(_is_looked_at(structure, unit, rules) for unit in excerpt.units if unit not in good)
    piece = structure.excerpt(good)
    return piece, Analysis(piece.text, structure.text), problem if matters else None


def _parses(structure: Structure, unit: Unit) -> bool:
    try:
        cst.parse_module(structure.excerpt([unit]).text)
    except cst.ParserSyntaxError:
        return False
    return True


def _is_looked_at(structure: Structure, unit: Unit, rules: Sequence[Rule]) -> bool:
    text = structure.slice(unit.first, unit.last)
    return any(rule.hits is not None and rule.hits.search(text) for rule in rules)


def _problem(error: cst.ParserSyntaxError, origin: tuple[int, ...]) -> CannotRead:
    what = " ".join(error.message.split()).removeprefix("parser error: ").rstrip(".")
    line = origin[min(max(error.raw_line, 1), len(origin)) - 1] + 1
    return CannotRead(f"does not parse: {what}", "Python syntax", line, error.raw_column + 1)
