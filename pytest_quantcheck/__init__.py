"""The test kit for quantized models: logical parameter counts, dequantization fidelity and size budgets.

The names below are resolved on first use: importing this package imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_quantcheck.artifact import Artifact, count_params, inspect, logical_numel
    from pytest_quantcheck.asserts import (
        assert_bits_per_weight,
        assert_checkpoint_intact,
        assert_delta_preserved,
        assert_dequant_fidelity,
        assert_kernel_parity,
        assert_logical_params,
        assert_logits_close,
        assert_matches_baseline,
        assert_module_output,
        assert_not_quantized,
        assert_quantized,
        assert_quantized_fraction,
        assert_same_weights,
        assert_size_budget,
        assert_trainable_params,
    )
    from pytest_quantcheck.errors import FormatError, NotDecodable, UnknownEncoding
    from pytest_quantcheck.finding import Finding
    from pytest_quantcheck.quantities import grouped_bits_per_weight
    from pytest_quantcheck.tensor import LogicalTensor

__all__ = [
    "Artifact",
    "Finding",
    "FormatError",
    "LogicalTensor",
    "NotDecodable",
    "UnknownEncoding",
    "assert_bits_per_weight",
    "assert_checkpoint_intact",
    "assert_delta_preserved",
    "assert_dequant_fidelity",
    "assert_kernel_parity",
    "assert_logical_params",
    "assert_logits_close",
    "assert_matches_baseline",
    "assert_module_output",
    "assert_not_quantized",
    "assert_quantized",
    "assert_quantized_fraction",
    "assert_same_weights",
    "assert_size_budget",
    "assert_trainable_params",
    "count_params",
    "grouped_bits_per_weight",
    "inspect",
    "logical_numel",
]

_MODULES = {
    "artifact": ("Artifact", "count_params", "inspect", "logical_numel"),
    "errors": ("FormatError", "NotDecodable", "UnknownEncoding"),
    "finding": ("Finding",),
    "quantities": ("grouped_bits_per_weight",),
    "tensor": ("LogicalTensor",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'asserts')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
