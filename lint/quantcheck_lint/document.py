"""A file as something to check: a Python source, or the code of a notebook."""

from __future__ import annotations

from dataclasses import dataclass

from quantcheck_lint import notebook
from quantcheck_lint.finding import Finding
from quantcheck_lint.source import Source, decode


@dataclass(frozen=True, slots=True)
class Script:
    """A Python file."""

    source: Source

    def located(self, finding: Finding) -> Finding:
        """The finding as it is: lines of the text are lines of the file."""
        return finding

    def rebuilt(self, text: str) -> bytes:
        """The bytes of the file with the code `text`."""
        return self.source.encode(text)


Document = Script | notebook.Notebook


def read(path: str, data: bytes, limit: int) -> Document:
    """The document in `data`; `CannotRead` says why there is none."""
    if path.endswith(".ipynb"):
        return notebook.read(path, data, limit)
    return Script(decode(path, data, limit))
