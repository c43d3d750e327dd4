"""Which tensors are quantized: by name pattern, as a share of the parameters, and in bits per weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.verdict import Verdict, named, worst
from pytest_quantcheck.quantities import counted
from pytest_quantcheck.tensor import LogicalTensor

Patterns = str | Sequence[str]


def check_quantized(artifact: Artifact, patterns: Patterns) -> Verdict:
    """Require every matrix that a pattern matches to be quantized; vectors (biases, norms) only where named alone."""
    return _check(artifact, patterns, quantized=True)


def check_not_quantized(artifact: Artifact, patterns: Patterns) -> Verdict:
    """Require every tensor that a pattern matches to be plain."""
    return _check(artifact, patterns, quantized=False)


def check_quantized_fraction(artifact: Artifact, *, min: float | None = None, max: float | None = None) -> Verdict:
    """Require the share of logical parameters that is quantized to lie between `min` and `max`, 0 to 1."""
    if min is None and max is None:
        raise ValueError("one of min and max is needed")
    share = artifact.quantized_fraction
    too_low, too_high = min is not None and not share >= min, max is not None and not share <= max
    limits = " and ".join(f"{word} {limit:g}" for word, limit in (("min", min), ("max", max)) if limit is not None)
    counts = f"{artifact.quantized_params:,} of {artifact.logical_params:,} parameters"
    headline = f"quantized fraction: {share:.4f} ({counts}), allowed {limits}"
    if not (too_low or too_high):
        return Verdict("quantized-fraction", True, headline)
    wrong = [tensor for tensor in artifact.parameters if tensor.quantized is too_high]
    title = "largest quantized tensors:" if too_high else "largest tensors left unquantized:"
    return Verdict("quantized-fraction", False, headline, (title, *(f"  {line}" for line in _largest(wrong))))


def check_bits_per_weight(
    artifact: Artifact,
    *,
    max: float | None = None,
    min: float | None = None,
    of: Literal["quantized", "model"] = "quantized",
) -> Verdict:
    """Require the bits per weight, scales included, over the quantized tensors or over the whole `model`."""
    if min is None and max is None:
        raise ValueError("one of min and max is needed")
    if of not in ("quantized", "model"):
        raise ValueError(f"of=`{of}` is neither `quantized` nor `model`")
    quantized, model = artifact.bits_per_weight
    measured = quantized if of == "quantized" else model
    limits = " and ".join(f"{word} {limit:g}" for word, limit in (("min", min), ("max", max)) if limit is not None)
    if measured is None:
        return Verdict("bits-per-weight", False, f"bits per weight: nothing in `{artifact.source}` is quantized")
    over = {"quantized": "the quantized tensors", "model": "the whole model"}
    other, value = ("model", model) if of == "quantized" else ("quantized", quantized)
    beside = "" if value is None else f" ({value:.3f} over {over[other]})"
    headline = f"bits per weight: {measured:.3f} over {over[of]}{beside}, allowed {limits}"
    if (max is None or measured <= max) and (min is None or measured >= min):
        return Verdict("bits-per-weight", True, headline)
    group = [tensor for tensor in artifact.parameters if tensor.quantized or of == "model"]
    group.sort(key=lambda tensor: -abs(tensor.bits_per_weight - (max or min or 0)) * tensor.params)
    lines = [f"{tensor.bits_per_weight:6.3f}  {named(tensor)}" for tensor in group]
    return Verdict("bits-per-weight", False, headline, ("what weighs most:", *(f"  {line}" for line in worst(lines))))


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a tensor name or its module; `re:` in front makes it a regular expression, searched.

    >>> matches("model.layers.3.mlp.up_proj.weight", "*.mlp.*"), matches("lm_head.weight", "lm_head")
    (True, True)
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def _check(artifact: Artifact, patterns: Patterns, *, quantized: bool) -> Verdict:
    check = "quantized" if quantized else "not-quantized"
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("at least one pattern is needed")
    selected: dict[str, LogicalTensor] = {}
    for pattern in patterns:
        group = [tensor for tensor in artifact.parameters if matches(tensor.name, pattern)]
        if not group:
            return Verdict(check, False, f"pattern `{pattern}` matches no parameter of `{artifact.source}`")
        matrices = [tensor for tensor in group if len(tensor.shape) > 1]
        selected |= {tensor.name: tensor for tensor in (matrices if quantized and matrices else group)}
    wrong = [tensor for tensor in selected.values() if tensor.quantized is not quantized]
    state = "quantized" if quantized else "left unquantized"
    total = counted(len(selected), "tensor")
    verb = "matches" if len(patterns) == 1 else "match"
    headline = f"{len(selected) - len(wrong):,} of {total} that {_listed(patterns)} {verb} are {state}"
    title = "not quantized:" if quantized else "quantized:"
    return Verdict(check, not wrong, headline, (title, *(f"  {line}" for line in _largest(wrong))))


def _listed(patterns: list[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)


def _largest(tensors: list[LogicalTensor]) -> list[str]:
    return worst([named(tensor) for tensor in sorted(tensors, key=lambda tensor: -tensor.params)])
