"""Sources come from strangers: whatever they hold, there is one QC900 at most, and the others keep their findings."""

from __future__ import annotations

import codecs

import pytest

from quantcheck_lint import isolation
from quantcheck_lint.config import Settings
from quantcheck_lint.discovery import Found
from quantcheck_lint.runner import check_data

USE = "    return sum(p.numel() for p in model.parameters())\n"
TIMEOUT = 10.0


def check(data: bytes | str, name: str = "case.py", **settings: object):
    file = Found(name, name, Settings(**{"timeout": TIMEOUT, **settings}))
    return check_data(file, data.encode() if isinstance(data, str) else data)


def function(body: str) -> str:
    return f"def f(model):\n    y = {body}\n{USE}"


READ = [
    pytest.param("\ufeff" + function("1"), id="byte order mark"),
    pytest.param(function("1").replace("\n", "\r\n"), id="CRLF"),
    pytest.param(function("1").replace("\n", "\r"), id="CR"),
    pytest.param("\x0cimport os\n\x0c\n" + function("1"), id="form feeds"),
    pytest.param(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n" + function("1").encode(), id="latin-1"),
    pytest.param(
        b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\nx = '\x80'\n" + function("1").encode(),
        id="cookie on line two",
    ),
    pytest.param("type X = int\n" + function("f\"{'a' + f'{'b'}'}\""), id="syntax of 3.12"),
    pytest.param(function("t'{a}'"), id="syntax of 3.14"),
    pytest.param(
        "def f(model):\n    match model:\n        case {'a': [1, *_]} | None:\n            pass\n" + USE, id="match"
    ),
    pytest.param("print 'Python 2, elsewhere'\n" + function("1"), id="Python 2, elsewhere"),
    pytest.param(function("[" + "1, " * 5_000 + "]"), id="long and flat"),
    pytest.param(function("(" * 60 + "1" + ")" * 60), id="60 brackets"),
    pytest.param(function(" + ".join(["a"] * 1000)), id="1000 terms"),
    pytest.param("def f(model):\n    if a: pass\n" + "    elif b: pass\n" * 500 + USE, id="500 branches"),
    pytest.param(function("\\\n" * 500 + "1"), id="500 continued lines"),
    pytest.param(function("1") + "x = (1,\n", id="bracket left open, elsewhere"),
    pytest.param(function("1") + "x = '''abc\n", id="string left open, elsewhere"),
]


@pytest.mark.parametrize("data", READ)
def test_is_read(data):
    outcome = check(data)
    assert [found.code for found in outcome.findings] == ["QC001"]
    assert outcome.errors == ()


REFUSED = [
    pytest.param(
        function("(" * 2000 + "1" + ")" * 2000), "brackets are nested 2000 deep (limit 200)", id="2000 brackets"
    ),
    pytest.param(b"x = '\xe9'\n" + function("1").encode(), "byte 0xe9 is not utf-8 (source encoding)", id="not UTF-8"),
    pytest.param(
        "# coding: nonsense\n" + function("1"), "unknown encoding `nonsense` (coding cookie)", id="unknown cookie"
    ),
    pytest.param("# coding: rot13\n" + function("1"), "`rot13` is not a text encoding (coding cookie)", id="rot13"),
    pytest.param("\ufeff# coding: latin-1\n" + function("1"), "byte order mark says utf-8", id="mark against cookie"),
    pytest.param(function("1") + "\0", "source contains NUL bytes (Python source)", id="NUL"),
    pytest.param("def f(model):\n    print 'x'\n" + USE, "(Python syntax)", id="Python 2"),
    pytest.param("def f(model):\n" + USE.replace("())\n", "(\n"), "(Python syntax)", id="syntax error"),
    pytest.param(
        function("'" + "a" * 10_000_000 + "'"),
        "10000079 bytes is too large (limit 1048576 bytes)",
        id="a line of 10 MB",
    ),
    pytest.param(
        "def f(model):\n" + "".join(" " * (i + 4) + "if a:\n" for i in range(120)) + " " * 130 + USE.lstrip(),
        "(Python syntax)",
        id="120 levels",
    ),
]


@pytest.mark.parametrize(("data", "what"), REFUSED)
def test_is_refused_in_one_line(data, what):
    outcome = check(data)
    assert [found.code for found in outcome.findings] == ["QC900"]
    assert len(outcome.errors) == 1
    assert what in outcome.errors[0]
    assert "\n" not in outcome.errors[0]


DEADLY = [
    pytest.param(" and ".join(["a"] * 8000), id="8000 terms"),
    pytest.param("lambda a, b: " * 3000 + "1", id="3000 lambdas"),
    pytest.param("a" + ".b(1, 2)" * 3000, id="3000 calls in a chain"),
]


@pytest.mark.parametrize("body", DEADLY)
def test_what_may_kill_the_parser_is_parsed_apart(body):
    outcome = check(function(body), timeout=1.5)
    assert [found.code for found in outcome.findings] in (["QC900"], ["QC001"])


def test_a_child_that_dies_is_one_finding(monkeypatch):
    monkeypatch.setattr(isolation, "_MAIN", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    outcome = check(function("(" * 60 + "1" + ")" * 60))
    assert "the parser died of SIGSEGV (libcst)" in outcome.errors[0]


def test_a_child_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(isolation, "_MAIN", "import time; time.sleep(60)")
    file = Found("case.py", "case.py", Settings(timeout=0.3))
    outcome = check_data(file, function("(" * 60 + "1" + ")" * 60).encode())
    assert "parsing takes too long (limit 0.3 s)" in outcome.errors[0]


def test_a_child_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "libcst.py").write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    outcome = check(function("(" * 60 + "1" + ")" * 60))
    assert [found.code for found in outcome.findings] == ["QC001"]


HARMLESS = [
    pytest.param(b"\0\0\0 binary", id="binary"),
    pytest.param(codecs.BOM_UTF16_LE + "x = 1".encode("utf-16-le"), id="UTF-16"),
    pytest.param(b"x = (((((", id="unfinished"),
    pytest.param(b"x = '" + b"a" * 2_000_000 + b"'", id="large"),
    pytest.param(b"print 'x'; model.parameters()", id="Python 2"),
]


@pytest.mark.parametrize("data", HARMLESS)
def test_what_holds_no_candidate_is_not_read(data):
    assert check(data) == type(check(b""))()


def test_a_mistake_of_ours_is_said_about_the_file_and_not_raised(monkeypatch):
    monkeypatch.setattr("quantcheck_lint.engine.select", lambda *_: 1 / 0)
    outcome = check(function("1"))
    assert "internal error: ZeroDivisionError: division by zero (please report)" in outcome.errors[0]


def test_many_candidates_take_no_square_of_time(tmp_path):
    function_text = "def f{0}(model):\n    return sum(p.numel() for p in model.parameters())  # noqa: QC001\n"
    text = "".join(function_text.format(number) for number in range(1500))
    assert check(text).findings == ()
    assert len(check(text.replace("  # noqa: QC001", "")).findings) == 1500
