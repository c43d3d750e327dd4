"""One HTML file with everything a run found: no request leaves it, and nothing in it runs but its own script.

The page is made by Jinja with autoescape, its styles and script are inline and named by their hash in a
Content-Security-Policy that forbids all others. It works as a `file://`, on a phone, in the dark and on paper.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.quantities import counted, format_binary_size, format_count, format_size, format_sizes
from pytest_quantcheck.report import durations, sizes
from pytest_quantcheck.report.run import ArtifactRun, Checked, Run
from pytest_quantcheck.report.shown import shown
from pytest_quantcheck.report.verdicts import failures, headline, not_passed, own_details, said_once, status

if TYPE_CHECKING:
    from jinja2 import Environment

WORST = 12  # failing tensors shown as cards; the table has all
ROWS = 25  # of the table of tensors, until its script runs


def render(run: Run) -> str:
    """Return the page. Raises `ImportError` in one line without the libraries of the extra `report`."""
    environment = _environment()
    from pytest_quantcheck.report.heatmap import grids
    from pytest_quantcheck.report.tensor_table import TEXTS, table
    from pytest_quantcheck.report.treemap import SHAPES, views

    style, script = _text("page.css"), _text("page.js")
    return environment.get_template("page.html").render(
        run=shown(run),
        tables=[table(artifact) for artifact in run["artifacts"]],
        style=style,
        script=script,
        policy=_policy(style, script),
        failures=failures,
        headline=headline,
        not_passed=not_passed,
        shown_details=_details,
        said_once=said_once,
        status=status,
        grids=grids,
        views=views,
        shapes=SHAPES,
        texts=TEXTS,
        worst=WORST,
        shown_rows=ROWS,
    )


def _environment() -> Environment:
    try:
        import jinja2
        import squarify  # noqa: F401  # the map of bytes is laid out by it
    except ImportError as error:
        what = f"the HTML report needs {error.name}: pip install 'pytest-quantcheck[report]'"
        raise ImportError(what) from None
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": format_size,
        "binary": format_binary_size,
        "sizes": format_sizes,
        "count": format_count,
        "percent": "{:.1%}".format,
        "share": _share,
        "signed": sizes.signed,
        "duration": durations.duration,
        "speed": durations.speed,
    }
    environment.globals |= {"counted": counted, "what": sizes.what, "wrong": _wrong}
    return environment


def _text(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded, and only these two texts may style and run."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _details(checked: Checked, artifact: ArtifactRun) -> list[str]:
    """What of the details the page does not show elsewhere: it has its bytes, and a card for each failing tensor."""
    if checked["check"] == "fidelity" and artifact["compare"]:
        return []
    return own_details(checked) if artifact["inspect"] else checked["details"]


class Wrong(NamedTuple):
    """A tensor with something wrong: what, why if that is known, and its metrics where it was compared."""

    name: str
    messages: tuple[str, ...]
    likely: str | None
    row: Mapping[str, Any] | None


def _wrong(comparison: Mapping[str, Any]) -> list[Wrong]:
    """Return the worst first, then what could not be compared."""
    rows = {row["name"]: row for row in comparison["tensors"]}
    found: dict[str, list[str]] = {name: [] for name in rows}
    for finding in comparison["findings"]:
        if finding["severity"] == "error":
            found.setdefault(finding["tensor"] or "", []).append(finding["message"])
    likely = {
        finding["tensor"]: finding["message"] for finding in comparison["findings"] if finding["check"] == "diagnosis"
    }
    return [
        Wrong(name, tuple(messages), likely.get(name), rows.get(name)) for name, messages in found.items() if messages
    ]
