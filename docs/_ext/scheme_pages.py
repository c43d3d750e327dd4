"""Writes the schemes into `reference/schemes.md`: one table, and a section per scheme from its module docstring.

The page holds the line `@SCHEMES@` where they belong, so that a new row in `SCHEMES` needs no edit here.
"""

from __future__ import annotations

import re
import sys
import textwrap

from pytest_quantcheck.schemes import SCHEMES

PAGE, PLACE = "reference/schemes", "@SCHEMES@"
_MARKUP = re.compile(r"([\\*_\[\]<>{}#|~^$])")


def markdown() -> str:
    """Return the table and the sections."""
    rows = [
        f"| [{scheme.title}](#{anchor(scheme)}) | {variants(scheme)} | {escaped(scheme.verified) or '-'} "
        f"| {escaped(scheme.decoded) or '-'} |"
        for scheme in SCHEMES
    ]
    head = ["| scheme | variants | verified against | decoded on |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", *map(section, SCHEMES)])


def section(scheme) -> str:
    """Return the section of one scheme: what it is called, where it comes from, how it is laid out."""
    docstring = sys.modules[scheme.claim.__module__].__doc__ or ""
    facts = [
        ("name", f"`{scheme.name}`"),
        ("variants", variants(scheme)),
        ("`quant_method`", ", ".join(f"`{method}`" for method in scheme.methods)),
        ("live classes", ", ".join(f"`{name}`" for name in scheme.live)),
        ("source", "" if "\nSource:" in docstring else escaped(scheme.source)),
        ("verified against", escaped(scheme.verified)),
        ("decoded on", escaped(scheme.decoded)),
    ]
    lines = [f"| {name} | {value} |" for name, value in facts if value]
    title = [f"({anchor(scheme)})=", f"## {scheme.title}", ""]
    return "\n".join([*title, "| | |", "|---|---|", *lines, "", docstring_markdown(docstring), ""])


def anchor(scheme) -> str:
    return f"scheme-{scheme.name}"


def variants(scheme) -> str:
    return ", ".join(f"`{variant}`" for variant in scheme.variants)


def docstring_markdown(docstring: str) -> str:
    """Return a module docstring as Markdown: indented blocks are layouts, everything else is prose."""
    first, _, rest = docstring.partition("\n")
    return "\n".join(_blocks(f"{first}\n{textwrap.dedent(rest)}"))


def _blocks(text: str):
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if all(line.startswith("    ") for line in block.splitlines()):
            yield f"```text\n{textwrap.dedent(block)}\n```\n"
        else:
            # One fact a line where lines begin with a label, one paragraph else.
            yield re.sub(r"\n(?=[A-Z]\w*:)", "\n\n", escaped(block)) + "\n"


def escaped(text: str) -> str:
    """Return prose with Markdown's own characters escaped outside of backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _MARKUP.sub(r"\\\1", part) for part in parts)


def fill(app, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        source[0] = source[0].replace(PLACE, markdown())


def setup(app) -> dict[str, bool]:
    app.connect("source-read", fill)
    # The code may have changed though the page has not.
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: [PAGE])
    return {"parallel_read_safe": True, "parallel_write_safe": True}
