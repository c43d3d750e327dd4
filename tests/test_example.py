"""The sample repository: green as it is, red when its release grows, and what the message says makes it green again."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

from pytest_quantcheck import cli

EXAMPLE = Path(__file__).parents[1] / "docs/examples/release"
DOUBLE = ", bnb_4bit_use_double_quant=True"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of it, without what an earlier run has made, as the working directory."""
    shutil.copytree(EXAMPLE, tmp_path / "release", ignore=shutil.ignore_patterns("models", "report.html"))
    monkeypatch.chdir(tmp_path / "release")
    return tmp_path / "release"


def ci(repository, capsys, monkeypatch):
    """Run the steps of its workflow that are its own, and return the exit code and what was printed."""
    workflow = (repository / ".github/workflows/quantcheck.yml").read_text()
    commands = re.findall(r"- run: (python|quantcheck) (.+)", workflow)
    assert [program for program, _ in commands] == ["python", "quantcheck"]
    runpy.run_path(commands[0][1])
    capsys.readouterr()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(repository / "summary.md"))
    with pytest.raises(SystemExit) as exit_code:
        cli.main(commands[1][1].split())
    captured = capsys.readouterr()
    return exit_code.value.code, captured.out + captured.err


def test_ci_fails_over_the_budget_and_its_message_is_enough_to_fix_it(repository, capsys, monkeypatch):
    script = repository / "make_model.py"
    good = script.read_text()
    assert DOUBLE in good
    script.write_text(good.replace(DOUBLE, ""))
    code, said = ci(repository, capsys, monkeypatch)
    assert code == 1
    over = re.search(r"exceeds the budget of 3\.70 MB \(3,700,000 bytes\) by (.+ KB) \(2\.\d%\)", said)
    assert over, said
    assert "the limit is in quantcheck.toml:6" in said
    assert "The update server takes 3.7 MB." in said
    advice = re.search(r"up to (\S+ KB) .*  scales of 28 tensors: double quantization", said)
    assert advice, said
    assert float(advice[1].split()[0]) > float(over[1].split()[0])
    assert "::error file=quantcheck.toml,line=6,title=tiny-llama-nf4%3A size::" in said
    assert "| ❌ | `tiny-llama-nf4` | 3.78 MB |" in (repository / "summary.md").read_text()
    report = (repository / "report.html").read_text()
    assert "1 failed of 1 artifact" in report
    assert "double quantization" in report

    script.write_text(good)  # double quantization
    code, said = ci(repository, capsys, monkeypatch)
    assert (code, said.strip()) == (0, "1 artifact, 6 checks: all good")
    assert "1 artifact, 6 checks: all good" in (repository / "report.html").read_text()
