"""Fixes: the import is in the right place, the rest of the file keeps its bytes, a second run changes nothing."""

from __future__ import annotations

import pytest

from quantcheck_lint.config import Settings
from quantcheck_lint.discovery import Found
from quantcheck_lint.repair import repair

USE = "n = sum(p.numel() for p in model.parameters())\n"
FIXED = "n = sum(logical_numel(p) for p in model.parameters())\n"
IMPORT = "from pytest_quantcheck import logical_numel\n"
FILE = Found("case.py", "case.py", Settings())

PLACES = [
    pytest.param(USE, IMPORT + "\n" + FIXED, id="nothing before"),
    pytest.param("import torch\n" + USE, "import torch\n" + IMPORT + FIXED, id="after the imports"),
    pytest.param('"""Doc."""\n' + USE, '"""Doc."""\n\n' + IMPORT + FIXED, id="after the docstring"),
    pytest.param(
        '"""Doc."""\n\nimport os\n\n' + USE,
        '"""Doc."""\n\nimport os\n' + IMPORT + "\n" + FIXED,
        id="docstring and import",
    ),
    pytest.param(
        "from __future__ import annotations\n\n" + USE,
        "from __future__ import annotations\n" + IMPORT + "\n" + FIXED,
        id="after __future__",
    ),
    pytest.param(
        "#!/usr/bin/env python\n# License\n" + USE,
        "#!/usr/bin/env python\n# License\n" + IMPORT + "\n" + FIXED,
        id="after leading comments",
    ),
    pytest.param(
        "import os\nif TYPE_CHECKING:\n    import torch\n" + USE,
        "import os\n" + IMPORT + "if TYPE_CHECKING:\n    import torch\n" + FIXED,
        id="not under TYPE_CHECKING",
    ),
    pytest.param(
        "if TYPE_CHECKING:\n    from pytest_quantcheck import logical_numel\n" + USE,
        IMPORT + "\nif TYPE_CHECKING:\n    from pytest_quantcheck import logical_numel\n" + FIXED,
        id="known to types only",
    ),
    pytest.param("import os; import sys\n" + USE, "import os; import sys\n" + IMPORT + FIXED, id="two on a line"),
    pytest.param(
        "import os\nx = 1\nimport sys\n" + USE,
        "import os\n" + IMPORT + "x = 1\nimport sys\n" + FIXED,
        id="imports in two places",
    ),
    pytest.param(USE + "import os\n", IMPORT + "\n" + FIXED + "import os\n", id="import after the use"),
    pytest.param(
        "from pytest_quantcheck import count_params\n" + USE,
        "from pytest_quantcheck import count_params, logical_numel\n" + FIXED,
        id="into the import that is there",
    ),
    pytest.param(
        "from pytest_quantcheck import (\n    count_params,\n    inspect,\n)\n" + USE,
        "from pytest_quantcheck import (\n    count_params,\n    inspect,\n    logical_numel,\n)\n" + FIXED,
        id="into an import over several lines",
    ),
    pytest.param(IMPORT + USE, IMPORT + FIXED, id="already imported"),
    pytest.param(
        "from pytest_quantcheck import *\n" + USE, "from pytest_quantcheck import *\n" + FIXED, id="star import"
    ),
    pytest.param("def logical_numel(p):\n    return 1\n" + USE, None, id="the name is taken by a function"),
    pytest.param("from other import logical_numel\n" + USE, None, id="the name is taken by an import"),
    pytest.param("logical_numel = None\n" + USE, None, id="the name is taken by a variable"),
    pytest.param("a, (b, logical_numel) = f()\n" + USE, None, id="the name is taken by unpacking"),
    pytest.param(
        "import os\nx.logical_numel = 1\n" + USE,
        "import os\n" + IMPORT + "x.logical_numel = 1\n" + FIXED,
        id="an attribute takes no name",
    ),
    pytest.param(
        "def f(model):\n    return sum(p.numel() for p in model.parameters())",
        IMPORT + "\ndef f(model):\n    return sum(logical_numel(p) for p in model.parameters())",
        id="no line end at the end",
    ),
    pytest.param(
        "import os" + "\r\n" + USE.replace("\n", "\r\n"),
        "import os\r\n" + IMPORT.replace("\n", "\r\n") + FIXED.replace("\n", "\r\n"),
        id="CRLF",
    ),
    pytest.param(
        "import os  # a\n\n\n" + USE, "import os  # a\n" + IMPORT + "\n\n" + FIXED, id="comment behind the import"
    ),
    pytest.param(
        "import os\nn = sum((p.numel()) for p in model.parameters())\n",
        "import os\n" + IMPORT + "n = sum((logical_numel(p)) for p in model.parameters())\n",
        id="parentheses around the read",
    ),
    pytest.param(
        "import os\nn = sum((  # why\n    p\n    .numel()) for p in model.parameters())\n",
        "import os\n" + IMPORT + "n = sum((  # why\n    logical_numel(p)) for p in model.parameters())\n",
        id="read over two lines",
    ),
    pytest.param(
        "import os\nn = sum(p[1].numel() for p in model.named_parameters())\n",
        "import os\n" + IMPORT + "n = sum(logical_numel(p[1]) for p in model.named_parameters())\n",
        id="by index",
    ),
    pytest.param(
        "import os\nn = sum(map(lambda p: p.numel(), model.parameters()))\n",
        "import os\n" + IMPORT + "n = sum(map(lambda p: logical_numel(p), model.parameters()))\n",
        id="in a lambda",
    ),
    pytest.param(
        "import os\nn = sum(torch.numel(p.data) for p in model.parameters())\n",
        "import os\n" + IMPORT + "n = sum(logical_numel(p) for p in model.parameters())\n",
        id="data is dropped, it has lost its state",
    ),
    pytest.param(
        "import os\nn = sum(p.numel() for p in model.named_parameters())\n",
        "import os\n" + IMPORT + "n = sum(logical_numel(p) for _, p in model.named_parameters())\n",
        id="two fixes one after the other",
    ),
    pytest.param(
        "import os\nfor p in m.named_parameters():\n    print(_('x'), p.numel())\n",
        "import os\nfor _name, p in m.named_parameters():\n    print(_('x'), p.numel())\n",
        id="the underscore is in use",
    ),
    pytest.param(
        "import os\nn = sum(p.numel() for p in model.parameters())  # noqa: QC002\n",
        "import os\n" + IMPORT + "n = sum(logical_numel(p) for p in model.parameters())\n",
        id="an unused suppression goes as well",
    ),
]


@pytest.mark.parametrize(("before", "after"), PLACES)
def test_fix(before, after):
    done = repair(FILE, before.encode(), unsafe=True)
    assert done.after.decode() == (before if after is None else after)
    again = repair(FILE, done.after, unsafe=True)
    assert again.after == done.after
    assert after is None or not again.outcome.findings


def test_safe_fixes_leave_values_alone():
    assert repair(FILE, USE.encode(), unsafe=False).after == USE.encode()


BYTES = [
    pytest.param(b"\xef\xbb\xbfimport os\n", b"\n", id="byte order mark"),
    pytest.param(b"import os\r\n\r\nx = 1\n", b"\n\x0c\n# mixed line ends, form feed\t\n", id="mixed line ends"),
    pytest.param(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", b"y = '\xff'\n", id="latin-1"),
    pytest.param(
        "x = 'ä 漢 🎉'; y = '\u2028 \x0b \x85'\n".encode(), "z = 'é'  # é\n".encode(), id="separators of Unicode"
    ),
    pytest.param(b"x = 1  \n\t\n", b"def f():\n\treturn  1\n\n\n\n", id="tabs and white space at line ends"),
]


@pytest.mark.parametrize(("head", "tail"), BYTES)
def test_every_byte_around_the_edits_is_kept(head, tail):
    done = repair(FILE, head + USE.encode() + tail, unsafe=True)
    newline = b"\r\n" if b"\r\n" in head else b"\n"
    assert done.fixed == 1
    assert done.after.endswith(FIXED.encode() + tail)
    added = IMPORT.rstrip().encode() + newline + (b"" if b"import" in head else newline)
    assert done.after.replace(added, b"", 1) == head + FIXED.encode() + tail


def test_a_fix_that_cannot_be_encoded_is_not_written():
    source = "# coding: ascii\nimport os\n" + USE
    assert repair(FILE, source.encode(), unsafe=True).fixed == 1


def test_what_does_not_parse_as_a_whole_is_checked_but_not_edited():
    source = "print 'Python 2'\n" + USE
    done = repair(FILE, source.encode(), unsafe=True)
    assert done.after == source.encode()
    assert [found.code for found in done.outcome.findings] == ["QC900", "QC001"]
    assert "does not parse as a whole, not fixed (fix)" in done.outcome.errors[0]


def test_deep_sources_are_not_edited():
    source = "import os\nx = " + "(" * 150 + ")" * 150 + "\n" + USE
    done = repair(FILE, source.encode(), unsafe=True)
    assert done.after == source.encode()
    assert done.outcome.errors


def test_files_are_replaced_whole_and_keep_their_mode(run, tmp_path):
    path = tmp_path / "case.py"
    path.write_text(USE)
    path.chmod(0o750)
    link = tmp_path / "link.py"
    link.symlink_to("case.py")
    assert run("--unsafe-fixes", "link.py")[0] == 0
    assert link.is_symlink()
    assert path.read_text() == IMPORT + "\n" + FIXED
    assert path.stat().st_mode & 0o777 == 0o750
    assert sorted(child.name for child in tmp_path.iterdir()) == ["case.py", "link.py"]


def test_diff_writes_nothing(run, tmp_path):
    path = tmp_path / "case.py"
    path.write_text(USE)
    status, out, _ = run("--diff", "--unsafe-fixes", "case.py")
    assert status == 1
    assert path.read_text() == USE
    assert "-" + USE in out
    assert "+" + FIXED in out
    path.write_text("x = 1\n")
    assert run("--diff", "case.py")[:2] == (0, "")


def test_fix_without_unsafe_keeps_the_finding(run, tmp_path):
    path = tmp_path / "case.py"
    path.write_text(USE)
    assert run("--fix", "case.py")[0] == 1
    assert path.read_text() == USE
    assert run("--fix", "--unsafe-fixes", "case.py")[0] == 0
    assert run("--fix", "--unsafe-fixes", "case.py")[0] == 0
    assert path.read_text() == IMPORT + "\n" + FIXED
