"""optimum-quanto in the order of a kernel: TinyGemm, AWQ and Marlin. Live only: saved, they are turned back.

    class                        codes                                           scales
    TinyGemmWeightQBitsTensor    CPU: U8 [N, K/2] in an order of the CPU         _scale_shift [K/g, N, 2]
                                 CUDA: I32 [N/8, K/32, 32, 1], tiles
    AWQWeightQBitsTensor         I16 [N/4, K], V2: 4 rows in a word              _scale, _shift [K/g, N]
    MarlinInt4WeightQBitsTensor  I32 [K/16, 2*N], tiles of 16 x 16               _scale, _shift [K/g, N], permuted
    MarlinF8QBytesTensor         I32 [K/16, 4*N], tiles                          _scale [1, N], permuted

Formula: TinyGemm w = (code - 8) * scale + shift; AWQ w = code * scale + shift (the shift is stored negated).
AWQ: for every 4 rows and 64 columns, 256 codes stand in row order, 4 of them in one word, lowest bits first; within a
row, 32 columns (a, b, c) of sizes (4, 4, 2) stand in the order (b, c, a).
Source: optimum-quanto 0.2.7, tensor/weights/{tinygemm,awq,marlin}.

Decoded: TinyGemm packed on this CPU, and AWQ. Counted and weighed: TinyGemm packed on CUDA, and Marlin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "quanto_kernel"
LIMIT = 4 << 10
PARTS: dict[str, ByteClass] = {
    "codes": "codes",
    "scale": "scales",
    "shift": "zero_points",
    "scale_shift": "scales",
    "workspace": "bookkeeping",
}
BITS = {"tinygemm": 4, "tinygemm-cuda": 4, "awq": 4, "awq-v1": 4, "marlin": 4, "marlin-f8": 8}


class Layout(NamedTuple):
    """Which kernel, and values of a group."""

    kernel: str
    group: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a live record belongs to."""
    name = anchor.name.removesuffix(f".{RECORD}")
    if anchor.role is None or name == anchor.name:
        return None
    record = strict_json.parse_object(anchor.read(limit=LIMIT), limit=LIMIT)
    shape, layout = tuple(record["shape"]), Layout(record["kernel"], record["group"])
    stored = {part: namespace.tensors.get(f"{name}.{part}") for part in PARTS}
    parts = [Part(part, PARTS[part], tensor) for part, tensor in stored.items() if tensor is not None]
    codes = parts[0].stored
    if 8 * codes.nbytes != BITS[layout.kernel] * prod(shape):
        raise FormatError(f"{codes.nbytes:,} bytes of codes do not hold {list(shape)}", tensor=codes.name)
    qtype, floor = ("qfloat8_e4m3fn", 29.5) if layout.kernel == "marlin-f8" else ("qint4", 16.5)
    parts += [Part(RECORD, "bookkeeping", anchor), *_module_scales(name, namespace)]
    return LogicalTensor(
        name,
        shape,
        f"quanto-{qtype}-{layout.kernel}",
        "parameter",
        tuple(parts),
        {"tinygemm": decode_tinygemm, "awq": decode_awq}.get(layout.kernel, decode_on_device),
        layout,
        block=layout.group,
        floor_db=floor,
        rounding=rounding.grouped(
            rounding.small_float("float8_e4m3fn") if layout.kernel == "marlin-f8" else rounding.from_least(4),
            layout.group or shape[-1],
        ),
    )


def _module_scales(name: str, namespace: Namespace) -> list[Part]:
    module = name.rpartition(".")[0]
    names = [(last, f"{module}.{last}" if module else last) for last in ("input_scale", "output_scale")]
    return [Part(last, "scales", namespace.tensors[path]) for last, path in names if path in namespace.tensors]


def decode_tinygemm(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows of what torch packed for its kernel on this CPU as float32."""
    import torch

    rows, columns = tensor.shape
    if stop <= start:
        return torch.empty((0, columns), device=device)
    codes = packing.int4_rows_for_cpu(tensor.stored, rows, columns, start, stop).to(device)
    both = tensor.part("scale_shift").load(device=device).to(torch.float32).view(-1, rows, 2)[:, start:stop]
    return _scaled(codes.to(torch.float32).sub_(8), both[..., 0].t(), both[..., 1].t())


def decode_awq(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows of the second AWQ packing as float32."""
    import torch

    rows, columns = tensor.shape
    low, high = start // 4, -(-stop // 4)
    words = tensor.stored.load(low * columns, high * columns, device).to(torch.int32)
    codes = (words.view(-1, 1) >> torch.arange(0, 16, 4, device=device, dtype=torch.int32)) & 15
    ordered = codes.view(high - low, columns // 64, 4, 64).transpose(1, 2).reshape(-1, columns // 32, 4, 2, 4)
    ordered = ordered.permute(0, 1, 4, 2, 3).reshape(-1, columns)[start - 4 * low : stop - 4 * low]
    scale, shift = (tensor.part(part).load(device=device).view(-1, rows)[:, start:stop] for part in ("scale", "shift"))
    return _scaled(ordered.to(torch.float32), scale.to(torch.float32).t(), shift.to(torch.float32).t())


def _scaled(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    packing.by_column_block(codes, scale).mul_(scale.unsqueeze(-1)).add_(shift.unsqueeze(-1))
    return codes


def decode_on_device(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Raise `NotDecodable`: the order is that of a CUDA kernel."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    raise NotDecodable(
        f"is packed for the CUDA kernel `{layout.kernel}`: save it, or move it to the CPU", tensor=tensor.name
    )


def expose_tinygemm(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live `TinyGemmWeightQBitsTensor`."""
    codes = owner._data._data
    kernel = "tinygemm" if codes.device.type == "cpu" else "tinygemm-cuda"
    return _show(owner, name, kernel, {"codes": codes, "scale_shift": owner._scale_shift})


def expose_awq(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live `AWQWeightQBitsTensor`, which packs in the second of two ways."""
    codes = owner._data._data
    kernel = "awq" if str(codes.dtype) == "torch.int16" else "awq-v1"
    return _show(owner, name, kernel, {"codes": codes, "scale": owner._scale, "shift": owner._shift})


def expose_marlin(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live Marlin tensor, int4 or float8."""
    held = {"codes": owner._data._data, "scale": owner._scale, "shift": getattr(owner, "_shift", None)}
    kernel = "marlin" if held["shift"] is not None else "marlin-f8"
    return _show(owner, name, kernel, held | {"workspace": owner._workspace})


def _show(owner: Any, name: str, kernel: str, held: Mapping[str, Any]) -> dict[str, Any]:
    record = {"kernel": kernel, "shape": list(owner.shape), "group": getattr(owner, "_group_size", owner.shape[-1])}
    shown = {f"{name}.{part}": tensor for part, tensor in held.items() if tensor is not None}
    return shown | {f"{name}.{RECORD}": json.dumps(record).encode()}


SCHEME = Scheme(
    name="quanto-kernels",
    title="optimum-quanto in the order of a kernel (TinyGemm, AWQ, Marlin)",
    variants=tuple(f"quanto-{'qfloat8_e4m3fn' if bits == 8 else 'qint4'}-{kernel}" for kernel, bits in BITS.items()),
    claim=claim,
    anchors=(RECORD,),
    live={
        "optimum.TinyGemmWeightQBitsTensor": expose_tinygemm,
        "optimum.AWQWeightQBitsTensor": expose_awq,
        "optimum.MarlinInt4WeightQBitsTensor": expose_marlin,
        "optimum.MarlinF8QBytesTensor": expose_marlin,
    },
    source="optimum-quanto 0.2.7, tensor/weights",
    verified="optimum-quanto 0.2.7 (TinyGemm on the CPU; AWQ by its Python packing)",
    decoded="CPU (TinyGemm, AWQ)",
)
