"""Marlin: 4-bit symmetric codes in the order of a tensor-core kernel, as GPTQ and AWQ checkpoints keep them.

    part                   dtype  stored shape  packing
    B (AWQ: qweight)       I32    [K/16, 2*N]   4-bit codes in tiles of 16x64, permuted, lowest bits first
    s (AWQ: scales)        F16    [G, N]        permuted within every 64 outputs (one group: within every 32)
    workspace              I32    any           scratch memory of the kernel, where it was saved at all

Formula: w[n, k] = (code[k, n] - 8) * s[k // g, n], in float32, with g = K / G.
Source: AutoAWQ 0.2.9, awq/modules/linear/marlin.py `WQLinear_Marlin.from_linear`, which is IST-DASLab/marlin's
`Layer.pack`; GPTQModel 7.6.0, nn_modules/qlinear/marlin.py `_get_perms`.

Order: the matrix [K, N] is cut into tiles of 16x16, tile rows one after another; every four tiles (1,024 codes) are
permuted so that each thread of a warp finds its fragment in one load.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import buffer_linear, packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    from typing import Any

    import torch

PARTS: dict[str, ByteClass] = {
    "B": "codes",
    "s": "scales",
    "qweight": "codes",
    "scales": "scales",
    "workspace": "bookkeeping",
    buffer_linear.RECORD: "bookkeeping",  # live only
}


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
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last = start // 64, -(-stop // 64)
    tiles, columns = tensor.stored.shape[0], 64 * (last - first)
    words = packing.load_columns(tensor.stored, 128 * first, 128 * last, device)  # (K/16, 128 * blocks)
    codes = packing.unpack_words(words, 4, 1024 * (last - first)).reshape(-1, 1024)
    back = torch.tensor(_inverse(_codes_order()), device=device)
    codes = codes[:, back].view(tiles, columns // 16, 16, 16).transpose(1, 2).reshape(16 * tiles, columns)  # (K, N)
    scales = _scales(tensor.part(layout.scales), 64 * first, 64 * last, device)  # (G, N)
    groups = codes.view(len(scales), layout.group_size, columns)
    values = (groups - 8).to(torch.float32).mul_(scales.unsqueeze(1)).view(16 * tiles, columns)
    return values[:, start - 64 * first : stop - 64 * first].t().contiguous()


def _scales(stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
    import torch

    scales = packing.load_columns(stored, start, stop, device).to(torch.float32)
    order = _inverse(_scales_order(one_group=len(scales) == 1))
    back = torch.tensor(order, device=device)
    return scales.reshape(-1, len(order))[:, back].view(scales.shape)


@cache
def _codes_order() -> tuple[int, ...]:
    """Where each of 1,024 stored codes comes from in four tiles, read row by row."""
    order: list[int] = []
    for thread in range(32):
        column, pair = thread // 4, 2 * (thread % 4)
        rows = (pair, pair + 1, pair + 8, pair + 9)
        fragment = [16 * row + column + 8 * half for half in (0, 1) for row in rows]
        for tile in range(4):
            found = [at + 256 * tile for at in fragment]
            order.extend(found[at] for at in (0, 2, 4, 6, 1, 3, 5, 7))
    return tuple(order)


@cache
def _scales_order(*, one_group: bool) -> tuple[int, ...]:
    if one_group:
        return tuple(2 * thread + at for thread in range(4) for at in (0, 1, 8, 9, 16, 17, 24, 25))
    return tuple(at + 8 * row for at in range(8) for row in range(8))


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show the buffers of a Marlin layer as they would be saved."""
    if name or "s" not in owner._buffers:
        return None
    return {part: owner._buffers[part] for part in ("B", "s", "bias") if owner._buffers.get(part) is not None}


SCHEME = Scheme(
    name="marlin",
    title="Marlin (GPTQ's and AWQ's 4-bit kernel format)",
    variants=("marlin",),
    claim=claim,
    anchors=("B", "qweight"),
    methods=("marlin", "gptq", "awq"),
    live={":B": expose},
    source="AutoAWQ 0.2.9, awq/modules/linear/marlin.py; GPTQModel 7.6.0, nn_modules/qlinear/marlin.py",
    verified="AutoAWQ 0.2.9 (packer; its kernel needs a GPU)",
)
