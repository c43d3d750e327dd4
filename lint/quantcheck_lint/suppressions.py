"""Comments that hide findings: `# noqa: QC001`, `# quantcheck: ignore[QC001]`, for a line or for a file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from quantcheck_lint.finding import Edit, Finding, Fix
from quantcheck_lint.structure import Structure

# A file without any finding is looked into only for comments that name us.
MARKERS = (b"quantcheck", b"QC")
_CODES = r"[A-Z]+[0-9]+(?:[\s,]+[A-Z]+[0-9]+)*"
_DIRECTIVE = re.compile(
    rf"\#\s*(?:(?P<tool>flake8|ruff|quantcheck)\s*:\s*)?noqa(?:\s*:\s*(?P<codes>{_CODES}))?(?![\w-])"
    r"|\#\s*quantcheck\s*:\s*(?P<kind>ignore-file|ignore)(?:\s*\[(?P<listed>[^\]]*)\])?(?![\w-])",
    re.IGNORECASE,
)
_CODE = re.compile(r"[A-Za-z]+[0-9]*")
UNUSED = "QC100"


@dataclass(slots=True)
class Suppression:
    """One comment. `codes` is empty for a blanket one; `used` are the codes that hid something."""

    line: int
    column: int
    text: str
    codes: tuple[str, ...]
    whole_file: bool
    ours: bool
    used: set[str] = field(default_factory=set)
    hid_something: bool = False

    def hides(self, code: str) -> str | None:
        """The entry that covers `code`; an empty string when everything is covered, which QC100 never is."""
        if not self.codes:
            return None if code == UNUSED else ""
        return next((entry for entry in self.codes if code.startswith(entry)), None)


def may_matter(text: str, findings: Sequence[Finding]) -> bool:
    """Whether the comments of a text are worth a look."""
    return bool(findings or "QC" in text or "quantcheck" in text) and _DIRECTIVE.search(text) is not None


def find(structure: Structure) -> list[Suppression]:
    """The suppressions of a source, strings that look like one left out."""
    found = []
    for start, comment in structure.comments():
        for match in _DIRECTIVE.finditer(comment):
            suppression = _suppression(structure, start + match.start(), match)
            if suppression is not None:
                found.append(suppression)
    return found


def _suppression(structure: Structure, offset: int, match: re.Match[str]) -> Suppression | None:
    listed = match["codes"] if match["kind"] is None else match["listed"]
    codes = tuple(code.upper() for code in _CODE.findall(listed or ""))
    tool = (match["tool"] or "").lower()
    if tool in {"flake8", "ruff"} and not codes:
        return None  # Those are about the other tool.
    line = structure.line_of(offset)
    return Suppression(
        line=line + 1,
        column=offset - structure.starts[line],
        text=match.group(),
        codes=codes,
        whole_file=bool(tool) or (match["kind"] or "").lower() == "ignore-file",
        ours=match["kind"] is not None or tool == "quantcheck" or any(code.startswith("QC") for code in codes),
    )


def apply(findings: Sequence[Finding], suppressions: Sequence[Suppression]) -> list[Finding]:
    """The findings that no comment hides; comments remember what they hid."""
    of_file = [suppression for suppression in suppressions if suppression.whole_file]
    by_line: dict[int, list[Suppression]] = {}
    for suppression in suppressions:
        if not suppression.whole_file:
            by_line.setdefault(suppression.line, []).append(suppression)
    shown = []
    for finding in findings:
        lines = {*finding.span, *range(finding.line, finding.end_line + 1)}
        near = [suppression for line in lines for suppression in by_line.get(line, ())]
        if not _hidden(finding, (*of_file, *near)):
            shown.append(finding)
    return shown


def _hidden(finding: Finding, suppressions: Iterable[Suppression]) -> bool:
    hidden = False
    for suppression in suppressions:
        entry = suppression.hides(finding.code)
        if entry is not None:
            suppression.used.add(entry)
            suppression.hid_something = hidden = True
    return hidden


def unused(
    path: str, structure: Structure, suppressions: Sequence[Suppression], on: Collection[str], name: str
) -> Iterator[Finding]:
    """QC100: suppressions that hide nothing. A code whose rule is off may still be needed, so it stays."""
    for suppression in suppressions:
        if not suppression.ours:
            continue
        idle = tuple(code for code in suppression.codes if _is_idle(code, suppression, on))
        if idle or not (suppression.codes or suppression.hid_something):
            yield _finding(path, structure, suppression, idle, name)


def _is_idle(code: str, suppression: Suppression, on: Collection[str]) -> bool:
    if not code.startswith("QC") or code in suppression.used or code == UNUSED:
        return False
    from quantcheck_lint.rules import RULES

    meant = [rule.code for rule in RULES if rule.code.startswith(code)]
    return not meant or any(rule in on for rule in meant)


def _finding(path: str, structure: Structure, suppression: Suppression, idle: tuple[str, ...], name: str) -> Finding:
    what = ", ".join(idle) or "anything"
    line = structure.slice(suppression.line - 1, suppression.line - 1).rstrip("\r\n")
    return Finding(
        path=path,
        line=suppression.line,
        column=suppression.column + 1,
        end_line=suppression.line,
        end_column=suppression.column + len(suppression.text) + 1,
        code=UNUSED,
        name=name,
        severity="warning",
        message=f"suppression hides nothing of {what}",
        suggestion="remove it",
        fix=Fix((_removal(line, suppression, idle),), safe=True),
        excerpt=(line,),
        span=(suppression.line, suppression.line),
    )


def _removal(line: str, suppression: Suppression, idle: tuple[str, ...]) -> Edit:
    """Drop the idle codes; with none left the comment goes, and the white space before it."""
    number, column, end = suppression.line, suppression.column, suppression.column + len(suppression.text)
    kept = [code for code in suppression.codes if code not in idle]
    if kept:
        start = re.search(r"[:\[]\s*(?=[A-Za-z]+[0-9])", suppression.text)
        assert start is not None
        tail = "]" if suppression.text.endswith("]") else ""
        text = suppression.text[: start.end()] + ", ".join(kept) + tail
        return Edit(number, column, number, end, text)
    rest = line[end:]
    following = rest.find("#")
    # What is left of the comment is its reason, and goes with it; a second comment stays.
    end = end + following if following >= 0 else len(line)
    start_column = column if following >= 0 else len(line[:column].rstrip())
    return Edit(number, start_column, number, end, "")


def with_noqa(text: str, findings: Sequence[Finding], reason: str) -> str:
    """`text` with a `# noqa` on the line of every finding, put into the comment that is there already."""
    structure = Structure(text)
    lines = [structure.slice(i, i) for i in range(len(structure.starts))]
    wanted: dict[int, list[str]] = {}
    for finding in findings:
        at = wanted.setdefault(_comment_line(structure, lines, finding), [])
        if finding.code not in at:
            at.append(finding.code)
    present = {found.line: found for found in find(structure) if found.codes and "noqa" in found.text.lower()}
    for number, codes in wanted.items():
        lines[number - 1] = _annotated(lines[number - 1], codes, present.get(number), reason)
    return "".join(lines)


def _comment_line(structure: Structure, lines: Sequence[str], finding: Finding) -> int:
    """The line of the finding, or the end of its statement where the line cannot take a comment."""
    number = finding.line
    line = lines[number - 1].rstrip("\r\n")
    end = structure.starts[number - 1] + len(line)
    return finding.span[1] if line.endswith("\\") or structure.in_string(end) else number


def _annotated(line: str, codes: Sequence[str], present: Suppression | None, reason: str) -> str:
    body = line.rstrip("\r\n")
    end = line[len(body) :]
    if present is None:
        why = f" {reason}" if reason else ""
        return f"{body.rstrip()}  # noqa: {', '.join(codes)}{why}{end}"
    added = [code for code in codes if code not in present.codes]
    stop = present.column + len(present.text)
    return body[:stop] + "".join(f", {code}" for code in added) + body[stop:] + end
