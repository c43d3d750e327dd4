"""Pages about rules, written from the rules themselves: for the terminal, as Markdown, as JSON."""

from __future__ import annotations

import difflib
import json
import os

from quantcheck_lint.finding import CannotCheck
from quantcheck_lint.rules import RULES, by_code
from quantcheck_lint.rules.rule import Invalid, Rule

FIXES = {"none": "no fix", "unsafe": "fix: unsafe (`--unsafe-fixes`)", "safe": "fix: safe (`--fix`)"}


def rule_markdown(code: str) -> str:
    """The docs page of a rule."""
    rule = by_code(code)
    if rule is None:
        raise CannotCheck(code, "unknown rule", "see `quantcheck-lint rules`")
    return _page(rule)


def rule_text(rule: Rule) -> str:
    """What `quantcheck-lint rule CODE` prints."""
    return _page(rule)


def index_markdown() -> str:
    """The table of all rules, with links to their pages."""
    rows = [
        f"| [{rule.code}]({rule.code.lower()}.md) | {rule.name} | {rule.severity} | {_default(rule)} | {rule.fix} "
        f"| {rule.summary} |"
        for rule in RULES
    ]
    head = ["| code | name | severity | default | fix | what it says |", "|---|---|---|---|---|---|"]
    toctree = ["```{toctree}", ":hidden:", "", *(rule.code.lower() for rule in RULES), "```"]
    return "\n".join(["# Rules", "", *head, *rows, "", *toctree, ""])


def write_pages(folder: str) -> None:
    """Write the table of all rules and the page of each into `folder`: what the build of the docs calls."""
    os.makedirs(folder, exist_ok=True)
    pages = {"index": index_markdown()} | {rule.code.lower(): _page(rule) for rule in RULES}
    for name, text in pages.items():
        with open(os.path.join(folder, f"{name}.md"), "w", encoding="utf-8") as file:
            file.write(text)


def rules_table() -> str:
    """What `quantcheck-lint rules` prints."""
    width = max(len(rule.name) for rule in RULES)
    rows = [f"{rule.code}  {rule.name:<{width}}  {_default(rule):<7}  {rule.summary}" for rule in RULES]
    return "\n".join([*rows, ""])


def rules_json() -> str:
    """All rules as JSON."""
    listed = [
        {
            "code": rule.code,
            "name": rule.name,
            "severity": rule.severity,
            "default": _default(rule),
            "fix": rule.fix,
            "summary": rule.summary,
        }
        for rule in RULES
    ]
    return json.dumps(listed, indent=2) + "\n"


def _default(rule: Rule) -> str:
    return "preview" if rule.preview else "on"


def _page(rule: Rule) -> str:
    status = "preview, off by default" if rule.preview else "on by default"
    sections = [
        f"# {rule.code} {rule.name}",
        f"{rule.summary} Severity {rule.severity}, {status}, {FIXES[rule.fix]}.",
        "## What it does",
        rule.what,
        "## Why is this bad",
        rule.why,
        "## Example",
        *(_example(one) for one in rule.invalid),
        "## Use instead",
        rule.instead,
        "Nothing is said about:",
        *(_code(one) for one in rule.valid),
        "## Fix safety",
        rule.fix_safety,
        *(["## References", "\n".join(f"- <{link}>" for link in rule.references)] if rule.references else []),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _code(code: str, language: str = "python") -> str:
    return f"```{language}\n{code.rstrip()}\n```"


def _example(invalid: Invalid) -> str:
    if invalid.replacement is None:
        return _code(invalid.code)
    before, after = (text.splitlines() for text in (invalid.code, invalid.replacement))
    lines = list(difflib.unified_diff(before, after, lineterm="", n=99))[3:]
    return _code("\n".join(lines), "diff")
