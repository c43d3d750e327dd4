"""Linting the installed transformers, torch and peft beside ruff; start-up; torchfix on a sample if it is installed.

All with cold caches of their own (`--no-cache`, `--isolated`) and a warm page cache. Exit codes are off: the trees have
findings. The goal is ruff's wall time with its default rules, and 100 times torchfix.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks import measure

PACKAGES = ("transformers", "torch", "peft")
# torchfix needs minutes for what follows seconds of ours; 60 files with a count in them are enough to see the ratio.
SAMPLE = 60
LINT = [sys.executable, "-m", "quantcheck_lint", "--isolated", "--exit-zero", "--quiet"]


def installed() -> list[str]:
    """The folders of the packages that are there, without importing them."""
    specs = (find_spec(name) for name in PACKAGES)
    return [folder for spec in specs if spec for folder in spec.submodule_search_locations or ()]


def sample(trees: list[str], into: Path) -> str:
    """A folder with copies of the first files that read sizes."""
    found = (path for tree in trees for path in sorted(Path(tree).rglob("*.py")) if b".numel()" in path.read_bytes())
    for number, path in zip(range(SAMPLE), found, strict=False):
        shutil.copy(path, into / f"case_{number}.py")
    return str(into)


def main() -> None:
    trees = installed()
    files = sum(1 for tree in trees for _ in Path(tree).rglob("*.py"))
    print(f"{', '.join(Path(tree).name for tree in trees)}: {files} files")
    ruff = ["ruff", "check", "--isolated", "--no-cache", "--exit-zero", "--quiet"]
    commands = {
        "quantcheck-lint": [*LINT, *trees],
        "quantcheck-lint, one process": [*LINT, "--jobs", "1", *trees],
        "ruff check, default rules": [sys.executable, "-m", *ruff, *trees],
        "ruff check, one rule": [sys.executable, "-m", *ruff, "--select", "F401", *trees],
    }
    measure.table(measure.in_turns(commands, rounds=3))
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "clean"
        clean.mkdir()
        for number in range(20):
            (clean / f"module_{number}.py").write_text("def f(x):\n    return x + 1\n")
        print("\nstart-up on 20 clean files (goal: 0.15 s)")
        measure.table(measure.in_turns({"quantcheck-lint": [*LINT, str(clean)]}))
        torchfix = shutil.which("torchfix")
        if torchfix is None:
            print("\ntorchfix is not installed: not measured")
            return
        some = Path(folder) / "some"
        some.mkdir()
        print(f"\n{SAMPLE} files that read sizes (goal: torchfix takes 100 times as long)")
        taken = sample(trees, some)
        measure.table(measure.in_turns({"quantcheck-lint": [*LINT, taken], "torchfix": [torchfix, taken]}, rounds=1))
