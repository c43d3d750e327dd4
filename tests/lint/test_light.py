"""What a run costs before there is anything to say: no libcst, no torch, no rich, and little time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import quantcheck_lint

SOURCE_ROOT = Path(quantcheck_lint.__file__).parents[1]
SCRIPT = """\
import sys
from quantcheck_lint.cli import main
status = main(sys.argv[1:])
print(status, *sorted({name.partition(".")[0] for name in sys.modules} & {
    "libcst", "torch", "numpy", "transformers", "rich", "pytest", "pytest_quantcheck", "multiprocessing", "tomllib"}))
"""


def imported(*arguments: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--output-format", "json", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT)},
    )
    return done.stdout.split()


def test_a_clean_tree_needs_no_libcst(tmp_path):
    (tmp_path / "case.py").write_text("n = sum(1 for p in model.parameters())\nassert p.numel() == 0\n")
    assert imported("--output-file", "out.json", ".", cwd=tmp_path) == ["0"]


def test_a_finding_needs_libcst_and_nothing_else(tmp_path):
    (tmp_path / "case.py").write_text("n = sum(p.numel() for p in model.parameters())\n")
    assert set(imported("--output-file", "out.json", ".", cwd=tmp_path)) <= {"1", "libcst", "multiprocessing"}


def test_start_up_is_quick(tmp_path):
    """The best of five in processor time, which other processes don't change much; the benchmark has the wall time."""
    (tmp_path / "case.py").write_text("x = 1\n")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}

    def best(*command: str) -> float:
        times = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(times)

    assert best("-m", "quantcheck_lint", ".") - best("-c", "pass") < 0.3
