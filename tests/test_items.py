"""quantcheck.toml as tests of pytest, run by pytest itself: ids, choice, workers, reports."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tests.test_check import PARAMS, artifact, quantcheck, small

ARGUMENTS = ("-p", "no:randomly", "-p", "no:sybil", "-p", "no:hypothesispytest")


@pytest.fixture
def project(pytester, monkeypatch):
    """Two artifacts, four checks, one of them failing."""
    for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    small(pytester.path / "good-nf4")
    small(pytester.path / "large-nf4", rows=133)
    text = artifact("good-nf4", logical_params=PARAMS, size='"10 KB"')
    text += artifact("large-nf4", bits_per_weight=5, size='"10 KB"', message='"see the handbook"', marks='["nightly"]')
    (pytester.path / "quantcheck.toml").write_text(text)
    pytester.makeini("[pytest]\nmarkers = nightly: made at night\n")
    return pytester


def run(project, *arguments):
    return project.runpytest(*ARGUMENTS, *arguments)


def ids(result):
    return [line.split(" ")[0] for line in result.outlines if line.startswith("quantcheck.toml::") and "%]" in line]


def test_each_check_is_a_test_with_a_readable_id(project):
    result = run(project, "quantcheck.toml", "-v", "--strict-markers")
    result.assert_outcomes(passed=3, failed=1)
    assert ids(result) == [
        "quantcheck.toml::good-nf4::logical_params",
        "quantcheck.toml::good-nf4::size",
        "quantcheck.toml::large-nf4::size",
        "quantcheck.toml::large-nf4::bits_per_weight",
    ]


def test_a_failure_is_its_message_and_no_traceback(project):
    result = run(project, "quantcheck.toml")
    result.stdout.fnmatch_lines(
        [
            "*large-nf4::size*",
            "file size: 21.93 KB (21,930 bytes) exceeds the budget of 10.00 KB (10,000 bytes) by 11.93 KB (119.3%)",
            "  the limit is in quantcheck.toml:8",
            "  see the handbook",
            "*= quantcheck =*",
            "large-nf4::size  file size: *",
            "  could be saved (quantcheck why has the rest):",
            "    up to 12.04 KB (11.76 KiB)  embed_tokens.weight: quantized like the rest, *",
        ]
    )
    result.stdout.no_fnmatch_line("*runtest*")


CHOSEN = [
    (["quantcheck.toml::good-nf4::size"], 1, 0),
    (["quantcheck.toml::large-nf4"], 1, 1),
    (["quantcheck.toml", "-k", "size"], 1, 1),
    (["quantcheck.toml", "-k", "good-nf4 and size"], 1, 0),
    (["quantcheck.toml", "-m", "nightly"], 1, 1),
    (["quantcheck.toml", "-m", "quantcheck and not nightly"], 2, 0),
    (["quantcheck.toml", "-x"], 2, 1),
]


@pytest.mark.parametrize(("arguments", "passed", "failed"), CHOSEN, ids=[" ".join(row[0]) for row in CHOSEN])
def test_checks_are_chosen_as_tests_are(project, arguments, passed, failed):
    result = run(project, *arguments, "--quantcheck-json=run.json")
    result.assert_outcomes(passed=passed, failed=failed, deselected=None)
    found = json.loads((project.path / "run.json").read_text())
    assert sum(len(entry["checks"]) for entry in found["artifacts"]) == passed + failed
    assert found["partial"] is ("-x" in arguments)


def test_the_last_failure_is_run_again(project):
    run(project, "quantcheck.toml")
    run(project, "quantcheck.toml", "--lf").assert_outcomes(failed=1)


def test_quiet_when_green(project):
    result = run(project, "quantcheck.toml::good-nf4")
    result.assert_outcomes(passed=2)
    assert "= quantcheck =" not in result.stdout.str()


COLLECTED = {
    "not-by-walking": ([], "", 0),
    "named-in-testpaths": ([], "testpaths = quantcheck.toml\n", 4),
    "named-as-an-argument": (["quantcheck.toml"], "", 4),
    "named-with-its-folder": (["."], "", 0),
}


@pytest.mark.parametrize("case", COLLECTED)
def test_a_configuration_is_collected_where_it_is_named(project, case):
    arguments, setting, count = COLLECTED[case]
    project.makeini(f"[pytest]\nmarkers = nightly: made at night\n{setting}")
    result = run(project, *arguments, "--collect-only", "-q")
    assert sum(line.startswith("quantcheck.toml::") for line in result.outlines) == count


def test_the_table_in_pyproject_is_collected_where_it_is_named(project):
    text = (project.path / "quantcheck.toml").read_text().replace("[[artifact", "[[tool.quantcheck.artifact")
    (project.path / "pyproject.toml").write_text(text)
    result = run(project, "pyproject.toml::good-nf4")
    result.assert_outcomes(passed=2)


def test_pytest_two_workers_and_the_command_line_make_the_same_report(project, monkeypatch):
    run(project, "quantcheck.toml", "--quantcheck-json=one.json")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project.path / "summary.md"))
    two = run(project, "quantcheck.toml", "--quantcheck-json=two.json", "--quantcheck-markdown=two.md", "-n", "2")
    two.assert_outcomes(passed=3, failed=1)
    alone = quantcheck("check", "--json", cwd=project.path).stdout
    one = (project.path / "one.json").read_text()
    assert one == (project.path / "two.json").read_text() == alone
    assert json.loads(one)["exit_code"] == 1
    assert "exceeds the budget" in (project.path / "two.md").read_text()
    # Github is told by the controller alone.
    assert sum(line.startswith("::error file=quantcheck.toml,line=8,") for line in two.outlines) == 1
    assert (project.path / "summary.md").read_text() == (project.path / "two.md").read_text()


def test_a_worker_that_dies_leaves_the_results_of_the_others(project):
    project.makeconftest(
        """
        import os

        def pytest_runtest_call(item):
            if item.nodeid == "quantcheck.toml::good-nf4::size":
                os._exit(1)
        """
    )
    result = run(project, "quantcheck.toml", "-n", "2", "--quantcheck-json=run.json")
    result.assert_outcomes(passed=2, failed=2)
    found = json.loads((project.path / "run.json").read_text())
    checks = {(entry["name"], check["check"]): check for entry in found["artifacts"] for check in entry["checks"]}
    assert {key: check["status"] for key, check in checks.items()} == {
        ("good-nf4", "logical_params"): "passed",
        ("good-nf4", "size"): "error",
        ("large-nf4", "size"): "failed",
        ("large-nf4", "bits_per_weight"): "passed",
    }
    assert checks["good-nf4", "size"]["headline"] == "size: the process that made this check died"


def test_numbers_are_properties_of_pytests_own_junit_report(project):
    run(project, "quantcheck.toml::good-nf4::size", "--junitxml=junit.xml", "-o", "junit_family=xunit2")
    root = ElementTree.parse(project.path / "junit.xml").getroot()
    properties = {node.get("name"): node.get("value") for node in root.iter("property")}
    assert properties == {"quantcheck_measured": "9121", "quantcheck_allowed": "10000", "quantcheck_unit": "bytes"}


def test_a_report_that_cannot_be_written_fails_the_run(project):
    (project.path / "file").write_text("")
    result = run(project, "quantcheck.toml::good-nf4", "--quantcheck-json=file/run.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*= quantcheck =*", "quantcheck: error: *file*"])


BAD = {
    "unknown-key": ("sise = 1", "quantcheck.toml:3: unknown key `sise`"),
    "escape-codes": ('"\\u001b[31m" = 1', r"unknown key `\x1b[[]31m`"),
    "unknown-mark": ('size = 1\nmarks = ["nihgtly"]', "*'nihgtly' not found in `markers` configuration option"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_configuration_that_makes_no_sense_is_an_error_of_the_collection(project, case):
    written, said = BAD[case]
    (project.path / "quantcheck.toml").write_text(f'[[artifact]]\npath = "good-nf4"\n{written}\n')
    result = run(project, "quantcheck.toml", "--strict-markers")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{said}*"])
    assert "\x1b" not in result.stdout.str()
