"""From pieces of text to analyses. The only module of the linter that calls libcst's parser for detection."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from quantcheck_lint.analysis import Analysis
from quantcheck_lint.finding import CannotRead
from quantcheck_lint.structure import Excerpt, Structure


def parse(structure: Structure, excerpt: Excerpt, unreadable: list[CannotRead]) -> Iterator[tuple[Excerpt, Analysis]]:
    """The analysis of the excerpt; when it doesn't parse, of the whole source; when that doesn't, of each unit."""
    whole = Excerpt(structure.text, tuple(range(len(structure.starts))), excerpt.units)
    for piece in (excerpt, whole):
        try:
            yield piece, Analysis(cst.parse_module(piece.text))
        except cst.ParserSyntaxError as error:
            problem = error
        else:
            return
    unreadable.append(_problem(problem))
    for unit in excerpt.units:
        piece = structure.excerpt([unit])
        try:
            yield piece, Analysis(cst.parse_module(piece.text))
        except cst.ParserSyntaxError:
            continue


def _problem(error: cst.ParserSyntaxError) -> CannotRead:
    what = " ".join(error.message.split()).removeprefix("parser error: ").rstrip(".")
    return CannotRead(f"does not parse: {what}", "Python syntax", error.raw_line, error.raw_column + 1)
