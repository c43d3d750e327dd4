"""NVFP4 made on the fly by transformers: exists in memory alone, in the order of its kernel.

    part                 dtype  stored shape   packing
    weight               U8     kernel's own   two E2M1 codes in a byte, as the kernel permutes them
    weight_sf            I32    kernel's own   four E4M3 scales in a word, swizzled
    weight_sf_rowmajor   U8     [N, K/16]      the same scales once more, row by row
    weight_global_scale  F32    [1]

Formula: E2M1 * scale * global scale, in the order that the GPU kernel `kernels-community/nvfp4` keeps to itself:
counted and weighed (the scales twice, as they are held), not decoded. Before it is packed the weight is plain bfloat16.
Source: transformers 5.17, integrations/nvfp4.py. All four are buffers, so `parameters()` has none of them; the layer
cannot be saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "weight_nvfp4"
RECORD_LIMIT = 1 << 10
PARTS: dict[str, ByteClass] = {
    "weight_sf": "scales",
    "weight_sf_rowmajor": "scales",
    "weight_global_scale": "scales",
    RECORD: "bookkeeping",
}


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a live `NVFP4Linear`."""
    prefix = anchor.name.removesuffix(RECORD)
    weight = namespace.tensors.get(f"{prefix}weight")
    if weight is None:
        return None
    rows, columns = strict_json.parse_object(anchor.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)["shape"]
    others = ((name, kind, namespace.tensors.get(f"{prefix}{name}")) for name, kind in PARTS.items())
    parts = [Part(name, kind, stored) for name, kind, stored in others if stored is not None]
    if weight.dtype in ("BF16", "F16", "F32"):
        plain = (Part("weight", "unquantized", weight), *parts)
        return LogicalTensor(weight.name, (rows, columns), "plain", "parameter", plain, packing.decode_floats)
    if weight.nbytes * 2 != rows * columns:
        rule = f"{rows * columns // 2:,} for [{rows}, {columns}]"
        raise FormatError(f"has {weight.nbytes:,} bytes of 4-bit codes ({rule})", tensor=weight.name)
    codes = (Part("weight", "codes", weight), *parts)
    return LogicalTensor(weight.name, (rows, columns), "nvfp4-live", "parameter", codes, decode, block=16)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Raise: the order of the codes is the kernel's own."""
    raise NotDecodable("its codes are in the order of the GPU kernel `kernels-community/nvfp4`", tensor=tensor.name)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Add to the buffers of a live module the sizes that it was made with."""
    return {RECORD: json.dumps({"shape": [owner.out_features, owner.in_features]}).encode()}


SCHEME = Scheme(
    name="nvfp4-live",
    title="NVFP4 on the fly (transformers)",
    variants=("nvfp4-live",),
    claim=claim,
    anchors=(RECORD,),
    methods=("nvfp4",),
    live={"transformers.NVFP4Linear": expose},
    source="transformers 5.17.0, integrations/nvfp4.py",
    verified="transformers 5.17.0 (sizes)",
    decoded="no",
)
