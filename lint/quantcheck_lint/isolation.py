"""Checks a source that may kill the parser in a process of its own, with limits on time and memory."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantcheck_lint.finding import CannotRead
from quantcheck_lint.source import Source

if TYPE_CHECKING:
    from quantcheck_lint.engine import Checked

MEMORY = 2 << 30
STACK = 256 << 20
RECURSION = 20_000
_MAIN = "from quantcheck_lint.isolation import child; child()"


def check_apart(source: Source, codes: Sequence[str], timeout: float) -> Checked:
    """What `engine.check` finds, or `CannotRead` that says what the child died of."""
    # The child finds packages where we do, and nothing in the current folder, which belongs to a stranger.
    path = os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _MAIN],
            input=pickle.dumps((source, tuple(codes), timeout)),
            capture_output=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise CannotRead("parsing takes too long", f"limit {timeout:g} s") from None
    if done.returncode:
        raise CannotRead(*_cause(done.returncode, timeout))
    answer: Checked | CannotRead = pickle.loads(done.stdout)
    if isinstance(answer, CannotRead):
        raise answer
    return answer


def _cause(code: int, timeout: float) -> tuple[str, str]:
    if code in {-signal.SIGXCPU, -signal.SIGKILL}:
        return "parsing takes too long", f"limit {timeout:g} s"
    if code in {EXIT_MEMORY, -signal.SIGABRT}:
        return "parsing needs too much memory", f"limit {MEMORY >> 20} MiB"
    died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"nested too deeply: the parser died of {died}", "libcst"


EXIT_MEMORY = 70


def child() -> None:
    """The body of the child: reads a job from stdin, writes the answer to stdout."""
    source, codes, timeout = pickle.load(sys.stdin.buffer)
    _limit(timeout)
    answers: list[object] = []
    threading.stack_size(STACK)
    sys.setrecursionlimit(RECURSION)
    worker = threading.Thread(target=lambda: answers.append(_answer(source, codes)))
    worker.start()
    worker.join()
    sys.stdout.buffer.write(pickle.dumps(answers[0]))


def _answer(source: Source, codes: Sequence[str]) -> Checked | CannotRead:
    from quantcheck_lint.engine import check
    from quantcheck_lint.rules import RULES

    try:
        return check(source, [rule for rule in RULES if rule.code in codes], apart=True)
    except CannotRead as error:
        return error
    except RecursionError:
        return CannotRead("nested too deeply", f"limit {RECURSION} frames")
    except MemoryError:
        os._exit(EXIT_MEMORY)


def _limit(timeout: float) -> None:
    try:
        import resource
    except ImportError:  # not POSIX: the parent's timeout is what remains
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seconds = max(1, int(timeout))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
