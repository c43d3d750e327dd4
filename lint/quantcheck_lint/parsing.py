"""From pieces of text to analyses: the only place where sources are parsed to find something."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from quantcheck_lint.analysis import Analysis
from quantcheck_lint.finding import CannotRead
from quantcheck_lint.structure import Excerpt, Structure


def parse(
    structure: Structure, excerpt: Excerpt, unreadable: list[CannotRead], whole: bool
) -> Iterator[tuple[Excerpt, Analysis]]:
    """The analysis of the excerpt; when it doesn't parse, of the whole source; when that doesn't, of each unit."""
    try:
        yield excerpt, Analysis(cst.parse_module(excerpt.text))
        return
    except cst.ParserSyntaxError as error:
        problem = _problem(error, excerpt.origin)
    if whole:
        everything = Excerpt(structure.text, tuple(range(len(structure.starts))), excerpt.units)
        try:
            yield everything, Analysis(cst.parse_module(structure.text))
            return
        except cst.ParserSyntaxError as error:
            problem = _problem(error, everything.origin)
    unreadable.append(problem)
    for unit in excerpt.units:
        piece = structure.excerpt([unit])
        try:
            yield piece, Analysis(cst.parse_module(piece.text))
        except cst.ParserSyntaxError:
            continue


def _problem(error: cst.ParserSyntaxError, origin: tuple[int, ...]) -> CannotRead:
    what = " ".join(error.message.split()).removeprefix("parser error: ").rstrip(".")
    line = origin[min(max(error.raw_line, 1), len(origin)) - 1] + 1
    return CannotRead(f"does not parse: {what}", "Python syntax", line, error.raw_column + 1)
