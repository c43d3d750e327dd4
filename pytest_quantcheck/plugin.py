"""The pytest plugin: options, the marker, the order of tests, and when a model is let go.

Imported at every start of pytest, so it imports pytest alone.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from pytest_quantcheck.fixtures import (
    LOADER,
    load_quantized,
    model_key,
    quant_device,
    quantized_checkpoint,
    quantized_model,
)

__all__ = ["load_quantized", "quant_device", "quantized_checkpoint", "quantized_model"]

_DEVICE = "Device for quantized models: auto (the best there is), cpu, cuda, cuda:1, xpu ..."
_REQUIRE_GPU = "Fail instead of skipping where the GPU that a test wants is not there."


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, all in one group of `--help`, and their ini twins."""
    group = parser.getgroup("quantcheck", "quantcheck: tests of quantized models")
    group.addoption("--quantcheck-device", dest="quantcheck_device", metavar="DEVICE", help=_DEVICE)
    group.addoption("--quantcheck-require-gpu", dest="quantcheck_require_gpu", action="store_true", help=_REQUIRE_GPU)
    parser.addini("quantcheck_device", _DEVICE, type="string", default="")
    parser.addini("quantcheck_require_gpu", _REQUIRE_GPU, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "quantized(path, *, factory=None, device=None, **options): the model of this test, a checkpoint or what "
        "factory(device) returns, for the fixtures quantized_model (live) and quantized_checkpoint (headers only); "
        "options go to from_pretrained or to the factory",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring tests of one model together, where the first of them stands; all others keep their order."""
    groups: dict[object, list[pytest.Item]] = {}
    for at, item in enumerate(items):
        key = model_key(item)
        groups.setdefault(at if key is None else key, []).append(item)
    items[:] = [item for group in groups.values() for item in group]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Free the model after the last test in a row that uses it."""
    result = yield
    loader = item.config.stash.get(LOADER, None)
    if loader is not None and not _shares_model(item, nextitem):
        loader.release()
    return result


def _shares_model(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    if nextitem is None:
        return False
    key = model_key(nextitem)
    if key is not None:
        return key == model_key(item)
    # Who calls the factory by hand may ask for the same model again.
    return "load_quantized" in getattr(nextitem, "fixturenames", ())
