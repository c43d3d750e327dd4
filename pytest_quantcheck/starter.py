"""A configuration written from artifacts as they are today, so that the first run is green and the next one guards."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator

from pytest_quantcheck.artifact import Artifact, inspect
from pytest_quantcheck.checks import coverage, integrity
from pytest_quantcheck.containers.remote import is_url

MARGIN_PERCENT = 5
HEAD = f"# Written by quantcheck init: counts are exact, sizes are those of that day and {MARGIN_PERCENT} % more.\n"
MOST_PATTERNS = 8
_UNITS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def render(paths: Iterable[str], folder: str) -> str:
    """Return the text of a configuration that lies in `folder`."""
    return HEAD + "".join("\n" + "\n".join(_table(path, folder)) + "\n" for path in paths)


def _table(path: str, folder: str) -> Iterator[str]:
    artifact = inspect(path)
    if not artifact.parameters:
        raise ValueError(f"{artifact.source}: holds no parameter, so there is nothing to guard")
    yield "[[artifact]]"
    yield f"path = {_quoted(path if is_url(path) else os.path.relpath(path, folder or '.'))}"
    yield f"logical_params = {artifact.logical_params:_}"
    yield f"size = {_quoted(_budget(artifact.file_bytes))}"
    if artifact.bits_per_weight.quantized is not None:
        yield f"bits_per_weight = {math.ceil(artifact.bits_per_weight.quantized * 100) / 100}"
        yield f"quantized_fraction = {math.floor(artifact.quantized_fraction * 10_000) / 10_000}"
        patterns = _plain(artifact)
        if patterns:
            yield f"must_not_be_quantized = [{', '.join(map(_quoted, patterns))}]"
    yield f"integrity = {_integrity(artifact)}"


def _budget(size: int) -> str:
    """The bytes and a margin, rounded up to what people write."""
    whole = -(-size * (100 + MARGIN_PERCENT) // 100)
    unit, scale = next(((unit, scale) for unit, scale in _UNITS if whole >= scale), ("B", 1))
    hundredths = -(-whole * 100 // scale)
    return f"{whole} B" if scale == 1 else f"{hundredths // 100}.{hundredths % 100:02} {unit}"


def _plain(artifact: Artifact) -> list[str]:
    """Patterns of the matrices that stayed plain, layers taken together, each true today; none where they are many."""
    matrices = [tensor for tensor in artifact.parameters if not tensor.quantized and len(tensor.shape) > 1]
    names = dict.fromkeys(_INDEX.sub("*", tensor.name.removesuffix(".weight")) for tensor in matrices)
    patterns = [name for name in names if coverage.check_not_quantized(artifact, [name]).passed]
    return patterns if len(patterns) <= MOST_PATTERNS else []


def _integrity(artifact: Artifact) -> str:
    """The headers, and what is wrong with them already."""
    verdict = integrity.check_intact(artifact, values=False)
    if verdict.passed:
        return '"headers"'
    known = dict.fromkeys(finding.check for finding in verdict.findings if finding.severity != "note")
    return f"{{ values = false, allow = [{', '.join(map(_quoted, known))}] }}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
