"""The shape of a source without parsing it: logical lines, and which functions are worth parsing.

One iterative pass over the text, so nothing in it can exhaust the stack. It decides only what libcst gets to see; when
it misjudges (an f-string with quotes inside quotes), the piece doesn't parse and libcst gets the whole source instead.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

_TOKEN = re.compile(
    # One set of characters first, which makes the search fast, then what each of them begins.
    r"""[\#"'()\[\]{}\\\r\n]
    (?: (?<=\#) [^\r\n]*+
      | (?<=") (?: "" (?:[^"\\]|\\.|"(?!""))*+ (?:\"{3}|\Z) | (?:[^"\\\r\n]|\\\r\n|\\.)*+ "? )
      | (?<=') (?: '' (?:[^'\\]|\\.|'(?!''))*+ (?:'{3}|\Z) | (?:[^'\\\r\n]|\\\r\n|\\.)*+ '? )
      | (?<=\\) \r?\n
      | (?<=\r) \n )?""",
    re.DOTALL | re.VERBOSE,
)
_LONG_LINE = 400
_CONTINUES = frozenset({"else", "elif", "except", "finally", "case"})
# White space and the first word of a logical line: `@`, a name, or another character.
_START = re.compile(r"([ \t\f\ufeff]*)(@|\w+|[^#\s])")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")

# CPython's own tokenizer refuses more.
DEEPEST = 200
# What libcst takes in its stride, far below what kills it. Beyond these the work is done in a child process.
SAFE_DEPTH = 40
SAFE_CHAIN = 150
SAFE_BRANCHES = 60
SAFE_INDENT = 200


@dataclass(frozen=True, slots=True)
class Line:
    """One logical line: physical lines `first` to `last` (from 0), how far it is indented and its first word.

    `depth` is how deep its brackets go, `begin` and `end` are offsets in the text.
    """

    first: int
    last: int
    indent: int
    word: str
    depth: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A function, a method or another statement, with the header lines of the classes around it."""

    first: int
    last: int
    headers: tuple[Line, ...]
    lines: tuple[Line, ...]

    @property
    def is_function(self) -> bool:
        """Whether this is a function or method, with its decorators."""
        return any(line.word in {"def", "async"} for line in self.lines if line.indent == self.lines[0].indent)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The part of a source that is parsed, and where its lines come from (from 0)."""

    text: str
    origin: tuple[int, ...]
    units: tuple[Unit, ...]


class Structure:
    """Physical and logical lines of a text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(match.end() for match in re.finditer(r"\r\n?|\n", text))]

    def line_of(self, offset: int) -> int:
        """The physical line (from 0) of an offset."""
        return bisect_right(self.starts, offset) - 1

    def slice(self, first: int, last: int) -> str:
        """The physical lines `first` to `last`, with their line ends."""
        return self.text[self.starts[first] : self.starts[last + 1] if last + 1 < len(self.starts) else None]

    @cached_property
    def lines(self) -> list[Line]:
        """The logical lines in order."""
        text, lines, depth, deepest, begin = self.text, list[Line](), 0, 0, 0
        for match in _TOKEN.finditer(text):
            first = text[match.start()]
            if first in "([{":
                depth += 1
                deepest = max(depth, deepest)
            elif first in ")]}":
                depth = max(depth - 1, 0)
            elif first in "\r\n" and depth == 0:
                self._add(lines, begin, match.start(), deepest)
                begin, deepest = match.end(), 0
        self._add(lines, begin, len(text), deepest)
        return lines

    def _add(self, lines: list[Line], begin: int, end: int, depth: int) -> None:
        start = _START.match(self.text, begin, end)
        if start is None:
            return  # blank, or a comment
        blank, word = start.groups()
        indent = len(blank.rpartition("\f")[2].expandtabs())
        lines.append(Line(self.line_of(begin), self.line_of(max(begin, end - 1)), indent, word, depth, begin, end))

    def chain(self, line: Line) -> int:
        """An upper bound on how deep operators nest in a logical line; short lines are not looked at."""
        return chain(self.text[line.begin : line.end]) if line.end - line.begin > _LONG_LINE else 0

    def comments(self) -> Iterator[tuple[int, str]]:
        """Offset and text of every comment."""
        for match in _TOKEN.finditer(self.text):
            if match.group().startswith("#"):
                yield match.start(), match.group()

    def in_string(self, offset: int) -> bool:
        """Whether a string literal goes on at `offset`."""
        index = bisect_right(self._strings, (offset, 0)) - 1
        return index >= 0 and self._strings[index][0] < offset < self._strings[index][1]

    @cached_property
    def _strings(self) -> list[tuple[int, int]]:
        return [match.span() for match in _TOKEN.finditer(self.text) if match.group()[0] in "\"'"]

    def statement_at(self, line: int) -> tuple[int, int]:
        """First and last physical line of the logical line that covers `line`."""
        index = bisect_right(self._line_begins, line) - 1
        if index >= 0 and line <= self.lines[index].last:
            return self.lines[index].first, self.lines[index].last
        return line, line

    @cached_property
    def _line_begins(self) -> list[int]:
        return [line.first for line in self.lines]

    @cached_property
    def units(self) -> list[Unit]:
        """The functions, methods and other statements, in order and without overlap."""
        found: list[Unit] = []
        self._collect_units(0, len(self.lines), (), found)
        return found

    def units_of(self, offsets: Iterable[int]) -> list[Unit]:
        """The units that the offsets lie in, each once."""
        begins = self._unit_begins
        found: dict[int, Unit] = {}
        for line in {self.line_of(offset) for offset in offsets}:
            index = bisect_right(begins, line) - 1
            if index >= 0 and line <= self.units[index].last:
                found[index] = self.units[index]
        return [found[index] for index in sorted(found)]

    @cached_property
    def _unit_begins(self) -> list[int]:
        return [unit.first for unit in self.units]

    def _collect_units(self, start: int, end: int, headers: tuple[Line, ...], found: list[Unit]) -> None:
        while start < end:
            header = start
            while header + 1 < end and self.lines[header].word == "@":
                header += 1
            stop = self._end_of(header, end)
            if self.lines[header].word == "class" and stop > header + 1:
                self._collect_units(header + 1, stop, (*headers, self.lines[header]), found)
            else:
                lines = tuple(self.lines[start:stop])
                found.append(Unit(lines[0].first, lines[-1].last, headers, lines))
            start = stop

    def _end_of(self, header: int, end: int) -> int:
        """One past the last logical line of the statement that starts at `header`, its `else` parts included."""
        indent, stop = self.lines[header].indent, header + 1
        branches = self.lines[header].word in {"if", "for", "while", "try"}
        while stop < end and (
            self.lines[stop].indent > indent
            or (branches and self.lines[stop].indent == indent and self.lines[stop].word in _CONTINUES)
        ):
            stop += 1
        return stop

    def excerpt(self, units: Iterable[Unit]) -> Excerpt:
        """The source of some units, under the headers of their classes."""
        chosen, kept = tuple(units), set[int]()
        for unit in chosen:
            kept.update(range(unit.first, unit.last + 1))
            for header in unit.headers:
                kept.update(range(header.first, header.last + 1))
        origin = tuple(sorted(kept))
        text = "".join(self.slice(line, line) for line in origin)
        return Excerpt(text, origin, chosen)


@cache
def _nests() -> re.Pattern[str]:
    """What can nest without brackets, beside the tokens above; rarely needed, so compiled when it is."""
    return re.compile(
        rf"(?:{_TOKEN.pattern})|[-+*/%@&|^~.,:]|\b(?:and|or|not|if|lambda|await|for|in)\b", re.DOTALL | re.VERBOSE
    )


def chain(text: str) -> int:
    """An upper bound on how deep the expressions of a logical line nest.

    Operators nest in each other until a comma starts anew, but for the commas of `lambda a, b:` and `for a, b in`.
    """
    counts, heads, total, most = [0], [0], 0, 0
    for match in _nests().finditer(text):
        token = match.group()
        if token in "([{":
            counts.append(0)
            heads.append(0)
        elif token in ")]}":
            if len(counts) > 1:
                total -= counts.pop()
                heads.pop()
        elif token == ",":
            if not heads[-1]:
                total, counts[-1] = total - counts[-1], 0
        elif token in {":", "in"}:
            heads[-1] = max(0, heads[-1] - 1)
        elif token[0] not in "#\\\r\n":
            heads[-1] += token in {"lambda", "for"}
            counts[-1] += 1
            total += 1
            most = max(most, total)
    return most


def risky(structure: Structure, lines: Iterable[Line]) -> bool:
    """Whether libcst may need a lot of stack, time or memory for these lines."""
    branches: dict[int, int] = {}
    for line in lines:
        if line.depth > SAFE_DEPTH or line.indent > SAFE_INDENT or structure.chain(line) > SAFE_CHAIN:
            return True
        branches[line.indent] = branches.get(line.indent, 0) + 1 if line.word == "elif" else 0
        if branches[line.indent] > SAFE_BRANCHES:
            return True
    return False


def identifiers(text: str) -> set[str]:
    """Every name in a text, keywords and words of comments included."""
    return set(_IDENTIFIER.findall(text))
