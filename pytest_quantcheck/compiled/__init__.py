"""Whether inner loops run in machine code that numba compiled, or as passes of torch over each window.

    windows  what every comparison does: codes to values, sums, rounding to nearest
    words    codes packed in integer words, one stream a row or along the other dimension
    ggml     blocks with a scale of their own: reading ggml's, rounding to integers, the searches of its quantizers

A fused loop reads a window once, where torch reads it anew for each sum. Importing numba takes half a second, and
compiling several more where nothing is cached yet: that is for large models on a CPU. Decoded values are the same to
the last bit either way; sums differ by the order in which they are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module, util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

FROM = 1 << 28  # values from which compiling pays


_used = ContextVar("used", default=False)  # of this thread


def pays(values: int, device: str) -> bool:
    """Return whether so many values are worth it, and numba is there."""
    return values >= FROM and device == "cpu" and util.find_spec("numba") is not None


@contextmanager
def used(wanted: bool) -> Iterator[None]:
    """Have this thread use compiled loops, where they can be had."""
    before = _used.set(wanted and _can_be_had())
    try:
        yield
    finally:
        _used.reset(before)


def loops(module: str) -> ModuleType | None:
    """Return one of the modules above where this thread uses compiled loops."""
    # `sys.modules` would be faster, and has what another thread is only half through.
    return import_module(f"{__name__}.{module}") if _used.get() else None


def _can_be_had() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:  # it is not there, or too old for this numpy
        return False
    return True
