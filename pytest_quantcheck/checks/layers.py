"""Stacks of layers: which are missing, and which differ from their siblings."""

from __future__ import annotations

import re
from collections import Counter

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.quantities import counted

LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def stacks(artifact: Artifact) -> dict[str, dict[int, int]]:
    """Return the logical parameters of each layer, by stack (`model.layers`) and index; adapters left out."""
    found: dict[str, Counter[int]] = {}
    for tensor in artifact.parameters:
        match = LAYER.match(tensor.name)
        if match and tensor.role == "parameter":
            found.setdefault(match.group(1), Counter())[int(match.group(2))] += tensor.params
    return {stack: dict(sorted(layers.items())) for stack, layers in found.items()}


def irregularities(artifact: Artifact) -> list[str]:
    """Return what is odd about the stacks: missing indices, layers unlike their siblings, fewer than configured."""
    found = []
    declared = _declared_layers(artifact)
    all_stacks = stacks(artifact)
    for stack, layers in all_stacks.items():
        missing = sorted(set(range(max(layers))) - layers.keys())
        if missing:
            found.append(f"`{stack}` has no layer {_listed(missing)} (it goes up to {max(layers)})")
        if declared and len(all_stacks) == 1 and len(layers) != declared and not missing:
            found.append(f"`{stack}` has {len(layers)} layers, config.json says {declared}")
        found += _unlike_siblings(stack, layers)
    return found


def _unlike_siblings(stack: str, layers: dict[int, int]) -> list[str]:
    (usual, count), *_ = Counter(layers.values()).most_common(1)
    if count < 2 or count <= len(layers) // 2:
        return []
    return [
        f"`{stack}.{index}` has {params:,} parameters, its siblings {usual:,} each"
        for index, params in layers.items()
        if params != usual
    ]


def whole_layers(artifact: Artifact, difference: int) -> str | None:
    """Return how many whole layers a difference is, where it is."""
    for stack, layers in stacks(artifact).items():
        (size, _), *_ = Counter(layers.values()).most_common(1)
        if len(layers) > 1 and size and difference % size == 0:
            count = abs(difference) // size
            return f"exactly {counted(count, 'layer')} of `{stack}` ({size:,} parameters each)"
    return None


def _declared_layers(artifact: Artifact) -> int | None:
    config = artifact.configs.get("config.json", {})
    return next((value for key in _LAYER_COUNTS if isinstance(value := config.get(key), int)), None)


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:5])) + (" ..." if len(indices) > 5 else "")
