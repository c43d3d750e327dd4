"""What the `config_groups` of a checkpoint say about one module: compressed-tensors and ModelOpt share this record.

    {"group_0": {"targets": ["Linear", "re:.*down_proj"], "weights": {"num_bits": 4, "group_size": 128, ...}}}

Targets name classes, which a file does not know, modules, or patterns over module names. So the stored shapes decide
first which groups are possible at all, and names are asked only where several are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import patterns
from pytest_quantcheck.schemes.scheme import Namespace

ARGS = "weight_quantization_args"  # what a live module says about itself, as JSON beside its weight
ARGS_LIMIT = 16 << 10


def weight_args(
    module: str, namespace: Namespace, fits: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any] | None:
    """Return the weight settings of a module among those that fit its stored shapes, None where nothing is said.

    Raises `FormatError` where settings exist and none fits, or where several do and the names do not decide.
    """
    groups = _groups(module, namespace)
    fitting = [(targets, args) for targets, args in groups if fits(args)]
    if groups and not fitting:
        said = "; ".join(_shown(args) for _, args in groups[:3])
        raise FormatError(f"its shapes fit none of the configured groups ({said})", tensor=module)
    found = _distinct(fitting)
    if len(found) > 1:
        found = _distinct([(targets, args) for targets, args in fitting if _named(module, targets)]) or found
    if len(found) > 1:
        said = "; ".join(_shown(args) for args in found[:3])
        raise FormatError(f"several configured groups fit it ({said})", tensor=module)
    return found[0] if found else None


def _groups(module: str, namespace: Namespace) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    own = namespace.tensors.get(f"{module}.{ARGS}" if module else ARGS)
    if own is not None:
        return [((), strict_json.parse_object(own.read(limit=ARGS_LIMIT), limit=ARGS_LIMIT))]
    groups = namespace.quantization.get("config_groups")
    return list(_weights(groups)) if isinstance(groups, Mapping) else []


def _weights(groups: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            targets = group.get("targets")
            yield tuple(map(str, targets)) if isinstance(targets, list) else (), weights


def _distinct(groups: list[tuple[tuple[str, ...], Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for _, args in groups:
        if all(_shown(args) != _shown(other) for other in found):
            found.append(args)
    return found


def _shown(args: Mapping[str, Any]) -> str:
    keys = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
    return ", ".join(f"{key} {args[key]}" for key in keys if args.get(key) is not None)


def _named(module: str, targets: tuple[str, ...]) -> bool:
    return any(
        target == module or (target.startswith("re:") and patterns.starts(module, target[3:])) for target in targets
    )
