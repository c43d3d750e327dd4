"""Measuring whole processes: wall time and peak resident memory, taken in turns so that noise hits all alike."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Sample(NamedTuple):
    """One run of a process: seconds of wall and of processor time, and MB of peak resident memory."""

    seconds: float
    processor: float
    megabytes: float


class Result(NamedTuple):
    """What several runs of one command came to: the median time, the largest memory."""

    name: str
    seconds: float
    megabytes: float


def python(code: str) -> list[str]:
    """Return the command that runs a piece of Python."""
    return [sys.executable, "-c", code]


def run(command: Sequence[str]) -> Sample:
    """Run a command to its end; a failure is an error."""
    # Byte code is cached, as it is on a user's machine; nothing goes to the network.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    stderr = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{' '.join(command)[:200]} failed: {stderr.decode()[-2000:]}")
    return Sample(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def in_turns(commands: Mapping[str, Sequence[str]], rounds: int = 5) -> list[Result]:
    """Run all commands `rounds` times in turns, after one round that is not counted."""
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            sample = run(command)
            if number:
                samples[name].append(sample)
    return [
        Result(name, statistics.median(s.seconds for s in taken), max(s.megabytes for s in taken))
        for name, taken in samples.items()
    ]


def table(results: Sequence[Result]) -> None:
    """Print times and memory, each also as a multiple of the first row."""
    first = results[0]
    width = max(len(result.name) for result in results)
    print(f"{'':{width}}  {'seconds':>8}  {'times':>6}  {'peak MB':>8}  {'times':>6}")
    for result in results:
        slower, larger = result.seconds / first.seconds, result.megabytes / first.megabytes
        print(
            f"{result.name:{width}}  {result.seconds:8.3f}  {slower:6.1f}  {result.megabytes:8.0f}  {larger:6.1f}",
            flush=True,
        )
