"""Notebooks: cells are one program, findings name cell and line, a fix touches only the strings it must."""

from __future__ import annotations

import json

import pytest

from quantcheck_lint.config import Settings
from quantcheck_lint.discovery import Found
from quantcheck_lint.repair import repair
from quantcheck_lint.runner import check_data

FILE = Found("case.ipynb", "case.ipynb", Settings())


def code(*lines: str) -> dict[str, object]:
    return {"cell_type": "code", "metadata": {}, "outputs": [], "source": list(lines)}


def notebook(*cells: dict[str, object], indent: int | None = 1) -> bytes:
    return json.dumps(
        {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=indent
    ).encode()


USE = "n = sum(p.numel() for p in model.parameters())"
TEXT = {"cell_type": "markdown", "metadata": {}, "source": [USE]}

CELLS = [
    pytest.param([code(USE)], [(1, 1)], id="one cell"),
    pytest.param([TEXT, code("x = 1\n", USE)], [(2, 2)], id="text is no code"),
    pytest.param(
        [code("params = list(model.parameters())"), code("n = sum(p.numel() for p in params)")],
        [(2, 1)],
        id="alias in another cell",
    ),
    pytest.param([code("%matplotlib inline\n", "!pip install x\n", USE)], [(1, 3)], id="magics"),
    pytest.param(
        [code("files = !ls\n", "t = %timeit -o f()\n", "model?\n", USE)], [(1, 4)], id="magics in assignments"
    ),
    pytest.param(
        [code("%%bash\n", "sum(p.numel() for p in model.parameters()"), code(USE)], [(2, 1)], id="a cell of the shell"
    ),
    pytest.param([code("%%time\n", USE)], [(1, 2)], id="a cell that is timed"),
    pytest.param([code("if x:\n", "    !ls\n", USE)], [(1, 3)], id="a magic is the whole body"),
    pytest.param([code("x = a \\\n", "    % (b)\n", USE)], [(1, 3)], id="modulo at the start of a line"),
    pytest.param([code("this is no python"), code(USE)], [(2, 1)], id="a broken cell without a count"),
    pytest.param([code(USE + "  # noqa: QC001")], [], id="suppressed"),
    pytest.param([code("# quantcheck: ignore-file"), code(USE)], [], id="suppressed for the notebook"),
]


@pytest.mark.parametrize(("cells", "places"), CELLS)
def test_findings_name_cell_and_line(cells, places):
    outcome = check_data(FILE, notebook(*cells))
    assert [(found.cell, found.line) for found in outcome.findings] == places
    assert outcome.errors == ()


LAYOUTS = [pytest.param(1, id="as Jupyter writes it"), pytest.param(None, id="one line"), pytest.param(4, id="wide")]


@pytest.mark.parametrize("indent", LAYOUTS)
def test_a_fix_changes_only_the_lines_it_must(indent):
    cells = [TEXT, code("import torch\n", "%matplotlib inline"), code('# é \u2028 "x"\n', "!ls\n", USE)]
    before = notebook(*cells, indent=indent)
    done = repair(FILE, before, unsafe=True)
    fixed = USE.replace("p.numel()", "logical_numel(p)")
    expected = [
        TEXT,
        code("import torch\n", "from pytest_quantcheck import logical_numel\n", "%matplotlib inline"),
        code('# é \u2028 "x"\n', "!ls\n", fixed),
    ]
    assert done.after == notebook(*expected, indent=indent)
    assert repair(FILE, done.after, unsafe=True).after == done.after


def test_a_source_that_is_one_string():
    cell = {"cell_type": "code", "source": "import torch\n" + USE}
    done = repair(FILE, notebook(cell), unsafe=True)
    source = json.loads(done.after)["cells"][0]["source"]
    assert source.splitlines()[1] == "from pytest_quantcheck import logical_numel"


BROKEN = [
    pytest.param(b"{", id="not JSON"),
    pytest.param(b"[]", id="a list"),
    pytest.param(b'{"cells": 1, "nbformat": 4}', id="no cells"),
    pytest.param(b'{"worksheets": [], "nbformat": 3}', id="an old format"),
    pytest.param(b'{"cells": [{"cell_type": "code"}], "nbformat": 4}', id="no source"),
    pytest.param(b'{"cells": [{"cell_type": "code", "source": [1]}], "nbformat": 4}', id="source of numbers"),
    pytest.param(b"[" * 100_000, id="deep"),
    pytest.param(b"\xff\xfe", id="not UTF-8"),
]


@pytest.mark.parametrize("data", BROKEN)
def test_what_is_no_notebook_is_one_error(data):
    outcome = check_data(FILE, data + b"\n# numel() parameters()")
    assert [found.code for found in outcome.findings] == ["QC900"]
    assert len(outcome.errors) == 1
