"""Logical and trainable parameter totals against what is expected, and where a difference comes from."""

from __future__ import annotations

from decimal import Decimal
from numbers import Integral, Real
from typing import NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks import layers
from pytest_quantcheck.checks.verdict import Verdict, named, worst
from pytest_quantcheck.quantities import format_count, parse_count

REL = 1e-3

Expected = int | float | str


class _Target(NamedTuple):
    """An expected count, how far off is allowed, and how that reads."""

    value: Decimal
    allowed: Decimal
    text: str

    def holds(self, measured: int) -> bool:
        # NaN fails, whichever number it is.
        return self.value.is_finite() and abs(measured - self.value) <= self.allowed


def check_logical_params(
    artifact: Artifact, expected: Expected, *, rel: float | None = None, abs: float | None = None
) -> Verdict:
    """Compare the logical total: an int exactly, a float within `rel`, a string such as `7.24B` as rounded."""
    target = _target(expected, rel, abs)
    measured = artifact.logical_params
    if not artifact.parameters:
        return Verdict("logical-params", False, f"logical parameters: `{artifact.source}` holds none at all")
    if target.holds(measured):
        return Verdict("logical-params", True, f"logical parameters: {format_count(measured)}, expected {target.text}")
    headline = (
        f"logical parameters: measured {format_count(measured)}, expected {target.text}: {_off(measured, target)}"
    )
    return Verdict("logical-params", False, headline, (*_causes(artifact, target), *_parts_of(artifact)))


def check_trainable_params(
    artifact: Artifact, expected: Expected, *, rel: float | None = None, abs: float | None = None
) -> Verdict:
    """Compare the trainable total of a live model, telling "frozen because packed" from "frozen by choice"."""
    target = _target(expected, rel, abs)
    measured = artifact.trainable_params
    if measured is None:
        raise ValueError(f"`{artifact.source}` is a file: what is trainable is known for live models only")
    if target.holds(measured):
        return Verdict(
            "trainable-params", True, f"trainable parameters: {format_count(measured)}, expected {target.text}"
        )
    headline = (
        f"trainable parameters: measured {format_count(measured)}, expected {target.text}: {_off(measured, target)}"
    )
    return Verdict("trainable-params", False, headline, tuple(_frozen(artifact, target, measured)))


def _target(expected: Expected, rel: float | None, abs_: float | None) -> _Target:
    if isinstance(expected, bool) or not isinstance(expected, (Real, str)):
        raise TypeError(f"expected `{expected}` is neither a count nor text such as `7.24B`")
    if isinstance(expected, str):
        if rel is not None or abs_ is not None:
            raise ValueError(f"`{expected}` says its own precision: rel and abs go with numbers")
        value, half = parse_count(expected)
        return _Target(value, half, f"{expected} (rounded as written)")
    if rel is None and abs_ is None:
        rel = 0.0 if isinstance(expected, Integral) else REL
    # Through text: 0.001 is meant as written, not as the nearest binary fraction.
    value = Decimal(str(expected))
    if not value.is_finite():
        return _Target(value, Decimal(0), f"{expected}")
    allowed = max(Decimal(str(rel or 0.0)) * value.copy_abs(), Decimal(str(abs_ or 0.0)))
    shown = f"{value.normalize():,f}"
    return _Target(value, allowed, f"{shown} exactly" if not allowed else f"{shown} +/- {allowed:,.0f}")


def _off(measured: int, target: _Target) -> str:
    difference = measured - target.value
    if not difference.is_finite() or not target.value:
        return "not comparable"
    side = "more" if difference > 0 else "fewer"
    return f"{difference.copy_abs():,.0f} {side} ({difference / target.value:+.2%})"


def _causes(artifact: Artifact, target: _Target) -> list[str]:
    """The explanations that fit the numbers, the most telling first."""
    measured = artifact.logical_params
    found = []
    if artifact.stored_elements != measured and target.holds(artifact.stored_elements):
        found.append(
            f"the expected number is what numel() over packed weights gives ({artifact.stored_elements:,}): "
            "it counts bytes of codes, not parameters"
        )
    elif target.holds(sum(tensor.stored.elements for tensor in artifact.tensors)):
        found.append("the expected number is the sum over all stored tensors, scales and buffers included")
    if artifact.tied_params and target.holds(measured + artifact.tied_params):
        found.append(f"the expected number counts tied weights twice ({artifact.tied_params:,})")
    if artifact.adapter_params and target.holds(measured - artifact.adapter_params):
        found.append(f"the expected number leaves out the adapters ({artifact.adapter_params:,})")
    if artifact.buffers and target.holds(measured + artifact.buffers):
        found.append(f"the expected number counts buffers ({artifact.buffers:,})")
    if target.value.is_finite() and target.value == target.value.to_integral_value():
        whole = layers.whole_layers(artifact, int(measured - target.value))
        found += [f"the difference is {whole}"] if whole else []
    return [*found, *worst(layers.irregularities(artifact))]


def _parts_of(artifact: Artifact) -> list[str]:
    """What the total is made of: each stack of layers and the largest tensors outside."""
    stacks = layers.stacks(artifact)
    lines = [
        f"{stack}.0 to {max(by_index)}: {sum(by_index.values()):,} in {len(by_index)} layers"
        for stack, by_index in stacks.items()
    ]
    if artifact.adapter_params:
        lines.append(f"adapters: {artifact.adapter_params:,}")
    own = [tensor for tensor in artifact.parameters if tensor.role == "parameter"]
    outside = [t for t in own if not any(t.name.startswith(f"{stack}.") for stack in stacks)]
    outside.sort(key=lambda tensor: -tensor.params)
    return ["counted:", *(f"  {line}" for line in worst([*lines, *map(named, outside)]))]


def _frozen(artifact: Artifact, target: _Target, measured: int) -> list[str]:
    packed = artifact.frozen_packed_params
    chosen = artifact.logical_params - measured - packed
    lines = [
        f"frozen because packed: {packed:,} (integer codes cannot be trained; adapters are trained instead)",
        f"frozen by choice: {chosen:,} (plain weights with requires_grad=False)",
    ]
    if packed and target.holds(measured + packed):
        lines.append("the expected number counts the packed weights as trainable, as they were before quantization")
    if packed and chosen and target.holds(measured + packed + chosen):
        lines.append("the expected number is that of all parameters, frozen ones included")
    if chosen and target.holds(measured + chosen):
        lines.append("the expected number counts weights that were frozen by choice")
    if artifact.adapter_params and target.holds(artifact.adapter_params):
        lines.append("the expected number is that of the adapters: other weights train as well")
    by_choice = [t for t in artifact.parameters if not t.trainable and not t.quantized]
    trained = [t for t in artifact.parameters if t.trainable]
    for title, group in (("trainable:", trained), ("frozen by choice:", by_choice)):
        group.sort(key=lambda tensor: -tensor.params)
        lines += [title, *(f"  {line}" for line in worst(list(map(named, group))))] if group else []
    return lines
