"""AWQ, `gemv` version: one row per output, groups padded to whole tiles.

    part     dtype  stored shape  packing
    qweight  I32    [N, K/8]      4-bit codes, lowest bits first, in order
    qzeros   I32    [N, Z]        4-bit zero points of the groups, lowest bits first, then zeros
    scales   F16    [N, 8*Z]      of the groups, then zeros

Formula: w[n, k] = (code[n, k] - zero[n, k // g]) * scales[n, k // g], in float32.
Source: AutoAWQ 0.2.9, awq/modules/linear/gemv.py; GPTQModel 7.6.0, nn_modules/qlinear/gemv_awq.py, utils/gemv.py.

8*Z is the number of groups, rounded up to a multiple of 8, 16, 32 or 64 for groups of 128 and more, 64, 32 and 16.
Where no config says the group size, the padding does: the first row of scales ends in zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.schemes import awq_groups, buffer_linear, packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "qweight": "codes",
    "qzeros": "zero_points",
    "scales": "scales",
    buffer_linear.RECORD: "bookkeeping",  # live only
}
METHODS = ("awq",)


class Layout(NamedTuple):
    """How many inputs share a scale."""

    group_size: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `qweight` belongs to, where its shapes are those of the gemv version."""
    prefix = anchor.name.removesuffix("qweight")
    if (namespace.quantization.get("quant_method") or "awq") not in METHODS or prefix[-1:] not in ("", "."):
        return None
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    shape = _shape(found)
    if shape is None:
        return None
    record = buffer_linear.record(found.get(buffer_linear.RECORD))
    if record and not record.get("awq"):
        return None
    scales = found["scales"]
    size = awq_groups.group_size(
        scales,
        padded=scales.shape[1],
        inputs=shape[1],
        quantization=namespace.quantization,
        record=record,
        filled=_groups_in_first_row,
    )
    return LogicalTensor(
        f"{prefix}weight",
        shape,
        "awq-gemv",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        Layout(size),
        block=size,
        rounding=rounding.grouped(
            rounding.affine(4, scale=rounding.kept_in(found["scales"])), size, margin_db=rounding.COMPENSATED_DB
        ),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    return packing.expand(coded(tensor, start, stop, device)).view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` as codes."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    codes, table = packing.integers(_rows(tensor.stored, start, stop, device), 4, tensor.columns)
    groups = -(-tensor.columns // layout.group_size)
    scales = _rows(tensor.part("scales"), start, stop, device)[:, :groups].to(torch.float32)
    zeros = packing.unpack_words(_rows(tensor.part("qzeros"), start, stop, device), 4, groups).to(torch.float32)
    return Coded(codes, table, scales, layout.group_size, zeros)


def _rows(stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
    width = stored.shape[1]
    return stored.load(start * width, stop * width, device).view(stop - start, width)


def _shape(parts: Mapping[str, StoredTensor]) -> tuple[int, int] | None:
    """The shape of the weight, [N, K], or None where the shapes are those of another layout."""
    if not all(part in parts and len(parts[part].shape) == 2 for part in ("qweight", "qzeros", "scales")):
        return None
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    rows = qweight.shape[0] == qzeros.shape[0] == scales.shape[0]
    if not rows or scales.shape[1] != 8 * qzeros.shape[1] or (qweight.dtype, qzeros.dtype) != ("I32", "I32"):
        return None
    return qweight.shape[0], 8 * qweight.shape[1]


def _groups_in_first_row(scales: StoredTensor) -> int:
    """How many scales the first row has before the padding."""
    raw = scales.source.read(scales.offset, scales.offset + 2 * scales.shape[1])
    return -(-len(raw.rstrip(b"\0")) // 2)


SCHEME = Scheme(
    name="awq-gemv",
    title="AWQ, gemv version",
    variants=("awq-gemv",),
    claim=claim,
    anchors=("qweight",),
    methods=METHODS,
    coders={decode: coded},
    source="AutoAWQ 0.2.9, awq/modules/linear/gemv.py; GPTQModel 7.6.0, nn_modules/qlinear/gemv_awq.py",
    verified="AutoAWQ 0.2.9, GPTQModel 7.6.0 (packers; their kernels need a GPU)",
)
