"""The command line as it is used: exit codes, selection, configuration, suppressions, baselines, stdin."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest

NAIVE = "total = sum(p.numel() for p in model.parameters())\n"
TRAINABLE = "n = sum(p.numel() for p in model.parameters() if p.requires_grad)\n"
CLEAN = "total = count_params(model)\n"


@pytest.fixture
def tree(tmp_path):
    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_py", ".py").replace("_toml", ".toml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


EXITS = [
    pytest.param(CLEAN, [], 0, id="clean"),
    pytest.param(NAIVE, [], 1, id="a finding"),
    pytest.param(NAIVE, ["--exit-zero"], 0, id="a finding that is not to fail"),
    pytest.param("def f(m):\n  return sum(p.numel() for p in m.parameters()\n", [], 2, id="cannot parse"),
    pytest.param(
        "def f(m):\n  return sum(p.numel() for p in m.parameters()\n", ["--exit-zero"], 2, id="cannot parse, exit zero"
    ),
    pytest.param(
        "def f(m):\n  return sum(p.numel() for p in m.parameters()\n",
        ["--ignore", "QC900"],
        0,
        id="cannot parse, accepted",
    ),
    pytest.param(NAIVE, ["--ignore", "QC001"], 0, id="ignored"),
    pytest.param(NAIVE, ["--select", "QC002"], 0, id="another rule selected"),
    pytest.param(NAIVE, ["--select", "QC00"], 1, id="selected by prefix"),
    pytest.param(NAIVE, ["--select", "naive-parameter-count"], 1, id="selected by name"),
    pytest.param(NAIVE, ["--ignore", "QC", "--extend-select", "QC001"], 1, id="the longer prefix wins"),
    pytest.param(NAIVE, ["--per-file-ignores", "*.py:QC001"], 0, id="ignored per file"),
    pytest.param(NAIVE, ["--per-file-ignores", "tests/*:QC001"], 1, id="ignored in another file"),
    pytest.param(NAIVE, ["--exclude", "other"], 1, id="another file excluded"),
    pytest.param(NAIVE, ["--select", "QX"], 2, id="unknown rule"),
    pytest.param(NAIVE, ["--no-such-option"], 2, id="unknown option"),
    pytest.param(NAIVE, ["--output-format", "xml"], 2, id="unknown format"),
    pytest.param(NAIVE, ["--config", "missing.toml"], 2, id="missing configuration"),
    pytest.param(NAIVE, ["--baseline", "missing.json"], 2, id="missing baseline"),
    pytest.param(NAIVE, ["--per-file-ignores", "nonsense"], 2, id="not a pair"),
]


@pytest.mark.parametrize(("code", "arguments", "status"), EXITS)
def test_exit_codes(run, tree, code, arguments, status):
    tree(case_py=code)
    got, out, err = run(*arguments, "case.py")
    assert got == status
    assert "Traceback" not in out + err
    if status == 2:
        assert len(err.strip().splitlines()) == 1
        assert err.startswith("quantcheck-lint: error: ")


def test_check_is_the_default_command_and_the_current_folder_the_default_path(run, tree):
    tree(case_py=NAIVE)
    assert run()[0] == run("check")[0] == run(".")[0] == run("check", "case.py")[0] == 1


def test_a_missing_path_is_an_error(run):
    assert run("nowhere.py") == (2, "", "quantcheck-lint: error: nowhere.py: No such file or directory (path)\n")


def test_a_run_without_files_says_so(run):
    status, out, err = run(".")
    assert (status, out) == (2, "")
    assert err == "quantcheck-lint: error: .: no Python file or notebook found (nothing was checked)\n"


def test_a_broken_file_leaves_the_findings_of_the_others(run, tree):
    tree(broken_py=NAIVE + "x = sum(p.numel() for p in m.parameters()\n", good_py=NAIVE)
    status, out, err = run("--output-format", "concise", ".")
    assert status == 2
    assert "good.py:1:13: QC001" in out
    assert out.count("QC900") == 1
    assert err.startswith("quantcheck-lint: error: broken.py:")


def test_overlapping_roots_are_checked_once(run, tree):
    tree(a__case_py=NAIVE)
    out = json.loads(run("--output-format", "json", ".", "a", "a/case.py")[1])
    assert (out["files"], len(out["findings"])) == (1, 1)


# Files

IGNORES = [
    pytest.param("case.py\n", 2, id="name"),
    pytest.param("*.py\n!case.py\n", 1, id="taken back"),
    pytest.param("/sub/\n", 1, id="another folder"),
    pytest.param("# case.py\n", 1, id="comment"),
    pytest.param("**/case.py\n", 2, id="any folder"),
]


@pytest.mark.parametrize(("ignore", "status"), IGNORES)
def test_gitignore_is_respected(run, tree, tmp_path, ignore, status):
    tree(case_py=NAIVE)
    (tmp_path / ".gitignore").write_text(ignore)
    (tmp_path / ".git").mkdir()
    assert run(".")[0] == status
    assert run("--no-respect-gitignore", ".")[0] == 1
    assert run("case.py")[0] == 1


def test_default_excludes_and_named_files(run, tree):
    tree(venv__case_py=NAIVE, src__case_py=NAIVE)
    assert run(".")[1].count("QC001") == 1
    assert run("venv/case.py")[0] == 1
    assert run("--force-exclude", "venv/case.py")[0] == 0
    assert run("--extend-exclude", "src", ".")[0] == 2


def test_links_to_folders_are_not_followed(run, tree, tmp_path):
    tree(a__case_py=NAIVE)
    os.symlink("..", tmp_path / "a" / "loop")
    os.symlink("missing.py", tmp_path / "a" / "broken.py")
    os.mkfifo(tmp_path / "a" / "pipe.py")
    out = json.loads(run("--output-format", "json", ".")[1])
    assert out["files"] == 1


def test_a_pipe_is_not_opened(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    assert run("pipe.py") == (2, "", "quantcheck-lint: error: pipe.py: not a regular file (path)\n")


# Configuration

CONFIGS = [
    pytest.param('[tool.quantcheck.lint]\nignore = ["QC001"]\n', 0, id="ignore"),
    pytest.param('[tool.quantcheck.lint]\nselect = ["QC002"]\n', 0, id="select"),
    pytest.param('[tool.quantcheck.lint]\nextend-exclude = ["case.py"]\n', 2, id="exclude"),
    pytest.param('[tool.quantcheck.lint.per-file-ignores]\n"src/" = ["QC001"]\n', 0, id="per file, folder"),
    pytest.param('[tool.quantcheck.lint.per-file-ignores]\n"src/**/case.py" = ["QC001"]\n', 0, id="per file, glob"),
    pytest.param("[tool.quantcheck]\n", 1, id="no table of ours"),
    pytest.param('[tool.quantcheck.lint]\nselct = ["QC002"]\n', 2, id="unknown key"),
    pytest.param('[tool.quantcheck.lint]\nselect = "QC002"\n', 2, id="wrong type"),
    pytest.param("[tool.quantcheck.lint\n", 2, id="not TOML"),
]


@pytest.mark.parametrize(("text", "status"), CONFIGS)
def test_configuration_is_found_upward(run, tree, text, status):
    tree(pyproject_toml=text, src__pkg__case_py=NAIVE)
    assert run("src/pkg")[0] == status
    assert run("--isolated", "src/pkg")[0] == 1


def test_the_nearest_configuration_with_our_table_holds(run, tree):
    tree(
        pyproject_toml='[tool.quantcheck.lint]\nignore = ["QC001"]\n',
        sub__pyproject_toml="[project]\nname = 'x'\n",
        sub__case_py=NAIVE,
    )
    assert run("sub")[0] == 0


def test_the_command_line_wins(run, tree):
    tree(pyproject_toml='[tool.quantcheck.lint]\nselect = ["QC002"]\n', case_py=NAIVE)
    assert run(".")[0] == 0
    assert run("--select", "QC001", ".")[0] == 1
    assert run("--extend-select", "QC001", ".")[0] == 1


def test_preview_rules_are_off_unless_asked_for(run, tree):
    tree(case_py="def count(params):\n    return sum(p.numel() for p in params)\n")
    assert run(".")[0] == 0
    assert run("--preview", ".")[0] == 1
    status, _, err = run("--select", "QC006", ".")
    assert status == 2
    assert "preview" in err


# Suppressions

SUPPRESSED = [
    pytest.param("# noqa", id="blanket noqa"),
    pytest.param("# noqa: QC001", id="noqa with the code"),
    pytest.param("# noqa:QC001", id="no space"),
    pytest.param("# NOQA: qc001", id="any case"),
    pytest.param("# noqa: QC001,RUF100", id="several codes"),
    pytest.param("# noqa: F401 QC001", id="codes without comma"),
    pytest.param("# noqa: QC0", id="prefix"),
    pytest.param("# type: ignore  # noqa: QC001", id="second comment"),
    pytest.param("# noqa: QC001 the base is not quantized", id="with a reason"),
    pytest.param("# quantcheck: ignore", id="ours, blanket"),
    pytest.param("# quantcheck: ignore[QC001]", id="ours"),
    pytest.param("# quantcheck: ignore[QC002, QC001]", id="ours, several"),
]


@pytest.mark.parametrize("comment", SUPPRESSED)
def test_suppressed_on_the_line(run, tree, comment):
    tree(case_py=f"{NAIVE.rstrip()}  {comment}\n")
    assert run("--ignore", "QC100", ".")[0] == 0


@pytest.mark.parametrize(
    "comment", ["# noqa: QC002", "# noqa: F401", "# nosec", "# noqaQC001", "# quantcheck: ignore[QC002]"]
)
def test_other_comments_suppress_nothing(run, tree, comment):
    tree(case_py=f"{NAIVE.rstrip()}  {comment}\n")
    assert "QC001" in run(".")[1]


FILE_LEVEL = [
    "# quantcheck: ignore-file",
    "# quantcheck: ignore-file[QC001]",
    "# quantcheck: noqa",
    "# quantcheck: noqa: QC001",
    "# ruff: noqa: QC001",
    "# flake8: noqa: QC001",
]


@pytest.mark.parametrize("comment", FILE_LEVEL)
def test_suppressed_for_the_file(run, tree, comment):
    tree(case_py=f"{comment}\n{NAIVE}\n\n{NAIVE}")
    assert run(".")[0] == 0


def test_blanket_comments_of_other_tools_are_about_them(run, tree):
    tree(case_py=f"# ruff: noqa\n# flake8: noqa\n{NAIVE}")
    assert run(".")[0] == 1


def test_a_comment_anywhere_on_the_statement_counts(run, tree):
    tree(case_py="n = sum(\n    p.numel()\n    for p in model.parameters()\n)  # noqa: QC001\n")
    assert run(".")[0] == 0


def test_unused_suppressions_respect_rules_that_are_off(run, tree):
    tree(case_py="x = 1  # noqa: QC001\n")
    assert run(".")[0] == 1
    assert run("--ignore", "QC001", ".")[0] == 0
    assert run("--per-file-ignores", "*.py:QC100", ".")[0] == 0


def test_add_noqa(run, tree, tmp_path):
    code = (
        NAIVE
        + "x = sum(\n    p.numel()\n    for p in model.parameters()\n)\ny = 1  # noqa: E501\n"
        + TRAINABLE.rstrip()
        + "  # noqa: E501\n"
    )
    tree(case_py=code)
    assert run("--add-noqa=not quantized", ".")[0] == 0
    text = (tmp_path / "case.py").read_text()
    assert text.splitlines()[0].endswith("  # noqa: QC001 not quantized")
    assert text.splitlines()[2].endswith("p.numel()  # noqa: QC001 not quantized")
    assert text.splitlines()[-1].endswith("# noqa: E501, QC002")
    assert run(".")[0] == 0
    assert run("--add-noqa", ".")[0] == 0
    assert (tmp_path / "case.py").read_text() == text


def test_add_noqa_where_the_line_takes_no_comment(run, tree, tmp_path):
    tree(
        case_py="n = sum(p.numel() for p in model.parameters()) + \\\n    1\n"
        'print(f"""{sum(p.numel() for p in m.parameters())}\n""")\n'
    )
    run("--add-noqa", ".")
    lines = (tmp_path / "case.py").read_text().splitlines()
    assert [line.endswith("# noqa: QC001") for line in lines] == [False, True, False, True]
    assert run(".")[0] == 0


# Baselines


def test_baseline_counts_per_file_and_rule(run, tree, tmp_path):
    tree(case_py=NAIVE)
    assert run("--baseline", "base.json", "--write-baseline", ".")[0] == 0
    assert json.loads((tmp_path / "base.json").read_text()) == {"schema": 1, "counts": {"case.py": {"QC001": 1}}}
    assert run("--baseline", "base.json", ".")[0] == 0
    tree(case_py="\n\nimport os\n" + NAIVE)
    assert run("--baseline", "base.json", ".")[0] == 0
    tree(case_py=NAIVE + NAIVE)
    status, out, _ = run("--baseline", "base.json", ".")
    assert (status, out.count(": QC001")) == (1, 2)
    tree(case_py=NAIVE + TRAINABLE)
    assert "QC001" not in run("--baseline", "base.json", ".")[1]
    tree(case_py=CLEAN)
    status, _, err = run("--baseline", "base.json", ".")
    assert status == 0
    assert "allows 1 that are gone" in err


def test_baseline_from_the_configuration(run, tree, tmp_path):
    tree(pyproject_toml='[tool.quantcheck.lint]\nbaseline = "base.json"\n', src__case_py=NAIVE)
    assert run("--write-baseline", "src")[0] == 0
    assert (tmp_path / "base.json").exists()
    assert run("src")[0] == 0


def test_a_baseline_never_accepts_what_cannot_be_checked(run, tree):
    tree(case_py="def f(m):\n  return sum(p.numel() for p in m.parameters()\n")
    assert run("--baseline", "base.json", "--write-baseline", ".")[0] == 2
    assert run("--baseline", "base.json", ".")[0] == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2, "counts": {}}', '{"schema": 1, "counts": {"a": 1}}'])
def test_a_broken_baseline_is_an_error(run, tree, tmp_path, text):
    tree(case_py=NAIVE)
    (tmp_path / "base.json").write_text(text)
    status, _, err = run("--baseline", "base.json", ".")
    assert status == 2
    assert len(err.splitlines()) == 1


# Streams


def feed(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def test_stdin(run, monkeypatch):
    feed(monkeypatch, NAIVE)
    status, out, _ = run("--output-format", "concise", "--stdin-filename", "src/model.py", "-")
    assert status == 1
    assert out.startswith("src/model.py:1:13: QC001")


def test_stdin_fixed_goes_to_stdout(run, monkeypatch):
    feed(monkeypatch, NAIVE)
    status, out, _ = run("--unsafe-fixes", "-")
    assert status == 0
    assert (
        out
        == "from pytest_quantcheck import logical_numel\n\ntotal = sum(logical_numel(p) for p in model.parameters())\n"
    )


def test_stdin_diff(run, monkeypatch):
    feed(monkeypatch, NAIVE)
    status, out, _ = run("--diff", "--unsafe-fixes", "-")
    assert status == 1
    assert "+total = sum(logical_numel(p)" in out


def test_statistics(run, tree):
    tree(case_py=NAIVE + TRAINABLE + NAIVE)
    assert run("--statistics", ".") == (1, "2\tQC001\tnaive-parameter-count\n1\tQC002\tnaive-trainable-count\n", "")


def test_output_file(run, tree, tmp_path):
    tree(case_py=NAIVE)
    assert run("--output-format", "json", "--output-file", "out.json", ".")[:2] == (1, "")
    assert json.loads((tmp_path / "out.json").read_text())["findings"][0]["code"] == "QC001"


def test_jobs_change_nothing(run, tree):
    tree(**{f"d{i}__case_py": NAIVE if i % 2 else CLEAN for i in range(7)})
    assert run("--jobs", "1", ".") == run("--jobs", "3", ".")


def test_rule_and_rules(run):
    status, out, _ = run("rule", "QC001")
    assert status == 0
    assert out.startswith("# QC001 naive-parameter-count")
    assert run("rule", "naive-parameter-count")[1] == out
    assert run("rule", "QC999")[0] == 2
    listed = json.loads(run("rules", "--json")[1])
    assert listed[0]["code"] == "QC001"
    assert "QC100" in run("rules")[1]
    assert run("--version")[1].startswith("quantcheck-lint, version ")
    assert "--unsafe-fixes" in run("check", "--help")[1]
