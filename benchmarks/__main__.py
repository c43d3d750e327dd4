"""Run every `bench_*.py` of this folder, or those whose names are given."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def main(wanted: list[str]) -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    for name in names:
        if not wanted or name.removeprefix("bench_") in wanted:
            module = import_module(f"benchmarks.{name}")
            print(f"\n== {name}: {(module.__doc__ or '').strip().splitlines()[0]}")
            module.main()


main(sys.argv[1:])
