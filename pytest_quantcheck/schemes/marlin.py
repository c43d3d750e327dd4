"""Marlin: 4-bit symmetric codes in the order of a tensor-core kernel, as GPTQ and AWQ checkpoints keep them.

    part                   dtype  stored shape  packing
    B (AWQ: qweight)       I32    [K/16, 2*N]   4-bit codes in tiles of 16x64, permuted, lowest bits first
    s (AWQ: scales)        F16    [G, N]        permuted within every 64 outputs (one group: within every 32)
    workspace              I32    any           scratch memory of the kernel, where it was saved at all

Formula: w[n, k] = (code[k, n] - 8) * s[k // g, n], in float32, with g = K / G.
Source: AutoAWQ 0.2.9, awq/modules/linear/marlin.py `WQLinear_Marlin.from_linear`, which is IST-DASLab/marlin's
`Layer.pack`; GPTQModel 7.6.0, nn_modules/qlinear/marlin.py `_get_perms`.

The order of codes and scales is that of `marlin_tiles`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import buffer_linear, marlin_tiles, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "B": "codes",
    "s": "scales",
    "qweight": "codes",
    "scales": "scales",
    "workspace": "bookkeeping",
    buffer_linear.RECORD: "bookkeeping",  # live only
}

ORDER = marlin_tiles.fragment_order(2, (0, 1, 8, 9), (0, 2, 4, 6, 1, 3, 5, 7))


class Layout(NamedTuple):
    """How many inputs share a scale, and which part holds the scales."""

    group_size: int
    scales: str


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `B` and `s`, or a `qweight` of Marlin's shape without `qzeros`, belong to."""
    stem, _, last = anchor.name.rpartition(".")
    prefix = f"{stem}." if stem else ""
    scales = {"B": "s", "qweight": "scales"}.get(last)
    if scales is None or anchor.dtype != "I32" or len(anchor.shape) != 2 or f"{prefix}qzeros" in namespace.tensors:
        return None
    names = (last, scales, "workspace", buffer_linear.RECORD)
    found = {part: stored for part in names if (stored := namespace.tensors.get(prefix + part)) is not None}
    if scales not in found or found[scales].dtype not in ("F16", "BF16") or len(found[scales].shape) != 2:
        return None
    rows, outputs = found[scales].shape
    inputs = 16 * anchor.shape[0]
    if anchor.shape[1] != 2 * outputs or outputs % 64:
        if last == "B":
            rule = f"two columns for each of {outputs:,} outputs, a multiple of 64"
            raise FormatError(f"I32 {list(anchor.shape)} is not Marlin's [K/16, 2*N] ({rule})", tensor=anchor.name)
        return None
    if not rows or inputs % rows:
        raise FormatError(f"has {rows:,} rows (not equal groups of {inputs:,} inputs)", tensor=found[scales].name)
    return LogicalTensor(
        f"{prefix}weight",
        (outputs, inputs),
        "marlin",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        Layout(inputs // rows, scales),
        block=inputs // rows,
        rounding=rounding.grouped(
            rounding.symmetric(4, scale="float16"), inputs // rows, margin_db=rounding.COMPENSATED_DB
        ),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last = start // 64 * 64, -(-stop // 64) * 64
    codes = marlin_tiles.codes(tensor.stored, ORDER, first, last, device)  # (K, N)
    stored = tensor.part(layout.scales)
    order = marlin_tiles.SCALES_BY_OUTPUT if stored.shape[0] == 1 else marlin_tiles.SCALES_BY_GROUP
    scales = marlin_tiles.scales(stored, order, first, last, device)  # (G, N)
    groups = codes.view(len(scales), layout.group_size, last - first)
    values = (groups - 8).to(torch.float32).mul_(scales.unsqueeze(1)).view(tensor.columns, last - first)
    return values[:, start - first : stop - first].t().contiguous()


SCHEME = Scheme(
    name="marlin",
    title="Marlin (GPTQ's and AWQ's 4-bit kernel format)",
    variants=("marlin",),
    claim=claim,
    anchors=("B", "qweight"),
    methods=("marlin", "gptq", "awq"),
    live={":B": marlin_tiles.expose},
    source="AutoAWQ 0.2.9, awq/modules/linear/marlin.py; GPTQModel 7.6.0, nn_modules/qlinear/marlin.py",
    verified="AutoAWQ 0.2.9 (packer; its kernel needs a GPU)",
)
