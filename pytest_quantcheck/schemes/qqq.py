"""QQQ: 4-bit codes in Marlin's tiles, scaled to 8 bits by group and from there to values by output.

    part       dtype  stored shape  packing
    B          I32    [K/16, 2*N]   4-bit codes in tiles, permuted (see `marlin_tiles`)
    s_channel  F32    [1, N]        permuted within every 32 outputs
    s_group    F16    [G, N]        permuted within every 64 outputs; empty or absent: one group
    workspace, reduce_buffer        scratch memory of the kernel, where it was saved at all

Formula: w[n, k] = clamp(round((code - 8) * s_group[k // g, n]), -128, 127) * s_channel[n], in float32; with one group
16 * code * s_channel[n], the code in two's complement.
Source: GPTQModel 7.6.0, nn_modules/qlinear/qqq.py (`QQQLinear.pack`, `QQQTorchLinear`).

That is what the kernel multiplies by: it unpacks 4 bits to 8, so the scaled code of a group is rounded once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import marlin_tiles, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "B": "codes",
    "s_channel": "scales",
    "s_group": "scales",
    "workspace": "bookkeeping",
    "reduce_buffer": "bookkeeping",
}
BY_GROUP = marlin_tiles.fragment_order(4, (0, 1, 2, 3), (0, 2, 4, 6, 1, 3, 5, 7))
ONE_GROUP = marlin_tiles.fragment_order(4, (0, 1, 2, 3), (4, 0, 5, 1, 6, 2, 7, 3))


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `B` with an `s_channel` belongs to."""
    stem, _, last = anchor.name.rpartition(".")
    prefix = f"{stem}." if stem else ""
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    if last != "B" or "s_channel" not in found:
        return None
    outputs, inputs = _shape(found)
    groups = _groups(found, outputs, inputs)
    return LogicalTensor(
        f"{prefix}weight",
        (outputs, inputs),
        "qqq",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        groups,
        block=inputs // groups,
        rounding=rounding.grouped(
            rounding.symmetric(4, scale="float16"), inputs // groups, margin_db=rounding.COMPENSATED_DB
        ),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    groups = tensor.layout
    assert isinstance(groups, int)
    first, last = start // 64 * 64, -(-stop // 64) * 64
    order = BY_GROUP if groups > 1 else ONE_GROUP
    codes = marlin_tiles.codes(tensor.stored, order, first, last, device)  # (K, N)
    if groups > 1:
        scales = marlin_tiles.scales(tensor.part("s_group"), marlin_tiles.SCALES_BY_GROUP, first, last, device)
        values = (codes - 8).to(torch.float32).view(groups, -1, last - first).mul_(scales.unsqueeze(1))
        values = values.view(codes.shape).round_().clamp_(-128, 127)
    else:
        values = torch.where(codes >= 8, codes - 16, codes).to(torch.float32).mul_(16)
    values *= marlin_tiles.scales(tensor.part("s_channel"), marlin_tiles.SCALES_BY_OUTPUT, first, last, device)
    return values[:, start - first : stop - first].t().contiguous()


def _shape(parts: dict[str, StoredTensor]) -> tuple[int, int]:
    codes, channel = parts["B"], parts["s_channel"]
    if codes.dtype != "I32" or len(codes.shape) != 2 or codes.shape[1] % 128:
        raise FormatError(
            f"{codes.dtype} {list(codes.shape)} is not I32 [K/16, 2*N], N a multiple of 64", tensor=codes.name
        )
    outputs = codes.shape[1] // 2
    if channel.dtype not in ("F32", "F16", "BF16") or channel.shape != (1, outputs):
        rule = f"one float for each of {outputs:,} outputs ([1, N])"
        raise FormatError(f"{channel.dtype} {list(channel.shape)} is not {rule}", tensor=channel.name)
    return outputs, 16 * codes.shape[0]


def _groups(parts: dict[str, StoredTensor], outputs: int, inputs: int) -> int:
    """How many groups the inputs fall into; 1 where there are no scales of groups."""
    scales = parts.get("s_group")
    if scales is None or not scales.elements:
        return 1
    fits = len(scales.shape) == 2 and scales.shape[1] == outputs and scales.dtype in ("F16", "BF16", "F32")
    if not fits or inputs % scales.shape[0] or scales.shape[0] == 1:
        rule = f"[groups, {outputs:,}] floats, two or more equal groups of {inputs:,} inputs"
        raise FormatError(f"{scales.dtype} {list(scales.shape)} is not {rule}", tensor=scales.name)
    return scales.shape[0]


SCHEME = Scheme(
    name="qqq",
    title="QQQ (4-bit weights for 8-bit activations)",
    variants=("qqq",),
    claim=claim,
    anchors=("B",),
    methods=("qqq",),
    live={":B": marlin_tiles.expose},
    source="GPTQModel 7.6.0, nn_modules/qlinear/qqq.py",
    verified="GPTQModel 7.6.0",
)
