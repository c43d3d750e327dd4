"""The containers of files. Live modules are opened by `live_module.open_module`."""

from __future__ import annotations

import os
from types import ModuleType

from pytest_quantcheck.containers import gguf, safetensors
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.tensor import Container

# One module per container, each with `accepts(path) -> bool` and `open_container(path) -> Container`.
CONTAINERS: tuple[ModuleType, ...] = (safetensors, gguf)


def open_path(path: str | os.PathLike[str]) -> Container:
    """Return the container at a path; what none of `CONTAINERS` accepts is a `FormatError`."""
    path = os.fspath(path)
    if not os.path.lexists(path):
        raise FormatError("no such file or folder", file=path)
    for container in CONTAINERS:
        if container.accepts(path):
            opened: Container = container.open_container(path)
            return opened
    if os.path.isdir(path):
        raise FormatError("holds no weights (looked for *.safetensors and *.gguf)", file=path)
    raise FormatError("not a container we read (safetensors, GGUF)", file=path)
