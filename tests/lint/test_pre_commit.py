"""The hooks, really run by pre-commit from a tagged clone of this repository.

pre-commit builds an environment with pip, so this needs a network and a minute: it runs when
`QUANTCHECK_TEST_PRE_COMMIT=1` is set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_check import small

pytestmark = pytest.mark.skipif(
    os.environ.get("QUANTCHECK_TEST_PRE_COMMIT") != "1", reason="QUANTCHECK_TEST_PRE_COMMIT=1 is not set: needs pip"
)
ROOT = Path(__file__).parents[2]
NAIVE = "n = sum(p.numel() for p in model.parameters())\n"
AUTHOR = {
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@example.org",
}
CONFIG = """\
repos:
  - repo: {clone}
    rev: v0.0.1
    hooks:
      - id: {hook}
        args: {arguments}
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of this repository, uncommitted work included, under a tag."""
    path = tmp_path_factory.mktemp("clone")
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "state"], ["tag", "v0.0.1"]):
        subprocess.run(["git", *command], cwd=path, check=True, env={**os.environ, **AUTHOR})
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def hook(clone, home, tmp_path):
    """Run one hook over all files of a project; exit code, output, and the project."""

    def run(name: str, arguments: str = "[]", **files: str) -> tuple[int, str, Path]:
        for file, text in files.items():
            (tmp_path / f"{file}.py").write_text(text)
        (tmp_path / ".pre-commit-config.yaml").write_text(CONFIG.format(clone=clone, hook=name, arguments=arguments))
        environment = {**os.environ, **AUTHOR, "PRE_COMMIT_HOME": str(home)}
        environment.pop("PYTHONPATH", None)
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
        done = subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "--all-files", "--color=never"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr, tmp_path

    return run


def test_the_hook_passes_and_fails_as_it_should(hook):
    assert hook("quantcheck-lint", clean="n = 1\n")[0] == 0
    status, out, _ = hook("quantcheck-lint", clean="n = 1\n", naive=NAIVE)
    assert status == 1
    assert "naive.py:1:9: QC001" in out
    assert hook("quantcheck-lint", "[--ignore, QC001]", naive=NAIVE)[0] == 0


def test_the_fixing_hook_fixes_what_it_is_allowed_to(hook):
    status, out, project = hook("quantcheck-lint-fix", case=NAIVE)
    assert status == 1
    assert (project / "case.py").read_text() == NAIVE
    status, out, project = hook("quantcheck-lint-fix", "[--unsafe-fixes]", case=NAIVE)
    assert status == 1
    assert "files were modified by this hook" in out
    assert "logical_numel(p)" in (project / "case.py").read_text()
    assert hook("quantcheck-lint-fix", "[--unsafe-fixes]")[0] == 0


def test_the_size_hook_weighs_what_changed(hook, tmp_path):
    small(tmp_path / "model")
    (tmp_path / "quantcheck.toml").write_text('[[artifact]]\npath = "model"\nsize = "10 KB"\n')
    assert hook("quantcheck-size")[0] == 0
    (tmp_path / "quantcheck.toml").write_text('[[artifact]]\npath = "model"\nsize = "9 KB"\n')
    status, out, _ = hook("quantcheck-size")
    assert status == 1
    assert "exceeds the budget of 9.00 KB (9,000 bytes) by 121 B" in out


def test_the_environment_has_no_torch(hook, home):
    hook("quantcheck-lint", clean="n = 1\n")
    installed = {path.name for path in home.glob("repo*/py_env-*/lib/python*/site-packages/*")}
    assert "quantcheck_lint" in installed
    assert not {"torch", "numpy", "transformers"} & installed
