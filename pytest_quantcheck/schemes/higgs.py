"""HIGGS: codes of a vector grid, packed by FLUTE for one GPU, over weights turned by a Hadamard transform.

    part     dtype  stored shape             packing
    weight   I16    [N * bits / 16, K]       FLUTE's, made for a number of multiprocessors (`tune_metadata`)
    scales   float  [N, K / group]
    tables   float  [2 ** bits]
    tables2  float  [2 ** bits, 2 ** bits, 2]  pairs of table values; F16 [.., .., 4] where saved as halves of F32

Formula: Hadamard transform, in blocks of `hadamard_size` along K, of table2[codes] * scale.
Source: transformers 5.17, integrations/higgs.py (`HiggsLinear`, `quantize_with_higgs`); flute 0.4.2.

Counted and weighed only: the order of the codes is that of a GPU's multiprocessors, and only FLUTE's GPU kernel undoes
it. K was padded to `hadamard_size` by the quantizer; the model's configuration says the width where it is smaller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import architecture
from pytest_quantcheck.schemes.scheme import Namespace, Scheme, joined
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "higgs_linear"  # live only: in_features
RECORD_LIMIT = 1 << 10
PARTS: dict[str, ByteClass] = {"weight": "codes", "scales": "scales", "tables": "codebooks", "tables2": "codebooks"}
BITS = (2, 3, 4)


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `tables` belong to."""
    prefix, _, last = anchor.name.rpartition(".")
    found = {part: namespace.tensors.get(joined(prefix, part)) for part in PARTS}
    announced = namespace.quantization.get("quant_method") == "higgs"
    if last not in PARTS or (not announced and (found["tables"] is None or found["tables2"] is None)):
        return None
    for part, stored in found.items():
        if stored is None:
            raise FormatError(f"has no `{joined(prefix, part)}` beside it", tensor=anchor.name)
    parts = [Part(part, PARTS[part], stored) for part, stored in found.items() if stored is not None]
    record = namespace.tensors.get(joined(prefix, RECORD))
    if record is not None:
        parts.append(Part(RECORD, "bookkeeping", record))
    name = joined(prefix, "weight")
    tensor = LogicalTensor(name, (0, 0), "higgs", "parameter", tuple(parts), decode)
    rows, bits, group = _sizes(tensor, namespace)
    columns = _columns(tensor, rows, namespace)
    return tensor._replace(shape=(rows, columns), scheme=f"higgs-{bits}bit", block=group)


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say what packed codes lack."""
    last = stored.name.rpartition(".")[2]
    if last != "scales" and (last != "weight" or stored.dtype != "I16"):
        return None
    return "is part of a packed weight, but has no `weight`, `scales`, `tables` and `tables2` beside it"


def _sizes(tensor: LogicalTensor, namespace: Namespace) -> tuple[int, int, int]:
    """Rows, bits and group size, which the four shapes give together."""
    weight, scales, tables, tables2 = (tensor.part(part) for part in PARTS)
    if weight.dtype != "I16" or len(weight.shape) != 2 or len(scales.shape) != 2 or not scales.elements:
        rule = "I16 [N * bits / 16, K] with scales [N, K / group]"
        raise FormatError(f"{weight.dtype} {list(weight.shape)} is no HIGGS weight ({rule})", tensor=weight.name)
    rows, groups = scales.shape
    bits = namespace.quantization.get("bits", tables.elements.bit_length() - 1)
    if type(bits) is not int or bits not in BITS or 16 * weight.shape[0] != rows * bits:
        rule = f"{bits} bits of {rows:,} rows"
        raise FormatError(f"has {weight.shape[0]:,} rows of 16-bit words, which is not {rule}", tensor=weight.name)
    if tables.shape != (2**bits,) or tables2.shape[:2] != (2**bits, 2**bits) or len(tables2.shape) != 3:
        shapes = f"{list(tables.shape)} and {list(tables2.shape)}"
        raise FormatError(f"has tables of {shapes} for {bits} bits", tensor=tables.name)
    group = namespace.quantization.get("group_size", weight.shape[1] // groups)
    if type(group) is not int or weight.shape[1] != groups * group:
        raise FormatError(f"has {groups} groups of {group} for {weight.shape[1]:,} columns", tensor=scales.name)
    return rows, bits, group


def _columns(tensor: LogicalTensor, rows: int, namespace: Namespace) -> int:
    """K, which the quantizer padded to blocks of the Hadamard transform."""
    padded: int = tensor.stored.shape[1]
    if tensor.has(RECORD):
        record = tensor.part(RECORD).read(limit=RECORD_LIMIT)
        return int(strict_json.parse_object(record, limit=RECORD_LIMIT)["columns"])
    block = namespace.quantization.get("hadamard_size", 512)
    if type(block) is not int or block < 1:
        raise FormatError(f"hadamard_size `{block}` is not a positive size", tensor=tensor.name)
    shape = architecture.fitting_shape(
        tensor.name, namespace.config, lambda n, k: n == rows and k <= padded < k + block and padded % block == 0
    )
    return shape[1] if shape else padded


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Raise `NotDecodable`: the order of the codes is known to a GPU kernel only."""
    what = "its codes are packed for one GPU's multiprocessors: only FLUTE's kernel (flute-kernel, CUDA) unpacks them"
    raise NotDecodable(what, tensor=tensor.name)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a layer with the width it was made for."""
    if name:
        return None
    held = {part: owner._parameters[part] for part in PARTS}
    return held | {RECORD: json.dumps({"columns": owner.in_features}).encode()}


SCHEME = Scheme(
    name="higgs",
    title="HIGGS (vector grids, packed by FLUTE)",
    variants=tuple(f"higgs-{bits}bit" for bits in BITS),
    claim=claim,
    anchors=("tables", "tables2"),
    methods=("higgs",),
    live={"transformers.HiggsLinear": expose},
    refuse=refuse,
    source="transformers 5.17, integrations/higgs.py",
    verified="transformers 5.17.0 (shapes)",
    decoded="no: codes are packed for one GPU's multiprocessors",
)
