"""Text from a checkpoint stays text: each sink is parsed by a parser of its format, for each nasty name."""

from __future__ import annotations

import json
import re
from collections import Counter
from xml.etree import ElementTree

import html5lib
import pyte
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from pytest_quantcheck.artifact import inspect
from pytest_quantcheck.checks import diff, fidelity, tree, why
from pytest_quantcheck.errors import printable
from pytest_quantcheck.report import annotations, check_terminal, html, junit, markdown, sizes, terminal
from pytest_quantcheck.report import json as documents
from tests import layouts, runner_commands, runs
from tests.browser import chromium, needs_chromium

NASTY = {
    "escape-codes": "a\x1b[31mred\x1b]0;pwned\x07\x1b[2J.weight",
    "C1-codes": "a\x9b31m\x9d0;pwned\x9c.weight",
    "NUL": "a\0b.weight",
    "end-of-script": "</script><script>pwned=1</script>.weight",
    "image": "\"'><img src=x onerror=pwned=1>.weight",
    "attribute": "\" onmouseover='pwned=1' x=\".weight",
    "comment": "<!--<script>.weight",
    "end-of-style": "</style></title><svg onload=pwned=1>.weight",
    "template": "{{ 7 * 7 }}{% raw %}.weight",
    "end-of-cdata": "]]>.weight",
    "entities": "&lt;b&gt;&#0;&amp;.weight",
    "command": "::error title=pwned::boo",
    "command-after-space": " \t ::stop-commands::pwned",
    "command-of-old": "a##[error]pwned",
    "command-of-azure": "##vso[task.complete result=Succeeded;]pwned",
    "command-with-invisible": "#\u200b#[error]pwned, #\u00ad#[error]pwned, #\ufe0f#[error]pwned",
    "escaped-command": "%0A::error::pwned%25%3A%2C,:",
    "pipes": "a|b||c\\|d\\\\|e",
    "backticks": "``` a ` b `` c ````",
    "markdown": "**b** [x](http://pwned.example) ![i](http://pwned.example) www.pwned.example @all #1 <b>",
    "list": "- [ ] a",
    "formula": "=cmd|' /C calc'!A0",
    "bidi": "a\u202egnp\u2066.weight",
    "lone-surrogate": "a\ud800b\udfff.weight",
    "not-in-XML": "a\ufffe\uffffb.weight",
    "lines": "a\n::error::pwned\r\n## heading\u2028b\x85\x0bc",
    "long": "x" * 3000,
    "spaces": "  a  b ",
}
FOREIGN = "img, iframe, object, embed, base, form, link:not([rel=icon])"
BENIGN = "layer.weight"


def made(folder, name):
    """A checkpoint with one matrix of that name, and one to compare it with that is something else."""
    for kind, content in (("new", b"\x80\x3f" * 15), ("old", b"\0\0" * 15)):
        (folder / kind).mkdir(parents=True)
        entry = layouts.Entry(name, "BF16", (3, 5), content)
        layouts.write_file(folder / kind / "model.safetensors", [entry])
    return folder / "new", folder / "old"


@pytest.fixture(scope="session", params=NASTY)
def nasty(request, tmp_path_factory):
    """The name, and a run in which its tensor is too large, wrong and new."""
    name = NASTY[request.param]
    return name, a_run(tmp_path_factory.mktemp("nasty"), name)


@pytest.fixture(scope="module")
def benign_elements(benign):
    return skeleton(html.render(benign))[0]


@pytest.fixture(scope="session")
def benign(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("benign"), BENIGN)


def a_run(folder, name):
    new, old = made(folder, name)
    found = runs.artifact(new, name=name, budget=10, reference=old, baseline=old, message=f"{name}\n{name}")
    return runs.run(found, runs.unreadable(name, f"{name}: is not there"))


def skeleton(text):
    """The elements of a page with the names of their attributes; a page that does not parse is an error."""
    page = html5lib.HTMLParser(strict=True, tree=html5lib.getTreeBuilder("etree")).parse(text)
    return Counter((element.tag, tuple(sorted(element.keys()))) for element in page.iter()), page


def test_html_has_the_same_elements_whatever_the_name(nasty, benign_elements):
    name, run = nasty
    elements, page = skeleton(html.render(run))
    label = ("{http://www.w3.org/2000/svg}text", ("x", "y"))  # there where it fits
    extra = elements - benign_elements
    assert not {key: number for key, number in extra.items() if key != label}
    texts = "".join(page.itertext())
    assert texts.count(printable(name)) >= 5
    rows = next(element for element in page.iter() if element.get("type") == "application/json")
    assert json.loads(rows.text)[0][0] == printable(name)


@needs_chromium
def test_html_in_a_browser_runs_and_asks_for_nothing(tmp_path):
    found = [a_run(tmp_path / key, name)["artifacts"] for key, name in NASTY.items()]
    page = tmp_path / "report.html"
    page.write_text(html.render(runs.run(*(artifact for pair in found for artifact in pair))))
    with chromium(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.run("typeof pwned") == "undefined"
        assert browser.run("document.scripts.length") == len(NASTY) + 1
        assert browser.run(f"document.querySelectorAll({FOREIGN!r}).length") == 0
        names = browser.run(
            "[...document.querySelectorAll('.tensors tbody tr td:first-child')].map(cell => cell.textContent)"
        )
        assert names == [printable(name) for name in NASTY.values()]
        assert browser.requests == [page.as_uri()]
        assert not browser.complaints


def test_markdown_has_names_in_code_only(nasty, benign):
    name, run = nasty
    parsed, expected = (MarkdownIt("commonmark").enable("table").parse(markdown.render(each)) for each in (run, benign))
    assert [token.type for token in parsed] == [token.type for token in expected]
    inside = [child for token in parsed for child in token.children or ()]
    assert {child.type for child in inside} <= {"text", "code_inline", "strong_open", "strong_close"}
    assert "pwned" not in "".join(child.content for child in inside if child.type == "text")
    spans = [child.content for child in inside if child.type == "code_inline"]
    assert spans.count(printable(name)) >= 2
    assert spans.count(printable(name).replace("|", "\\x7c")) >= 2
    fences = [token.content for token in parsed if token.type == "fence"]
    assert sum(text.count(printable(name)) for text in fences) >= 3


def test_junit_is_well_formed_and_gives_the_name_back(nasty, benign):
    name, run = nasty
    found, expected = (ElementTree.fromstring(junit.render(each).encode()) for each in (run, benign))
    assert [element.tag for element in found.iter()] == [element.tag for element in expected.iter()]
    assert {suite.get("name") for suite in found} == {printable(name)}
    assert (found.get("tests"), found.get("failures"), found.get("errors")) == ("3", "2", "1")
    assert all(printable(name) in failure.text for failure in found.iter("failure"))


def test_annotations_are_the_commands_meant_and_no_others(nasty):
    name, run = nasty
    lines = annotations.render(run).split("\n")
    commands = [runner_commands.parse(line) for line in lines if line]
    assert [command.name for command in commands] == ["error"] * 3
    size, unread, wrong = commands
    assert size.properties == {"file": "quantcheck.toml", "line": "4", "title": f"{printable(name)}: size-budget"}
    assert unread.properties == {"file": "quantcheck.toml", "line": "10", "title": printable(name).rstrip()}
    assert wrong.properties["line"] == "7"
    assert all(printable(name) in command.text for command in commands)


def printed(name, run, folder, console):
    new, old = map(inspect, made(folder, name))
    terminal.print_artifact(new)
    sizes.print_explanation(why.explain(new), tree.tree(new, 4))
    sizes.print_difference(diff.difference(old, new), 5)
    sizes.print_difference(diff.difference(inspect(made(folder / "x", BENIGN)[0]), new), 5)
    terminal.print_comparison(fidelity.compare(new, old))
    check_terminal.print_run(run, console)
    for checked in run["artifacts"][0]["checks"]:
        print("\n".join(check_terminal.check_lines(checked)))
    print(documents.dumps(documents.of_artifact(new)))


def test_log_of_a_workflow_holds_no_command(nasty, tmp_path, capsys):
    name, run = nasty
    printed(name, run, tmp_path, None)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if runner_commands.parse(line) or "##" in line] == []
    assert out.count(printable(name)) >= 10
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", out) is None


def test_terminal_shows_the_name_and_obeys_only_our_colours(nasty, tmp_path, monkeypatch, capsys):
    name, run = nasty
    width = 300 + len(printable(name))  # no line is broken
    console = Console(force_terminal=True, width=width, color_system="standard", highlight=False)
    monkeypatch.setattr(terminal, "open_console", lambda: console)
    monkeypatch.setattr(sizes, "open_console", lambda: console)
    printed(name, run, tmp_path, console)
    screen = pyte.Screen(width, 200)
    pyte.Stream(screen).feed(capsys.readouterr().out.replace("\n", "\r\n"))
    assert screen.title == ""
    shown = "\n".join(screen.display)
    assert shown.count(printable(name)) >= 10
    assert "logical shape" in shown.partition(printable(name))[0]  # the first line is still there


def test_json_keeps_the_name_as_it_is(nasty, tmp_path):
    name, _ = nasty
    text = documents.dumps(documents.of_artifact(inspect(made(tmp_path, name)[0])))
    assert json.loads(text)["tensors"][0]["name"] == name
