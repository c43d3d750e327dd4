"""The pytest plugin: options, the marker, the order of tests, and when a model is let go.

Imported at every start of pytest, so it imports pytest alone.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from pytest_quantcheck import unused, uses
from pytest_quantcheck.fixtures import (
    LOADER,
    load_quantized,
    model_key,
    quant_device,
    quantized_checkpoint,
    quantized_model,
)
from pytest_quantcheck.items import MARK, ConfigFile, Merger, add_outcome

__all__ = ["load_quantized", "quant_device", "quantized_checkpoint", "quantized_model"]

_DEVICE = "Device for quantized models: auto (the best there is), cpu, cuda, cuda:1, xpu ..."
_JSON, _HTML, _MARKDOWN = (
    f"Write what the checks of quantcheck.toml found, from all workers, as {kind}."
    for kind in ("JSON", "one HTML file", "Markdown")
)
_UPDATE = "Record the baselines anew; a test whose record changes fails once. Refused in CI."
_FORCE = "Record the baselines anew in CI as well."
_REQUIRE_GPU = "Fail instead of skipping where the GPU that a test wants is not there."


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, all in one group of `--help`, and their ini twins."""
    group = parser.getgroup("quantcheck", "quantcheck: tests of quantized models")
    group.addoption("--quantcheck-device", dest="quantcheck_device", metavar="DEVICE", help=_DEVICE)
    group.addoption("--quantcheck-require-gpu", dest="quantcheck_require_gpu", action="store_true", help=_REQUIRE_GPU)
    group.addoption("--quantcheck-json", dest="quantcheck_json", metavar="PATH", help=_JSON)
    group.addoption("--quantcheck-html", dest="quantcheck_html", metavar="PATH", help=_HTML)
    group.addoption("--quantcheck-markdown", dest="quantcheck_markdown", metavar="PATH", help=_MARKDOWN)
    group.addoption("--quantcheck-update", dest="quantcheck_update", action="store_true", help=_UPDATE)
    group.addoption("--quantcheck-force-update", dest="quantcheck_force_update", action="store_true", help=_FORCE)
    parser.addini("quantcheck_device", _DEVICE, type="string", default="")
    parser.addini("quantcheck_require_gpu", _REQUIRE_GPU, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and, in the process that reports, what merges the checks; say whether baselines change."""
    config.addinivalue_line("markers", f"{MARK}: a check of quantcheck.toml")
    config.addinivalue_line(
        "markers",
        "quantized(path, *, factory=None, device=None, **options): the model of this test, a checkpoint or what "
        "factory(device) returns, for the fixtures quantized_model (live) and quantized_checkpoint (headers only); "
        "options go to from_pretrained or to the factory",
    )
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Merger(config), "quantcheck-merger")
        unused.watch(config)
    if config.getoption("quantcheck_update") or config.getoption("quantcheck_force_update"):
        _allow_updates(config)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Note that not all tests run, so that a record that none asks for is not called unused."""
    if items:
        uses.note("", None)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> ConfigFile | None:
    """Collect a configuration that is named, as an argument or in `testpaths`; none is picked up on the way."""
    if file_path.suffix != ".toml" or not parent.session.isinitpath(file_path):
        return None
    if file_path.name != "pyproject.toml" and not file_path.name.endswith("quantcheck.toml"):
        return None
    return ConfigFile.from_parent(parent, path=file_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send along what a check found."""
    report = yield
    add_outcome(item, report)
    return report


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


def _allow_updates(config: pytest.Config) -> None:
    """Tell `assert_matches_baseline`, which knows nothing of pytest, through the environment."""
    from pytest_quantcheck import lock

    force = config.getoption("quantcheck_force_update")
    config.option.quantcheck_update = True
    try:
        lock.require_update_allowed(force)
    except ValueError as error:
        raise pytest.UsageError(f"quantcheck: {error} (--quantcheck-force-update)") from None
    os.environ[lock.UPDATE] = "force" if force else "1"
    config.add_cleanup(_forbid_updates)


def _forbid_updates() -> None:
    from pytest_quantcheck import lock

    os.environ.pop(lock.UPDATE, None)
