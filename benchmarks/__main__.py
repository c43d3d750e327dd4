"""Run every `bench_*.py` of this folder, or those whose names are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A process each: what one has once needed counts as the peak memory of those it starts.
ONE = """
from benchmarks import {name} as bench
print("\\n== {name}:", bench.__doc__.strip().splitlines()[0], flush=True)
bench.main()
"""


def main(wanted: list[str]) -> None:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if not wanted or path.stem.removeprefix("bench_") in wanted:
            subprocess.run([sys.executable, "-c", ONE.format(name=path.stem)], check=True)


main(sys.argv[1:])
