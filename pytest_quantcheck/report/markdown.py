r"""Markdown for a job summary or a comment: a row per artifact, then what did not pass and why.

Whatever is not ours stands in a code span or a fence with more backticks than it has: no link, mention, image or tag
comes of it. Rows cannot hold `|`, so it is written `\x7c` there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_quantcheck.quantities import counted, format_size
from pytest_quantcheck.report import durations
from pytest_quantcheck.report.run import ArtifactRun, Checked, Run
from pytest_quantcheck.report.shown import shown
from pytest_quantcheck.report.verdicts import failures, headline, not_passed, said_once, status

MOST = 900_000  # bytes: GitHub takes 1 MiB a step
ARTIFACTS = 200  # rows
DETAILS = 40  # lines of one check
SYMBOLS = {"passed": "✅", "failed": "❌", "error": "⚠️"}


def render(run: Run) -> str:
    """Return the summary; what would not fit is said to be missing."""
    clean = shown(run)
    blocks = [f"## quantcheck: {headline(clean)}", "\n".join(_table(clean["artifacts"]))]
    size = sum(len(block.encode()) for block in blocks)
    wrong = failures(clean)
    for number, artifact in enumerate(wrong):
        section = "\n".join(_section(artifact))
        size += len(section.encode())
        if size > MOST:
            rest = counted(len(wrong) - number, "more artifact")
            blocks.append(f"{rest} did not pass: the other reports have them")
            break
        blocks.append(section)
    return "\n\n".join(filter(None, blocks)) + "\n"


def code(text: str) -> str:
    """Return text as a code span that ends where the text ends.

    >>> code("a`b"), code("`")
    ('``a`b``', '`` ` ``')
    """
    fence = "`" * (_longest(text) + 1)
    inside = f" {text} " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else text
    return f"{fence}{inside or ' '}{fence}"


def _table(artifacts: list[ArtifactRun]) -> Iterator[str]:
    if not artifacts:
        return
    yield "| | artifact | size | logical parameters | bits per weight | SQNR | at 100 Mbit/s |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for artifact in artifacts[:ARTIFACTS]:
        name = code(artifact["name"].replace("|", "\\x7c"))
        yield f"| {SYMBOLS[status(artifact)]} | {name} | {' | '.join(_numbers(artifact))} |"
    if len(artifacts) > ARTIFACTS:
        yield ""
        yield f"and {counted(len(artifacts) - ARTIFACTS, 'more artifact')}"


def _numbers(artifact: ArtifactRun) -> tuple[str, ...]:
    found, why, compared = artifact["inspect"], artifact["why"], artifact["compare"]
    bits = found and found["bits_per_weight"]["quantized"]
    sqnr = compared and compared["sqnr_db"]
    downloads = why["cost"]["downloads"] if why else []
    return (
        format_size(found["file_bytes"]) if found else "",
        f"{found['logical_params']:,}" if found else "",
        f"{bits:.3f}" if bits is not None else "",
        f"{sqnr:.2f} dB" if sqnr is not None else "",
        next((durations.duration(link["seconds"]) for link in downloads if link["megabits_per_second"] == 100), ""),
    )


def _section(artifact: ArtifactRun) -> Iterator[str]:
    yield f"### {SYMBOLS[status(artifact)]} {code(artifact['name'])}"
    if artifact["error"]:
        yield from ("", *_fence([artifact["error"]]))
        return
    for checked in said_once(not_passed(artifact)):
        yield from ("", *_check(checked))


def _check(checked: Checked) -> Iterator[str]:
    where = f", the limit is in {code(checked['where'])}" if checked["where"] else ""
    yield f"{SYMBOLS[checked['status']]} **{code(checked['check'])}**{where}"
    said = (checked["message"] or "").splitlines()
    details = checked["details"][:DETAILS]
    rest = len(checked["details"]) - len(details)
    more = [f"... and {counted(rest, 'more line')}"] if rest else []
    yield ""
    yield from _fence([checked["headline"], *said, *details, *more])


def _fence(lines: list[str]) -> Iterator[str]:
    fence = "`" * max(3, _longest("\n".join(lines)) + 1)
    yield from (f"{fence}text", *lines, fence)


def _longest(text: str) -> int:
    """The length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
