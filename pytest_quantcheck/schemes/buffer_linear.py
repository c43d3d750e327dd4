"""Linear layers that keep everything in buffers: how those of any library are shown, and what only they know.

GPTQ's and AWQ's layers have no parameters at all. Their buffers have the names of a checkpoint's tensors; what the
module knows beside them travels as a JSON record, `qweight.module`.
Source: GPTQModel 7.6.0, nn_modules/qlinear; auto-round 0.16.1, auto_round_extension; AutoAWQ 0.2.9, modules/linear;
AutoGPTQ 0.7.1, nn_modules/qlinear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import UnknownEncoding
from pytest_quantcheck.tensor import StoredTensor

RECORD = "qweight.module"
SHOWN = ("qweight", "qzeros", "scales", "scaled_zeros", "g_idx", "bias")

# Kernels that keep the layout of the checkpoint in memory; the others repack it for their device.
PLAIN = frozenset(
    {
        "TorchLinear", "TorchQuantEmbeddings", "TritonV2Linear", "QuantLinear",
        "AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear", "AwqGEMVLinear", "AwqGEMVFastLinear", "LLMAwqLinear",
        "WQLinear_GEMM", "WQLinear_GEMV", "WQLinear_GEMVFast", "WQLinear_Marlin",
    }
)  # fmt: skip
PLAIN_UNTIL_FIRST_FORWARD = frozenset(
    {"TorchFusedLinear", "TorchAtenLinear", "TorchFusedAwqLinear", "TorchAtenAwqLinear"}
)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show the buffers of a layer that has a `qweight`, with what only the module knows about them.

    Raises `UnknownEncoding` where a kernel has replaced it by something of its own, which nobody would count.
    """
    if name:
        return None
    shown = {part: owner._buffers[part] for part in SHOWN if owner._buffers.get(part) is not None}
    if "qweight" not in shown:
        what = f"`{type(owner).__name__}` has replaced its `qweight`: inspect the checkpoint, or load with TorchLinear"
        raise UnknownEncoding(what)
    return shown | {RECORD: json.dumps(_record(owner, shown["qweight"])).encode()}


def record(stored: StoredTensor | None) -> Mapping[str, Any]:
    """Return what a live module knows; nothing for a file."""
    return {} if stored is None else strict_json.parse_object(stored.read(limit=4096), limit=4096)


def _record(owner: Any, qweight: Any) -> dict[str, Any]:
    kernel, module = type(owner).__name__, type(owner).__module__
    plain = kernel in PLAIN and "exllama" not in module and "marlin" not in module.removesuffix("linear.marlin")
    plain |= kernel in PLAIN_UNTIL_FIRST_FORWARD and getattr(owner, "linear_mode", None) != "inference"
    return {
        "bits": _number(owner, "bits", "w_bit"),
        "group_size": _number(owner, "group_size"),
        "inputs": _number(owner, "in_features", "infeatures"),
        "planar": getattr(owner, "planar", None if not hasattr(owner, "bits") else False),
        "zero_offset": _zero_offset(owner),
        "embedding": "Embedding" in kernel,
        "awq": kernel.startswith(("WQLinear", "Awq", "LLMAwq")) or "Awq" in kernel,
        "auto_round": module.startswith(("auto_round.", "auto_round_extension.")),
        "repacked_for": None if plain or qweight.is_meta else kernel,
        "meta": qweight.is_meta,
    }


def _number(owner: Any, *names: str) -> int | None:
    found = (getattr(owner, name, None) for name in names)
    return next((value for value in found if type(value) is int), None)


def _zero_offset(owner: Any) -> int | None:
    """What a GPTQ module subtracts from zero points: GPTQModel's say it, auto-round's are told apart by their file."""
    if callable(getattr(owner, "qzero_format", None)):
        return 2 - int(owner.qzero_format())
    module = type(owner).__module__
    if module.startswith("auto_round_extension."):
        return int(module.endswith("_zp"))
    return 1 if module.startswith("auto_gptq.") else None
