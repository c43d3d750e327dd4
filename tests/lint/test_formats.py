"""Output formats: what a reader of each format needs is there, and nothing from a source can break out of it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import jsonschema
import pytest

from quantcheck_lint.finding import Edit, Finding, Fix
from quantcheck_lint.formats import FORMATS, Report, renderer

CODE = """\
import torch

def count(model):
\ttotal = sum(
\t\tp.numel() for p in model.parameters() if p.requires_grad
\t)
\treturn total, sum(p.numel() for p in model.parameters())
"""

# What GitHub needs of SARIF 2.1.0, and the types of everything that we write. The whole schema is 130 kB.
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
POSITIVE = {"type": "integer", "minimum": 1}
REGION = {
    "type": "object",
    "required": ["startLine"],
    "additionalProperties": False,
    "properties": dict.fromkeys(("startLine", "startColumn", "endLine", "endColumn"), POSITIVE),
}
ARTIFACT = {"type": "object", "required": ["uri"], "properties": {"uri": {"type": "string", "format": "uri-reference"}}}
REPLACEMENT = {
    "type": "object",
    "required": ["deletedRegion"],
    "additionalProperties": False,
    "properties": {"deletedRegion": REGION, "insertedContent": TEXT | {"properties": {"text": {"type": "string"}}}},
}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
RESULT = {
    "type": "object",
    "required": ["message", "ruleId", "locations"],
    "properties": {
        "level": LEVEL,
        "message": TEXT,
        "ruleIndex": {"type": "integer", "minimum": 0},
        "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
        "locations": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["physicalLocation"],
                "properties": {
                    "physicalLocation": {
                        "type": "object",
                        "required": ["artifactLocation", "region"],
                        "properties": {"artifactLocation": ARTIFACT, "region": REGION},
                    }
                },
            },
        },
        "fixes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["artifactChanges"],
                "properties": {
                    "description": TEXT,
                    "artifactChanges": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["artifactLocation", "replacements"],
                            "properties": {
                                "artifactLocation": ARTIFACT,
                                "replacements": {"type": "array", "minItems": 1, "items": REPLACEMENT},
                            },
                        },
                    },
                },
            },
        },
    },
}
SARIF = {
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool", "results"],
                "properties": {
                    "tool": {"type": "object", "required": ["driver"]},
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                    "results": {"type": "array", "items": RESULT},
                },
            },
        },
    },
}


@pytest.fixture
def report(run, tmp_path):
    def render(name: str, code: str = CODE) -> str:
        (tmp_path / "case.py").write_text(code)
        return run("--output-format", name, "case.py")[1]

    return render


def test_full_shows_the_line_and_a_caret_under_it(report):
    lines = report("full").splitlines()
    at = lines.index(
        "5 |         p.numel() for p in model.parameters() if p.requires_grad".replace("        ", "  ", 1)
    )
    assert lines[at + 1] == "  |   ^^^^^^^^^"
    assert any(line.startswith("    = help: use `count_params(model, trainable=True)`") for line in lines)


def test_full_cuts_long_lines(report):
    shown = report("full", "x = '" + "a" * 5000 + "'; n = sum(p.numel() for p in model.parameters())\n")
    caret = next(line for line in shown.splitlines() if line.endswith("^"))
    source = shown.splitlines()[shown.splitlines().index(caret) - 1]
    assert source[caret.index("^") : len(caret)] == "p.numel()"
    assert len(source) < 250


def test_concise(report):
    assert report("concise").splitlines()[0].startswith("case.py:5:3: QC002 [-] `p.numel()` counts")


def test_json(report):
    document = json.loads(report("json"))
    assert document["schema"] == 1
    first = document["findings"][0]
    assert (first["path"], first["line"], first["column"], first["end_column"]) == ("case.py", 5, 3, 12)
    assert first["fix"]["edits"][0]["text"] == "logical_numel(p)"


def test_github(report):
    first = report("github").splitlines()[0]
    assert first.startswith(
        "::error title=QC002 naive-trainable-count,file=case.py,line=5,col=3,endLine=5,endColumn=12::"
    )


def test_gitlab(report):
    issues = json.loads(report("gitlab"))
    assert {issue["severity"] for issue in issues} == {"major"}
    assert issues[0]["location"] == {
        "path": "case.py",
        "positions": {"begin": {"line": 5, "column": 3}, "end": {"line": 5, "column": 12}},
    }
    moved = json.loads(report("gitlab", "\n\n" + CODE))
    assert [issue["fingerprint"] for issue in issues] == [issue["fingerprint"] for issue in moved]
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)


def test_sarif(report):
    document = json.loads(report("sarif"))
    jsonschema.validate(document, SARIF)
    run = document["runs"][0]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    assert json.loads(report("sarif", "x = 1\n"))["runs"][0]["results"] == []


def test_junit(report):
    suite = ET.fromstring(report("junit"))[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")
    assert suite[0].find("failure").get("type") == "QC002"
    assert ET.fromstring(report("junit", "x = 1\n"))[0].get("failures") == "0"


EVIL = [
    pytest.param("\x1b[31mred\x1b[0m", id="colours"),
    pytest.param("a\u202eb\u2066c", id="bidirectional"),
    pytest.param("a\nb\r\n::error::x", id="lines"),
    pytest.param("##[error]x %0A %", id="older command"),
    pytest.param("a,file=b:c::d", id="properties"),
    pytest.param('<a href="x">&amp;\']]>', id="markup"),
    pytest.param("\udcff\x00\x9b\ufffe", id="no characters"),
    pytest.param("ä 漢 🎉", id="letters"),
]


def evil_report(text: str) -> Report:
    fix = Fix((Edit(1, 0, 1, 1, text),), (text,))
    finding = Finding(
        text + ".py", 1, 1, 1, 3, "QC001", "naive-parameter-count", "error", text, text, None, fix, (text,)
    )
    return Report((finding,), 1, (text,))


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_breaks_out(name, text):
    shown = renderer(name)(evil_report(text))
    shown.encode()
    if name in {"json", "gitlab", "sarif"}:
        json.loads(shown)
        return
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    if name == "github":
        command, properties, _ = re.split("::| title=", shown.removeprefix("::"), maxsplit=2)
        assert (command, shown.count("\n"), shown.count("##[")) == ("error", 1, 0)
        assert [part.partition("=")[0] for part in properties.split(",")][1:] == [
            "file",
            "line",
            "col",
            "endLine",
            "endColumn",
        ]
    if name == "junit":
        assert len(ET.fromstring(shown)[0]) == 2


def test_the_command_line_escapes_paths(run, tmp_path):
    (tmp_path / "a\x1b[31m.py").write_text("n = sum(p.numel() for p in model.parameters())\n")
    out = run(".")[1]
    assert "\x1b" not in out
    assert "a\\x1b[31m.py:1:9" in out
    status, _, err = run("b\n\x1b.py")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "\x1b" not in err
