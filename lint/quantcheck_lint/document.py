"""A file as something to check: a Python source, or the code of a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from quantcheck_lint.finding import Finding
from quantcheck_lint.source import Source, decode

if TYPE_CHECKING:
    from quantcheck_lint.notebook import Notebook


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


Document: TypeAlias = "Script | Notebook"


def read(path: str, data: bytes, limit: int) -> Document:
    """The document in `data`; `CannotRead` says why there is none."""
    if path.endswith(".ipynb"):
        from quantcheck_lint import notebook

        return notebook.read(path, data, limit)
    return Script(decode(path, data, limit))
