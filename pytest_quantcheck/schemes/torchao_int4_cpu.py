"""torchao `Int4OpaqueTensor` for the CPU: 4-bit codes in the order that torch's kernel wants. Live only.

    part            dtype        stored shape   packing
    qdata           U8           [N, K/2]       blocks of 64 rows, nibbles in an order of the CPU
    scale_and_zero  BF16, float  [K/g, N, 2]    scale, zero
    act_pre_scale   float        [K]            multiplies the activation

Formula: w = (code - 8) * scale + zero; column k is multiplied by `act_pre_scale[k]` where there is one.
Source: torchao 0.18, prototype/quantization/int4/int4_opaque_tensor.py; torch 2.13, int4mm_kernel.cpp.

With `act_mapping_type` the codes are prepacked for another kernel (`da8w4_linear_cpu`): counted and weighed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding, torchao_metadata
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a flattened `qdata` of an `Int4OpaqueTensor`."""
    found = torchao_metadata.find(anchor, "qdata", namespace)
    if found is None or found.kind != "Int4OpaqueTensor":
        return None
    shape, blocks = found.sizes("shape"), found.sizes("block_size")
    if len(shape) != 2 or len(blocks) != 2 or blocks[1] < 1 or shape[1] % blocks[1]:
        raise FormatError(f"{list(shape)} does not divide into groups of {list(blocks)}", tensor=found.name)
    prepacked = found.attributes.get("act_mapping_type") is not None
    if not prepacked:
        if 2 * anchor.nbytes != shape[0] * shape[1]:
            raise FormatError(f"{anchor.nbytes:,} bytes do not pack {list(shape)} in 4 bits", tensor=anchor.name)
        found.check_elements("scale_and_zero", (shape[1] // blocks[1], shape[0], 2))
    return LogicalTensor(
        found.name,
        shape,
        "torchao-int4-cpu",
        "parameter",
        found.parts("qdata"),
        decode_prepacked if prepacked else decode,
        block=blocks[1],
        floor_db=16.5,
        rounding=rounding.grouped(
            rounding.from_least(4, scale="bfloat16"), blocks[1], margin_db=rounding.COMPENSATED_DB
        ),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    assert tensor.block is not None
    rows, columns = tensor.shape
    if stop <= start:
        return torch.empty((0, columns), device=device)
    codes = packing.int4_rows_for_cpu(tensor.stored, rows, columns, start, stop).to(device)
    values = codes.to(torch.float32).sub_(8)
    both = tensor.part("scale_and_zero").load(device=device).to(torch.float32).view(-1, rows, 2)[:, start:stop]
    scale, zero = both[..., 0].t(), both[..., 1].t()  # (rows, groups)
    packing.by_column_block(values, scale).mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1))
    if tensor.has("act_pre_scale"):
        values.mul_(tensor.part("act_pre_scale").load(device=device).to(torch.float32))
    return values


def decode_prepacked(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Raise `NotDecodable`: torchao has no inverse of this order."""
    raise NotDecodable("is prepacked for `da8w4_linear_cpu`, whose order torchao cannot undo", tensor=tensor.name)


SCHEME = Scheme(
    name="torchao-int4-cpu",
    title="torchao int4 for the CPU kernel",
    variants=("torchao-int4-cpu",),
    claim=claim,
    anchors=("_qdata",),
    live={"torchao.Int4OpaqueTensor": torchao_metadata.expose},
    source="torchao 0.18, int4_opaque_tensor.py; torch 2.13, int4mm_kernel.cpp",
    verified="torchao 0.18.0, torch 2.13",
    decoded="CPU",
)
