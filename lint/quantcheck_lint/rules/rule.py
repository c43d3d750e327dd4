"""What a rule is: a class with its own words, its own examples and one method that yields detections."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import libcst as cst

    from quantcheck_lint.analysis import Analysis

Severity = Literal["error", "warning", "note"]
FixKind = Literal["none", "unsafe", "safe"]
# Every group must have a member in a file's bytes, or the rule has nothing to say about the file.
Needles = tuple[tuple[bytes, ...], ...]

COUNTS: tuple[bytes, ...] = (b"numel", b"nelement", b"prod(", b"reduce(")
# A size that is only compared (`p.numel() == 0`) is no count; most are, so it pays to drop them here.
_NOT_COMPARED = r"\b(?!\s*\(\s*\)\s*(?:[=!<>]=|[<>%]))"
# Whatever is wrapped around a shape.
_OF_A_SHAPE = r"\s*\([\s\w.,:*()\[\]]{0,80}?\.(?:shape|size)\b"
# Every branch begins with a letter, which lets `re` skip to where one may match.
READS = re.compile(
    rf"numel(?<=\bnumel){_NOT_COMPARED}|nelement(?<=\bnelement){_NOT_COMPARED}|prod{_OF_A_SHAPE}|reduce{_OF_A_SHAPE}"
)


@dataclass(frozen=True, slots=True)
class Invalid:
    """Code that the rule objects to, how often, and what its fix makes of it (`None`: there is no fix)."""

    code: str
    replacement: str | None = None
    findings: int = 1


@dataclass(frozen=True, slots=True)
class Detection:
    """A node that a rule objects to, and the nodes to put in place of others."""

    node: cst.CSTNode
    message: str
    suggestion: str = ""
    replace: tuple[tuple[cst.CSTNode, cst.CSTNode], ...] = ()
    imports: tuple[str, ...] = ()


class Rule(ABC):
    """One rule. The class attributes are its documentation, its tests and its place in the fast filters."""

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[Severity]
    summary: ClassVar[str]
    what: ClassVar[str]
    why: ClassVar[str]
    instead: ClassVar[str]
    fix_safety: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()
    valid: ClassVar[tuple[str, ...]] = ()
    invalid: ClassVar[tuple[Invalid, ...]] = ()
    preview: ClassVar[bool] = False
    fix: ClassVar[FixKind] = "none"

    # The filters. `hits` is what the rule looks at; a function without a match for it is never parsed. With `sources`,
    # a match is needed there as well, or in code that this function uses.
    needles: ClassVar[Needles] = ()
    hits: ClassVar[re.Pattern[str] | None] = None
    sources: ClassVar[re.Pattern[str] | None] = None

    @abstractmethod
    def check(self, analysis: Analysis) -> Iterator[Detection]:
        """What the rule objects to in a module."""
