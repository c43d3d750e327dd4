"""How functions are compiled. Machine code is kept beside the file, or in numba's folder of the user.

A function calls no compiled function of another file: where that changes, what was kept is not compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def machine_code(function: Function) -> Function:
    """Compile a function, each operation rounded as written; the GIL is not held."""
    return _compiled(function, fastmath=False)


def adding(function: Function) -> Function:
    """Compile a function whose sums may be taken in any order: that makes vectors of them."""
    return _compiled(function, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)


def _compiled(function: Function, **options: Any) -> Function:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # there is no folder to keep it in: it is compiled in each process
        return njit(**options)(function)  # type: ignore[no-any-return]
