"""The HTML report of large models: time to render, size, and time to open in Chromium; a plain table beside it.

The plain table has the rows of the report's table of tensors and nothing else, one element each: what a data frame
writes with `to_html`. Without Chromium the times to open are left out.
"""

from __future__ import annotations

import gzip
import html
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pytest_quantcheck.report import html as html_report
from pytest_quantcheck.report.run import Run
from pytest_quantcheck.report.tensor_table import table
from tests import layouts, runs
from tests.browser import CHROMIUM, Browser, chromium


class Page(NamedTuple):
    name: str
    seconds: float
    text: str


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, run in _models(Path(folder)).items():
            rows = table(run["artifacts"][0]).rows
            print(f"\n{name}, {len(rows):,} tensors")
            pages = [_rendered("report", html_report.render, run), _rendered("plain table", _plain, run)]
            _print(pages, _opened(pages, Path(folder)) if CHROMIUM else [float("nan")] * len(pages))


def _models(folder: Path) -> dict[str, Run]:
    mistral = layouts.write_folder(folder / "mistral", layouts.mistral_7b(), layouts.MISTRAL_CONFIG)
    entries = layouts.deepseek_v3()
    deepseek = layouts.write_folder(folder / "deepseek", entries, layouts.DEEPSEEK_CONFIG, layouts.DEEPSEEK_SHARDS)
    return {"Mistral-7B": runs.run(runs.artifact(mistral)), "DeepSeek-V3": runs.run(runs.artifact(deepseek))}


def _rendered(name: str, render, run: Run) -> Page:
    started = time.perf_counter()
    text = render(run)
    return Page(name, time.perf_counter() - started, text)


def _plain(run: Run) -> str:
    rows = table(run["artifacts"][0]).rows
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<!DOCTYPE html><meta charset=utf-8><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _opened(pages: list[Page], folder: Path) -> list[float]:
    """The best of three times from asking for a page until it is loaded and laid out."""
    paths = []
    for page in pages:
        paths.append(folder / f"{page.name}.html")
        paths[-1].write_text(page.text)
    with chromium(folder / "profile") as browser:
        return [min(_seconds(browser, path) for _ in range(3)) for path in paths]


def _seconds(browser: Browser, path: Path) -> float:
    browser.open("about:blank")
    started = time.perf_counter()
    browser.open(path)
    browser.run("document.body.offsetHeight")
    return time.perf_counter() - started


def _print(pages: list[Page], opened: list[float]) -> None:
    first, least = pages[0], opened[0]
    print(f"{'':12}  {'render s':>8}  {'MB':>6}  {'gzip MB':>7}  {'times':>5}  {'open s':>6}  {'times':>5}")
    for page, seconds in zip(pages, opened, strict=True):
        size, packed = len(page.text.encode()) / 1e6, len(gzip.compress(page.text.encode())) / 1e6
        larger, slower = len(page.text) / len(first.text), seconds / least
        first_columns = f"{page.name:12}  {page.seconds:8.2f}  {size:6.2f}  {packed:7.2f}  {larger:5.1f}"
        print(f"{first_columns}  {seconds:6.2f}  {slower:5.1f}", flush=True)
