"""torchao `Int4Tensor`: signed 4-bit codes, a scale and a float zero for each group.

    part           dtype  stored shape      packing
    qdata          I8     [..., N, K/2]     two's complement nibbles, low nibble first
    scale          BF16   [..., K/g, N]     transposed
    zero_point     BF16   [..., K/g, N]     transposed, added; all 0 for float8 activations
    act_pre_scale  float  [K]               multiplies the activation

Formula: w = code * scale + zero_point, code from -8 to 7; an `act_pre_scale` multiplies column k by `act_pre_scale[k]`.
Source: torchao 0.18, quantization/quantize_/workflows/int4/int4_tensor.py; FBGEMM `int4_row_quantize_zp`, `pack_int4`.

torchao has no decode of its own for this class: the formula is the inverse of how FBGEMM makes the codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding, torchao_metadata
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch

SIGNED = (*range(8), *range(-8, 0))


class Layout(NamedTuple):
    """Matrices in the stack, rows of one, and groups of a row."""

    stack: int
    rows: int
    groups: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a flattened `qdata` of an `Int4Tensor`."""
    found = torchao_metadata.find(anchor, "qdata", namespace)
    if found is None or found.kind != "Int4Tensor":
        return None
    if anchor.dtype not in ("I8", "U8") or len(anchor.shape) not in (2, 3):
        raise FormatError(
            f"{anchor.dtype} {list(anchor.shape)} is not [(E,) N, K/2] of packed codes", tensor=anchor.name
        )
    shape = found.check_shape((*anchor.shape[:-1], 2 * anchor.shape[-1]))
    blocks = found.sizes("block_size")
    if len(blocks) != len(shape) or set(blocks[:-1]) != {1} or blocks[-1] < 1 or shape[-1] % blocks[-1]:
        raise FormatError(f"{list(shape)} does not divide into groups of {list(blocks)}", tensor=found.name)
    layout = Layout(shape[0] if len(shape) == 3 else 1, shape[-2], shape[-1] // blocks[-1])
    for part in ("scale", "zero_point"):
        found.check_elements(part, (*shape[:-2], layout.groups, layout.rows))
    return LogicalTensor(
        found.name,
        shape,
        "torchao-packed-int4",
        "parameter",
        found.parts("qdata"),
        decode,
        layout,
        block=blocks[-1],
        floor_db=14.0,
        rounding=rounding.grouped(
            rounding.from_least(4, scale="bfloat16"), blocks[-1], margin_db=rounding.COMPENSATED_DB
        ),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    width = tensor.columns // 2
    codes = tensor.stored.load_bytes(start * width, stop * width, device)
    table = torch.tensor(SIGNED, dtype=torch.float32, device=device)
    values = packing.look_up(codes, packing.nibble_pairs(table, high_first=False)).view(stop - start, tensor.columns)
    scale, zero = (_by_row(tensor, part, start, stop, device) for part in ("scale", "zero_point"))
    packing.by_column_block(values, scale).mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1))
    if tensor.has("act_pre_scale"):
        values.mul_(tensor.part("act_pre_scale").load(device=device).to(torch.float32))
    return values


def _by_row(tensor: LogicalTensor, part: str, start: int, stop: int, device: str) -> torch.Tensor:
    """The factors of each row, undoing the transposition."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    stored = tensor.part(part).load(device=device).to(torch.float32)
    rows = stored.view(layout.stack, layout.groups, layout.rows).transpose(1, 2)
    return rows.reshape(layout.stack * layout.rows, layout.groups)[start:stop]


SCHEME = Scheme(
    name="torchao-int4",
    title="torchao packed int4 (plain layout)",
    variants=("torchao-packed-int4",),
    claim=claim,
    anchors=("_qdata",),
    methods=("torchao",),
    live={"torchao.Int4Tensor": torchao_metadata.expose},
    source="torchao 0.18, int4_tensor.py; FBGEMM experimental/gen_ai quantize.py",
    verified="torchao 0.18.0 (classes), FBGEMM source (codes)",
)
