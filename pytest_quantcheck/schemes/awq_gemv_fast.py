"""AWQ, `gemv_fast` version and llm-awq: four rows interleaved, zero points already multiplied.

    part          dtype     stored shape  packing
    qweight       I16       [N/4, K]      4-bit codes of four rows, see below
    scales        F16/BF16  [8*Z, N]      of the groups, then zeros
    qzeros        F16/BF16  [8*Z, N]      -(zero * scale) of the groups, then zeros; llm-awq calls it scaled_zeros

Formula: w[n, k] = code[n, k] * scales[k // g, n] + qzeros[k // g, n], in float32.
Source: AutoAWQ 0.2.9, awq/modules/linear/gemv_fast.py; GPTQModel 7.6.0, nn_modules/qlinear/gemv_fast_awq.py.

Four rows of 64 inputs are one run of 256 codes, row after row, lowest bits first. Within each row, every 32 inputs are
shuffled: pairs are taken from four eights in turn (0, 1, 8, 9, 16, 17, 24, 25, 2, 3, ...), then of every eight so found
the even ones come first. Z is the padded number of groups over 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import awq_groups, buffer_linear, packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "qweight": "codes",
    "scales": "scales",
    "qzeros": "zero_points",
    "scaled_zeros": "zero_points",
    buffer_linear.RECORD: "bookkeeping",  # live only
}
METHODS = ("awq",)
FLOATS = ("F16", "BF16", "F32")


class Layout(NamedTuple):
    """How many inputs share a scale, and which part holds the zero points."""

    group_size: int
    zeros: str


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `qweight` belongs to, where its dtypes are those of the gemv_fast version."""
    prefix = anchor.name.removesuffix("qweight")
    if anchor.dtype != "I16" or prefix[-1:] not in ("", "."):
        return None
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    zeros = next((part for part in ("scaled_zeros", "qzeros") if part in found), None)
    if zeros is None or found[zeros].dtype not in FLOATS:
        return None
    shape = _shape(found, zeros)
    record = buffer_linear.record(found.get(buffer_linear.RECORD))
    scales = found["scales"]
    size = awq_groups.group_size(
        scales,
        padded=scales.shape[0],
        inputs=shape[1],
        quantization=namespace.quantization,
        record=record,
        filled=_groups_in_first_column,
    )
    return LogicalTensor(
        f"{prefix}weight",
        shape,
        "awq-gemv-fast",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        Layout(size, zeros),
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
    codes = _ordered(tensor, start, stop, device)
    table = packing.nibble_pairs(torch.arange(16, dtype=torch.float32, device=device), high_first=False)
    groups = -(-tensor.columns // layout.group_size)
    scales, zeros = (
        packing.load_columns(tensor.part(part), start, stop, device)[:groups].t().to(torch.float32).contiguous()
        for part in ("scales", layout.zeros)
    )  # (rows, groups)
    return Coded(codes, table, scales, layout.group_size, shifts=zeros)


def _ordered(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """The codes of some rows in order, two in a byte; neighbours lie four nibbles apart in one of four words.

    ->  # (rows * K / 2,) uint8
    """
    import torch

    columns = tensor.columns
    low, high = start // 4, -(-stop // 4)
    runs = tensor.stored.load(low * columns, high * columns, device).view(torch.int32)
    rows = runs.view(high - low, columns // 64, 4, 2, 4).transpose(1, 2)  # (fours, row, runs, half of a run, words)
    words = rows.reshape(4 * (high - low), columns // 32, 4)[start - 4 * low : stop - 4 * low]
    pairs = [((words >> shift) & 0x0F) | ((words >> (shift + 12)) & 0xF0) for shift in (0, 4, 8, 12)]
    return torch.stack([pair.to(torch.uint8) for pair in pairs], dim=2).view(-1)


def _shape(parts: Mapping[str, StoredTensor], zeros: str) -> tuple[int, int]:
    qweight = parts["qweight"]
    if "scales" not in parts:
        raise FormatError(f"has no `{qweight.name.removesuffix('qweight')}scales` beside it", tensor=qweight.name)
    scales = parts["scales"]
    if len(qweight.shape) != 2 or qweight.shape[1] % 64:
        raise FormatError(f"I16 {list(qweight.shape)} is not [N/4, K] with K a multiple of 64", tensor=qweight.name)
    if len(scales.shape) != 2 or scales.dtype not in FLOATS or scales.shape[1] != 4 * qweight.shape[0]:
        rule = f"a column for each of {4 * qweight.shape[0]:,} outputs"
        raise FormatError(f"{scales.dtype} {list(scales.shape)} is not float scales, {rule}", tensor=scales.name)
    if parts[zeros].shape != scales.shape:
        what = f"{list(parts[zeros].shape)} is not {list(scales.shape)}, the shape of `scales`"
        raise FormatError(what, tensor=parts[zeros].name)
    return scales.shape[1], qweight.shape[1]


def _groups_in_first_column(scales: StoredTensor) -> int:
    """How many rows of scales come before the padding, by their first values."""
    width = scales.nbytes // max(1, scales.elements)
    step = width * scales.shape[1]
    starts = range(scales.offset, scales.offset + scales.shape[0] * step, step)
    filled = [any(scales.source.read(start, start + width)) for start in starts]
    return len(filled) - filled[::-1].index(True) if any(filled) else 0


SCHEME = Scheme(
    name="awq-gemv-fast",
    title="AWQ, gemv_fast version, and llm-awq",
    variants=("awq-gemv-fast",),
    claim=claim,
    anchors=("qweight",),
    methods=METHODS,
    coders={decode: coded},
    source="AutoAWQ 0.2.9, awq/modules/linear/gemv_fast.py; GPTQModel 7.6.0, nn_modules/qlinear/gemv_fast_awq.py",
    verified="GPTQModel 7.6.0 (packer; its kernels need a GPU)",
)
