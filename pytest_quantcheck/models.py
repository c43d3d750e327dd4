"""Loading quantized checkpoints for tests: one model resident at a time."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from pytest_quantcheck import devices

ModelSource = str | os.PathLike[str] | Callable[..., Any]


class Key(NamedTuple):
    """What makes two requests for a model the same."""

    source: object
    device: str
    options: str


class Loader:
    """Loads models and keeps the last one, until another is asked for or nobody needs it any more."""

    def __init__(self) -> None:
        self.key: Key | None = None
        self.model: Any = None

    def load(self, source: ModelSource, device: str, **options: Any) -> Any:
        """Return the model of a checkpoint folder or factory on `device`; the same request gets the same model."""
        key = Key(source if callable(source) else os.path.realpath(source), device, repr(sorted(options.items())))
        if key != self.key:
            self.release()
            self.model = load(source, device, **options)
            self.key = key
        return self.model

    def release(self) -> None:
        """Drop the model and the memory it held."""
        if self.key is None:
            return
        self.key = self.model = None
        # The last failed test keeps its locals alive for a post-mortem, until the next test is called: too late.
        for name in ("last_exc", "last_value", "last_traceback", "last_type"):
            vars(sys).pop(name, None)
        devices.release()


def load(source: ModelSource, device: str, **options: Any) -> Any:
    """Return the model of a checkpoint folder, by transformers, or of a factory, on `device`."""
    return _build(source, device, options) if callable(source) else _load(source, device, options)


def _build(factory: Callable[..., Any], device: str, options: dict[str, Any]) -> Any:
    """Call a factory, with the device if it takes a positional argument."""
    kinds = [parameter.kind for parameter in inspect.signature(factory).parameters.values()]
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return factory(device, **options) if positional & set(kinds) else factory(**options)


def _load(path: str | os.PathLike[str], device: str, options: dict[str, Any]) -> Any:
    """Load a checkpoint folder with transformers, by the architecture its config names; nothing is downloaded."""
    import transformers

    architecture = _architecture(path)
    cls = getattr(transformers, architecture or "", None) or transformers.AutoModel
    return cls.from_pretrained(
        path, **{"device_map": {"": device}, "dtype": "auto", "local_files_only": True} | options
    )


def _architecture(path: str | os.PathLike[str]) -> str | None:
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            names = json.load(file).get("architectures") or [None]
    except (OSError, ValueError, AttributeError):
        return None  # transformers says what is wrong with it
    name = names[0]
    return name if isinstance(name, str) else None
