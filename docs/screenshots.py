"""Makes the pictures of the reports page from the sample repository: `python docs/screenshots.py`.

The release of docs/examples/release is made without double quantization, so that it is over its budget, and the nibbles
of one weight are swapped. Needs Chromium.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent)]

from rich.console import Console  # noqa: E402  # what follows is found through the path above
from rich.text import Text  # noqa: E402

from pytest_quantcheck.report.check_terminal import run_lines  # noqa: E402
from tests.browser import Browser, chromium  # noqa: E402

PICTURES = DOCS / "_static/reports"
DOUBLE = ", bnb_4bit_use_double_quant=True"
BROKEN = "model.layers.2.mlp.down_proj.weight"
SIZE = (1040, 860)
PHONE = (390, 844)


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        example = Path(folder) / "example"
        shutil.copytree(DOCS / "examples/release", example, ignore=shutil.ignore_patterns("models"))
        with contextlib.chdir(example):
            break_release(example)
            run = check(example / "report.html")
        terminal(run)
        with chromium(Path(folder) / "profile") as browser:
            browser_pictures(browser, example / "report.html")


def break_release(example: Path) -> None:
    """Make the release too large, and one of its weights wrong."""
    import safetensors.torch

    script = example / "make_model.py"
    script.write_text(script.read_text().replace(DOUBLE, ""))
    runpy.run_path(str(script))
    path = example / "models/tiny-llama-nf4/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[BROKEN] = (tensors[BROKEN] >> 4) | (tensors[BROKEN] << 4)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def check(report: Path) -> dict:
    """Return the result of the checks, and write the report."""
    from pytest_quantcheck import config, runner
    from pytest_quantcheck.report import html

    run = runner.run(runner.plan(config.load("quantcheck.toml")))
    report.write_text(html.render(run))
    return run


def terminal(run: dict) -> None:
    """Draw what `quantcheck check` prints; the font is the reader's own."""
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False)
    console.print(Text("$ quantcheck check --html report.html", style="bold"))
    for text, style in run_lines(run):
        console.print(Text(text, style=style), no_wrap=True, overflow="ellipsis")
    drawn = console.export_svg(title="quantcheck check", unique_id="quantcheck")
    text = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL).replace("Fira Code", "ui-monospace")
    (PICTURES / "terminal.svg").write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))


def browser_pictures(browser: Browser, page: Path) -> None:
    """Photograph the top of the page, its parts, and the page on a phone."""
    for name, size, dark, above in (
        ("overview", SIZE, False, None),
        ("fidelity", SIZE, False, ".wrong"),
        ("bytes", SIZE, True, ".stack"),
        ("phone", PHONE, False, None),
    ):
        browser.open(page, width=size[0], height=size[1], dark=dark)
        if above:
            browser.run(f"scrollTo(0, document.querySelector({json.dumps(above)}).closest('.card').offsetTop - 12)")
        (PICTURES / f"{name}.png").write_bytes(browser.picture())


if __name__ == "__main__":
    main()
