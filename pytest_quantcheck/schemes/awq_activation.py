"""AWQ's activation scales: a vector that AWQ adds where no layer before the next linear one could take it in.

    part    dtype     stored shape  packing
    scales  F16/BF16  [K]           none

Formula: the output of the activation is divided by it; the unquantized model has no such tensor, so it never counts.
Source: AutoAWQ 0.2.9, awq/modules/act.py `ScaledActivation`.
"""

from __future__ import annotations

from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the scales of an activation: a vector of an AWQ model with no codes beside it."""
    stem, _, last = anchor.name.rpartition(".")
    if last != "scales" or len(anchor.shape) != 1 or anchor.dtype not in ("F16", "BF16", "F32"):
        return None
    if namespace.quantization.get("quant_method") != "awq" or f"{stem}.qweight" in namespace.tensors:
        return None
    return LogicalTensor(anchor.name, anchor.shape, "awq-activation", "part", (Part("scales", "scales", anchor),), None)


SCHEME = Scheme(
    name="awq-activation",
    title="AWQ's activation scales",
    variants=("awq-activation",),
    claim=claim,
    anchors=("scales",),
    methods=("awq",),
    source="AutoAWQ 0.2.9, awq/modules/act.py",
    verified="shapes only",
    decoded="no",
)
