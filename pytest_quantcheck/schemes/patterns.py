"""Patterns over module names that a configuration brings, matched in bounded time: files come from strangers."""

from __future__ import annotations

import re

from pytest_quantcheck.errors import FormatError

LENGTH_LIMIT, REPEATS_LIMIT = 500, 6


def found_in(name: str, pattern: str) -> bool:
    """Return whether `re.search` finds a pattern in a name.

    >>> found_in("model.layers.0.mlp.up_proj", r"layers.[0-9]+.mlp")
    True
    """
    return _bounded(pattern).search(name) is not None


def starts(name: str, pattern: str) -> bool:
    """Return whether `re.match` finds a pattern at the start of a name.

    >>> starts("model.layers.0.mlp.up_proj", r"layers.[0-9]+.mlp")
    False
    """
    return _bounded(pattern).match(name) is not None


def _bounded(pattern: str) -> re.Pattern[str]:
    """The compiled pattern; a repeated group, over six repeats, over 500 characters could take forever: refused."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > LENGTH_LIMIT or repeats > REPEATS_LIMIT or re.search(r"\)[*+{]", pattern):
        rule = f"at most {LENGTH_LIMIT} characters and {REPEATS_LIMIT} repeats, none of a group"
        raise FormatError(f"pattern `{pattern[:80]}` of the configuration is too complex ({rule})")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FormatError(f"pattern `{pattern[:80]}` of the configuration is not one ({error})") from None
