from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules.rule import Detection, Invalid, Rule

if TYPE_CHECKING:
    from quantcheck_lint.analysis import Analysis


class CannotParse(Rule):
    """QC900: a source that could not be checked. Found by `engine.py` while it reads and parses."""

    code = "QC900"
    name = "cannot-parse"
    severity = "error"
    summary = "A file cannot be checked."
    what = """
Says that a file which may hold a naive count could not be checked: it is not Python that libcst reads (Python 2, a
syntax error), not text in the encoding it claims, too large, or nested so deeply that the parser gives up. Only what
has to be parsed is: a file without a candidate is never reported. The run ends with exit code 2."""
    why = "Silence would look like a clean file."
    instead = """
Repair the file, or leave it out: `extend-exclude`, or `per-file-ignores` with `QC900`. `--max-file-size` raises the
limit on size."""
    fix_safety = "There is no fix."
    valid = ("def f(:\n",)
    invalid = (Invalid("def count(model):\n    return sum(p.numel() for p in model.parameters()\n"),)

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        yield from ()
