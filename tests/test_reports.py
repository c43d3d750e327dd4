"""What the reports of a run promise beside being safe: whole, short where it is green, the same whatever the order."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from pytest_quantcheck.quantities import counted
from pytest_quantcheck.report import annotations, check_terminal, heatmap, html, junit, markdown, sinks, treemap
from tests import runs
from tests.layouts import Entry, write_file


def small(folder, **options):
    """An artifact of two matrices, 3 x 5 and 7 x 2 in bfloat16."""
    folder.mkdir()
    write_file(folder / "model.safetensors", [Entry("a.weight", "BF16", (3, 5)), Entry("b.weight", "BF16", (7, 2))])
    return runs.artifact(folder, **options)


@pytest.fixture
def green(tmp_path):
    return runs.run(small(tmp_path / "one"), small(tmp_path / "two"))


@pytest.fixture
def red(tmp_path):
    broken = [small(tmp_path / f"broken-{number}", budget=10) for number in (1, 2)]
    return runs.run(small(tmp_path / "good"), *broken, runs.unreadable("gone", "gone: no such file"))


def text(run, **options):
    return [line for line, _ in check_terminal.run_lines(run, **options)]


def test_green_is_one_line(green):
    assert text(green) == ["2 artifacts, 2 checks: all good"]
    assert annotations.render(green) == ""


def test_red_names_what_failed_and_nothing_else(red):
    lines = text(red)
    assert lines[-1] == "2 failed, 1 could not be checked of 4 artifacts"
    assert [line for line in lines if not line.startswith(" ")][:-1] == ["broken-1", "broken-2", "gone"]
    for report in (markdown.render(red).partition("###")[2], annotations.render(red)):
        assert "good" not in report
        assert all(name in report for name in ("broken-1", "broken-2", "gone"))


@pytest.mark.parametrize("screen", [24, 40, 60])
@pytest.mark.parametrize("number", [1, 3, 10, 300])
def test_the_terminal_takes_one_screen(tmp_path, number, screen):
    broken = small(tmp_path / "broken", budget=10)
    names = [f"artifact-{at}" for at in range(number)]
    lines = text(runs.run(*({**broken, "name": name} for name in names)), screen=screen)
    assert len(lines) <= screen
    assert lines[0] == "artifact-0"
    shown = sum("exceeds the budget" in line for line in lines)
    hidden = [line for line in lines if line.startswith("... and")]
    assert hidden == ([f"... and {counted(number - shown, 'more check')} that did not pass"] if shown < number else [])
    assert shown >= min(number, 5)


def test_a_short_check_leaves_its_lines_to_a_long_one(tmp_path):
    broken = small(tmp_path / "broken", budget=10)
    (long,) = broken["checks"]
    short = {**long, "details": []}
    broken["checks"] = [{**long, "details": [f"line {number}" for number in range(100)]}, short, short, short]
    lines = text(runs.run(broken), screen=40)
    assert "    line 25" in lines
    assert len(lines) <= 40


def test_a_project_says_its_words_once(tmp_path):
    broken = small(tmp_path / "broken", budget=10, message="Ask first.\nThen raise it.")
    broken["checks"] *= 3
    run = runs.run(broken)
    for lines in (text(run), markdown.render(run).splitlines()):
        assert sum(line.strip() == "Ask first." for line in lines) == 1
        assert sum(line.strip() == "Then raise it." for line in lines) == 1
    assert html.render(run).count("Ask first.") == 1


def test_a_page_that_shows_the_bytes_does_not_list_them_again(tmp_path):
    broken = small(tmp_path / "broken", budget=10)
    assert "where the bytes go:" not in html.render(runs.run(broken))
    assert "where the bytes go:" in html.render(runs.run({**broken, "inspect": None, "why": None}))


@pytest.mark.parametrize("before", [8, 9, 10])
def test_annotations_announce_nothing_that_is_cut(tmp_path, before):
    broken = small(tmp_path / "broken", budget=10)
    broken["checks"][0]["details"] = ["a line"] * before + ["largest:", "  one"]
    said = annotations.render(runs.run(broken)).rstrip("\n").split("%0A")
    assert len(said) == 1 + (9 if before == 9 else 10)
    assert not said[-1].endswith(":")


def test_annotations_give_each_artifact_one_before_any_has_two(tmp_path):
    broken = small(tmp_path / "broken", budget=10)
    broken["checks"] *= 3
    run = runs.run(*({**broken, "name": name} for name in ("one", "two")))
    titles = [line.partition("title=")[2].partition("%3A")[0] for line in annotations.render(run).splitlines()]
    assert titles == ["one", "two"] * 3


@pytest.mark.parametrize(
    ("where", "properties"),
    [("a,b.toml:12", "file=a%2Cb.toml,line=12,"), ("quantcheck.lock", "file=quantcheck.lock,"), (None, "")],
)
def test_annotations_point_at_the_limit(tmp_path, where, properties):
    broken = small(tmp_path / "broken", budget=10)
    broken["checks"][0]["where"] = where
    assert annotations.render(runs.run(broken)).startswith(
        f"::error {properties}title=broken%3A size-budget::file size"
    )


def test_a_job_summary_stays_under_what_github_takes(tmp_path):
    broken = small(tmp_path / "broken", budget=10)
    broken["checks"][0]["details"] = ["ü" * 1000] * 40
    summary = markdown.render(runs.run(*[broken] * 60))
    assert 500_000 < len(summary.encode()) < 1 << 20
    assert "more artifacts did not pass" in summary


def test_junit_counts_and_carries_the_numbers(red):
    root = ElementTree.fromstring(junit.render(red).encode())
    assert root.attrib == {"name": "quantcheck", "tests": "4", "failures": "2", "errors": "1"}
    properties = {found.get("name"): found.get("value") for found in root.findall("testsuite[1]/properties/property")}
    assert properties["logical_params"] == "29"
    assert properties["bytes.unquantized"] == "58"


def test_a_partial_run_says_so_everywhere(green):
    partial = {**green, "partial": True}
    assert text(partial)[-1].endswith("interrupted before every check was made")
    for report in (markdown, html):
        assert "interrupted before every check was made" in report.render(partial)


@pytest.mark.parametrize("kind", ["html", "markdown", "junit", "json"])
def test_the_same_run_gives_the_same_bytes(red, kind):
    assert sinks.render(red, kind) == sinks.render(red, kind)


def test_a_run_of_nothing_is_not_good():
    run = runs.run() | {"exit_code": 2}
    assert text(run) == ["nothing was checked"]
    assert 'class="bad"' in html.render(run)
    ElementTree.fromstring(junit.render(run).encode())


def rows(*tensors):
    keys = ("name", "scheme", "sqnr_db", "verdict")
    return {"tensors": [dict(zip(keys, tensor, strict=True)) for tensor in tensors]}


def test_the_heat_map_is_layer_by_module_and_shows_the_worst_expert():
    (grid,) = heatmap.grids(
        rows(
            ("m.layers.0.q.weight", "gptq", 20.0, "passed"),
            ("m.layers.10.q.weight", "gptq", 26.0, "passed"),
            ("m.layers.2.q.weight", "gptq", 1.0, "failed"),
            ("m.layers.2.experts.0.up.weight", "gptq", 22.0, "passed"),
            ("m.layers.2.experts.1.up.weight", "gptq", 21.0, "passed"),
            ("m.layers.2.norm.weight", "plain", 55.0, "passed"),
            ("embed.weight", "gptq", 90.0, "passed"),
        )
    )
    assert (grid.stack, grid.layers, list(grid.modules)) == ("m.layers", (0, 2, 10), ["experts.*.up", "q"])
    assert [cell and cell.worst for cell in grid.modules["q"]] == [20.0, 1.0, 26.0]
    assert [cell and cell.failed for cell in grid.modules["q"]] == [0, 1, 0]
    (expert,) = filter(None, grid.modules["experts.*.up"])
    assert (expert.worst, expert.tensors) == (21.0, 2)
    assert grid.low == 20.0  # what failed does not stretch the scale


def test_noise_does_not_look_like_a_pattern():
    (grid,) = heatmap.grids(rows(*((f"l.{at}.q", "gptq", 20 + at / 100, "passed") for at in range(9))))
    assert {cell.shade for cell in grid.modules["q"]} == {heatmap.SHADES - 1}


def tree(*sizes):
    """A component of layers of two tensors, and tensors of these sizes beside it."""
    parts = [
        {"level": "part", "name": "weight (codes)", "bytes": 600, "count": 1, "children": []},
        {"level": "part", "name": "absmax (scales)", "bytes": 400, "count": 1, "children": []},
    ]
    tensor = {"level": "tensor", "name": "q", "bytes": 1000, "count": 4, "children": parts}
    layers = {"level": "layers", "name": "m.0 to 3", "bytes": 2000, "count": 4, "children": [tensor, tensor]}
    stack = {"level": "component", "name": "m", "bytes": 2000, "count": 1, "children": [layers]}
    others = [
        {"level": "component", "name": f"(padding {at})", "bytes": size, "count": 1, "children": []}
        for at, size in enumerate(sizes)
    ]
    whole = 2000 + sum(sizes)
    return {"level": "artifact", "name": "x", "bytes": whole, "count": 1, "children": [stack, *others]}


@pytest.mark.parametrize("shape", treemap.SHAPES)
def test_areas_are_shares_and_stay_inside(shape):
    first, *_ = treemap.views(tree(1000, 500, 0, 3), "map")
    width, height = treemap.SHAPES[shape]
    cells = [cell for cell in first.cells[shape] if cell.steps_in == 0]
    assert [cell.branch.bytes for cell in cells] == [2000, 1000, 500, 3]
    for cell in cells:
        assert cell.width * cell.height == pytest.approx(width * height * cell.share)
    for cell in first.cells[shape]:
        assert -1e-6 <= cell.x <= cell.x + cell.width <= width + 1e-6
        assert -1e-6 <= cell.y <= cell.y + cell.height <= height + 1e-6


def test_a_branch_of_one_is_drawn_as_what_it_holds():
    found = treemap.views(tree(1000), "map")
    stack = found[0].path[-1].children[0]
    assert (stack.name, [child.name for child in stack.children]) == ("m.0 to 3 × 4", ["q × 4", "q × 4"])
    assert [child.kind for child in stack.children[0].children] == ["codes", "scales"]
    assert [view.path[-1].view for view in found] == ["map-0", "map-1", "map-2", "map-3"]


def test_the_smallest_of_many_are_one_rectangle():
    first, *_ = treemap.views(tree(*range(1, 101)), "map")
    (rest,) = (branch for branch in first.path[-1].children if branch.name.endswith("smaller"))
    assert rest.name == f"{101 - treemap.MOST} smaller"
    assert len(first.path[-1].children) == treemap.MOST + 1
    assert sum(branch.bytes for branch in first.path[-1].children) == 2000 + 5050


def test_without_its_libraries_html_says_what_to_install():
    code = (
        "import sys; sys.modules['jinja2'] = None; from pytest_quantcheck.report import html\n"
        "try: html.render({})\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "the HTML report needs jinja2: pip install 'pytest-quantcheck[report]'\n"


def test_reports_import_neither_torch_nor_numpy():
    modules = "annotations check_terminal html junit markdown treemap heatmap tensor_table"
    code = (
        "import sys, importlib;"
        f"[importlib.import_module('pytest_quantcheck.report.' + name) for name in '{modules}'.split()];"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
