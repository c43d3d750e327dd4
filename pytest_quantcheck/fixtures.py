"""The fixtures: `quantized_model`, `quantized_checkpoint`, `load_quantized`, `quant_device`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_quantcheck.artifact import Artifact
    from pytest_quantcheck.models import Loader, ModelSource

LOADER: pytest.StashKey[Loader] = pytest.StashKey()
MARKER = "quantized"


@pytest.fixture
def quant_device(request: pytest.FixtureRequest) -> str:
    """The torch device of this test, such as `cuda:0` or `cpu`.

    In order: `--quantcheck-device`, the marker's `device=`, the `quantcheck_device` ini option, the best there is.
    Skips with a reason where that device is not there; fails instead under `--quantcheck-require-gpu`.
    """
    _require("torch", "torch")
    from pytest_quantcheck import devices

    config, marker = request.config, request.node.get_closest_marker(MARKER)
    wanted = (
        config.getoption("quantcheck_device")
        or (marker and marker.kwargs.get("device"))
        or config.getini("quantcheck_device")
        or devices.AUTO
    )
    try:
        device = devices.choose(str(wanted), worker=worker_index(config))
    except ValueError as error:
        pytest.fail(f"quantcheck: {error}", pytrace=False)
    require_gpu = config.getoption("quantcheck_require_gpu") or config.getini("quantcheck_require_gpu")
    if device.missing and not require_gpu:
        pytest.skip(f"quantcheck: {device.missing}")
    if device.missing or (require_gpu and wanted == devices.AUTO and not device.is_accelerator):
        reason = device.missing or f"the best device is `{device.name}`"
        pytest.fail(f"quantcheck: a GPU is required (--quantcheck-require-gpu), but {reason}", pytrace=False)
    return device.name


@pytest.fixture
def load_quantized(request: pytest.FixtureRequest, quant_device: str) -> Callable[..., Any]:
    """A function `load_quantized(path_or_factory, **options)` that returns a model on this test's device.

    A path is loaded with transformers (`options` go to `from_pretrained`), a factory is called (with the device, if it
    takes an argument). One model is resident at a time: asking for another frees the last one.
    """
    loader = _loader(request.config)

    def load(source: ModelSource, **options: Any) -> Any:
        if not callable(source):
            _require("transformers", "hf")
            source = _resolve(source, request)
            if not os.path.isdir(source):
                from pytest_quantcheck.containers.remote import shown

                pytest.fail(f"quantcheck: {shown(source)}: no such checkpoint folder", pytrace=False)
        return loader.load(source, quant_device, **options)

    return load


@pytest.fixture
def quantized_model(request: pytest.FixtureRequest, load_quantized: Callable[..., Any]) -> Any:
    """The live model of `@pytest.mark.quantized(path)` or `(factory=...)`, on the best device there is.

    Consecutive tests with the same mark share one model, so do not change it; tests are ordered to make that so.
    """
    source, options = _marked(request)
    return load_quantized(source, **options)


@pytest.fixture
def quantized_checkpoint(request: pytest.FixtureRequest) -> Artifact:
    """The checkpoint of `@pytest.mark.quantized(path)` by its headers: no weights are read, no torch is needed."""
    from pytest_quantcheck.artifact import inspect
    from pytest_quantcheck.errors import FormatError

    source, _ = _marked(request)
    if callable(source):
        pytest.fail("quantized_checkpoint needs a path in @pytest.mark.quantized, not a factory", pytrace=False)
    try:
        return inspect(_resolve(source, request))
    except FormatError as error:
        pytest.fail(f"quantcheck: {error}", pytrace=False)


def model_key(item: pytest.Item) -> object:
    """Return what tests that can share a model have in common, None for tests without a model."""
    marker = item.get_closest_marker(MARKER)
    source = None if marker is None else _source(marker)
    if marker is None or source is None:
        return None
    return (source if callable(source) else os.fspath(source), repr(sorted(marker.kwargs.items())))


def _source(marker: pytest.Mark) -> ModelSource | None:
    """The path or factory of a mark; pytest takes a lone named function for the test, so `factory=` names it."""
    sources = [*marker.args, *(marker.kwargs[name] for name in ("factory",) if name in marker.kwargs)]
    return sources[0] if len(sources) == 1 else None


def _marked(request: pytest.FixtureRequest) -> tuple[ModelSource, dict[str, Any]]:
    marker = request.node.get_closest_marker(MARKER)
    source = None if marker is None else _source(marker)
    if marker is None or source is None:
        pytest.fail(
            f"fixture `{request.fixturename}` needs @pytest.mark.quantized(path) or (factory=...) on the test",
            pytrace=False,
        )
    return source, {name: value for name, value in marker.kwargs.items() if name not in ("device", "factory")}


def _resolve(path: str | os.PathLike[str], request: pytest.FixtureRequest) -> str:
    """Paths in tests are relative to the root of the test run; a URL is as it is."""
    from pytest_quantcheck.containers.remote import is_url

    if is_url(os.fspath(path)):
        return os.fspath(path)
    return os.path.join(request.config.rootpath, os.path.expanduser(path))


def _loader(config: pytest.Config) -> Loader:
    from pytest_quantcheck.models import Loader

    return config.stash.setdefault(LOADER, Loader())


def worker_index(config: pytest.Config) -> int | None:
    """The number of this xdist worker."""
    workerinput = getattr(config, "workerinput", None)
    return int(workerinput["workerid"].removeprefix("gw")) if workerinput else None


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.fail(f"quantcheck: this needs {module}: pip install pytest-quantcheck[{extra}]", pytrace=False)
