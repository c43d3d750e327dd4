"""Jupyter notebooks: the code cells as one text, and the text back into the bytes of the notebook.

A notebook is one program, so its cells are checked together. Between two cells stands a comment line of ours; magics
become comments, too. When a cell changes, only the strings that hold its source are written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantcheck_lint.finding import CannotRead, Finding
from quantcheck_lint.source import Source

MAX_BYTES = 64 << 20
_SEPARATOR = "# quantcheck-lint cell {}\n"
_IS_SEPARATOR = re.compile(r"^# quantcheck-lint cell (\d+)\n", re.MULTILINE)
_HIDDEN = "# quantcheck-lint hidden {}"
_IS_HIDDEN = re.compile(r"# quantcheck-lint hidden (\d+)$")
_MAGIC = re.compile(r"\s*(?:%{1,2}[A-Za-z]|[!?]|[\w.,\s]+=\s*(?:!|%[A-Za-z]))|[^#\"']*\?$")
# Cell magics that run the rest of the cell as Python.
_PYTHON_CELLS = ("%%time", "%%timeit", "%%capture", "%%prun", "%%python3", "%%python")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Cell:
    """One code cell: its number in the notebook (from 1), where its `source` is in the JSON text, and what it says."""

    number: int
    begin: int
    end: int
    tokens: tuple[tuple[int, int], ...]
    listed: bool
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Notebook:
    """A notebook as a document that can be checked and written back."""

    raw: str
    cells: tuple[Cell, ...]
    hidden: tuple[str, ...]
    source: Source
    # For every line of the source: number of the cell and line in the cell, both from 1.
    places: tuple[tuple[int, int], ...]

    def located(self, finding: Finding) -> Finding:
        """The finding with its cell, and lines as they count in the cell."""
        cell, line = self.places[min(finding.line, len(self.places)) - 1]
        moved = line - finding.line
        return replace(finding, cell=cell, line=line, end_line=finding.end_line + moved)

    def rebuilt(self, text: str) -> bytes:
        """The bytes of the notebook with the code of `text`."""
        parts = _IS_SEPARATOR.split(text)
        sources = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
        out = self.raw
        for cell in reversed(self.cells):
            lines = self._restored(sources[cell.number], cell)
            if lines != list(cell.lines):
                out = out[: cell.begin] + _encoded(self.raw, cell, lines) + out[cell.end :]
        return out.encode()

    def _restored(self, text: str, cell: Cell) -> list[str]:
        lines = [self._shown(line) + "\n" for line in _lines(text)]
        if lines and not (cell.lines and cell.lines[-1].endswith("\n")):
            lines[-1] = lines[-1].removesuffix("\n")
        return [line for line in lines if line]

    def _shown(self, line: str) -> str:
        match = _IS_HIDDEN.search(line)
        return self.hidden[int(match.group(1))] if match else line


def read(path: str, data: bytes, limit: int) -> Notebook:
    """The notebook in `data`; `CannotRead` when it is none or its code is too large."""
    if len(data) > MAX_BYTES:
        raise CannotRead(f"{len(data)} bytes is too large", f"limit {MAX_BYTES} bytes")
    try:
        raw = data.decode()
        cells = tuple(_cells(raw))
    except UnicodeDecodeError:
        raise CannotRead("not UTF-8", "notebook") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise CannotRead("not a notebook", "JSON of nbformat 4") from None
    except RecursionError:
        raise CannotRead("nested too deeply", "JSON of nbformat 4") from None
    text, places, hidden = _program(cells)
    if len(text) > limit:
        raise CannotRead(f"{len(text)} characters of code is too large", f"limit {limit} bytes")
    return Notebook(raw, cells, tuple(hidden), Source(path, text), tuple(places))


def _program(cells: Sequence[Cell]) -> tuple[str, list[tuple[int, int]], list[str]]:
    out: list[str] = []
    places: list[tuple[int, int]] = []
    hidden: list[str] = []
    for cell in cells:
        out.append(_SEPARATOR.format(cell.number))
        places.append((cell.number, 1))
        shell, continued = _is_foreign(cell.lines), False
        for i, line in enumerate(_lines("".join(cell.lines)), 1):
            magic = _MAGIC.match(line) is not None and not continued
            continued = line.endswith("\\") and not magic
            if shell or magic or _IS_SEPARATOR.match(line + "\n"):
                indent = line[: len(line) - len(line.lstrip())]
                out.append(f"{indent}{'pass  ' if indent and not shell else ''}{_HIDDEN.format(len(hidden))}\n")
                hidden.append(line)
            else:
                out.append(line + "\n")
            places.append((cell.number, i))
    return "".join(out), places, hidden


def _lines(text: str) -> list[str]:
    """Lines as Jupyter counts them: separators of Unicode are none."""
    return text.removesuffix("\n").split("\n") if text else []


def _is_foreign(lines: Sequence[str]) -> bool:
    first = next((line for line in lines if line.strip()), "")
    return first.startswith("%%") and not first.startswith(_PYTHON_CELLS)


# JSON with places


def _cells(raw: str) -> Iterator[Cell]:
    start = _SPACE.match(raw).end()  # type: ignore[union-attr]  # matches the empty string
    if raw[start : start + 1] != "{":
        raise ValueError("not an object")
    if json.loads(raw)["nbformat"] < 4:
        raise ValueError("too old")
    for key, begin, _ in _members(raw, start):
        if key == "cells":
            for number, at in enumerate(_items(raw, begin), 1):
                cell = _cell(raw, at, number)
                if cell is not None:
                    yield cell


def _cell(raw: str, at: int, number: int) -> Cell | None:
    members = {key: (begin, end) for key, begin, end in _members(raw, at)}
    kind, _ = _value(raw, members["cell_type"][0])
    if kind != "code":
        return None
    begin, end = members["source"]
    source, _ = _value(raw, begin)
    if isinstance(source, str):
        return Cell(number, begin, end, ((begin, end),), False, tuple(re.findall(r"[^\n]*\n|[^\n]+$", source)))
    tokens = tuple((item, _value(raw, item)[1]) for item in _items(raw, begin))
    if not all(isinstance(line, str) for line in source):
        raise TypeError("source")
    return Cell(number, begin, end, tokens, True, tuple(source))


def _value(raw: str, at: int) -> tuple[Any, int]:
    return json.JSONDecoder().raw_decode(raw, at)


def _skip(raw: str, at: int) -> int:
    match = _SPACE.match(raw, at)
    return match.end() if match else at


def _members(raw: str, at: int) -> Iterator[tuple[str, int, int]]:
    """Key, begin and end of the value of every member of the object at `at`."""
    at = _skip(raw, at + 1)
    while raw[at] != "}":
        key, at = _value(raw, at)
        begin = _skip(raw, _skip(raw, at) + 1)
        _, end = _value(raw, begin)
        yield key, begin, end
        at = _skip(raw, end)
        at = _skip(raw, at + 1) if raw[at] == "," else at


def _items(raw: str, at: int) -> Iterator[int]:
    """Where every item of the array at `at` begins."""
    at = _skip(raw, at + 1)
    while raw[at] != "]":
        yield at
        at = _skip(raw, _value(raw, at)[1])
        at = _skip(raw, at + 1) if raw[at] == "," else at


def _encoded(raw: str, cell: Cell, lines: Sequence[str]) -> str:
    """The lines as the JSON of `source`, as it was laid out; lines that are not new keep their spelling."""
    ascii_only = raw[cell.begin : cell.end].isascii()
    if not cell.listed:
        return json.dumps("".join(lines), ensure_ascii=ascii_only)
    known = {line: raw[begin:end] for line, (begin, end) in zip(cell.lines, cell.tokens, strict=True)}
    opening = raw[cell.begin : cell.tokens[0][0]]
    closing = raw[cell.tokens[-1][1] : cell.end]
    between = "," + opening.removeprefix("[")
    if len(cell.tokens) > 1:
        between = raw[cell.tokens[0][1] : cell.tokens[1][0]]
    return (
        opening + between.join(known.get(line) or json.dumps(line, ensure_ascii=ascii_only) for line in lines) + closing
    )
