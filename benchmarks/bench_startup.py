"""What the plugin adds to a bare start of pytest, in milliseconds (goal: under 10)."""

from __future__ import annotations

import statistics
import sys
import tempfile

from benchmarks import measure

ROUNDS = 15


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bare = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "--rootdir",
            folder,
            folder,
            "-p",
            "no:cacheprovider",
        ]
        # An empty folder collects nothing and pytest says so with exit code 5.
        shell = ["sh", "-c", '"$@" >/dev/null; [ $? -eq 5 ]', "sh"]
        without, with_plugin = [*shell, *bare, "-p", "no:quantcheck"], [*shell, *bare]
        pairs = [(measure.run(without), measure.run(with_plugin)) for _ in range(ROUNDS + 1)][1:]
    for what in ("processor", "seconds"):
        times = [(getattr(one, what), getattr(other, what)) for one, other in pairs]
        added = statistics.median(with_it - without_it for without_it, with_it in times)
        base = statistics.median(without_it for without_it, _ in times)
        clock = {"processor": "processor time", "seconds": "wall time"}[what]
        print(f"{clock}: {1e3 * base:.0f} ms without the plugin, it adds {1e3 * added:+.1f} ms ({added / base:+.1%})")
