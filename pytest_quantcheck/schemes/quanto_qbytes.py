"""optimum-quanto 8 bits: int8 or an 8-bit float, one scale for each output row.

    part          dtype                                     stored shape            packing
    _data         I8, F8_E4M3, F8_E5M2, F8_E4M3FNUZ         logical shape           none
    _scale        F32, F16, BF16                            [N, 1, ...], [1, K], [] broadcast
    input_scale   like _scale                               []                      of the module; 1 unless calibrated
    output_scale  like _scale                               []                      of the module

Formula: w = _scale * _data.
Source: optimum-quanto 0.2.7, tensor/qbytes.py, tensor/weights/qbytes.py, nn/qmodule.py.

Departs from the library in one thing: it multiplies in the dtype of the scale and rounds, we multiply in float32.
Names are `<module>.weight._data`; `quanto_qmap.json` says per module what was quantized. Before `freeze()` the weight
is plain, and the module's two scales are buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

QTYPES = {
    "I8": "qint8",
    "F8_E4M3": "qfloat8_e4m3fn",
    "F8_E5M2": "qfloat8_e5m2",
    "F8_E4M3FNUZ": "qfloat8_e4m3fnuz",
}
ALIASES = {"qfloat8": "qfloat8_e4m3fn"}
FLOORS_DB = {"qint8": 28.0, "qfloat8_e4m3fn": 29.5, "qfloat8_e4m3fnuz": 29.5, "qfloat8_e5m2": 24.5}
MODULE_SCALES = ("input_scale", "output_scale")


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a `_data`, or the buffer that a module's `input_scale` or `output_scale` is."""
    if anchor.name.endswith(MODULE_SCALES):
        return _module_scale(anchor, namespace)
    name, _, last = anchor.name.rpartition(".")
    if last != "_data" or name.endswith("._data") or not name:
        return None
    qtype, scale = QTYPES.get(anchor.dtype), namespace.tensors.get(f"{name}._scale")
    if qtype is None:
        raise FormatError(f"{anchor.dtype} is no 8-bit code of quanto ({', '.join(QTYPES)})", tensor=anchor.name)
    if scale is None:
        raise FormatError(f"has no `{name}._scale`", tensor=anchor.name)
    _check_map(name, qtype, namespace)
    _check_scale(scale, anchor.shape)
    parts = (Part("_data", "codes", anchor), Part("_scale", "scales", scale), *_module_scales(name, namespace))
    return LogicalTensor(
        name,
        anchor.shape,
        f"quanto-{qtype}",
        "parameter",
        parts,
        decode,
        block=prod(anchor.shape[1:]),
        floor_db=FLOORS_DB[qtype],
        rounding=_rounding(anchor, scale),
    )


def _rounding(codes: StoredTensor, scale: StoredTensor) -> Rounding | None:
    kept, shape = rounding.kept_in(scale), codes.shape
    if codes.dtype != "I8":
        kind = rounding.float_of(codes)
        return rounding.placed_floats(kind, shape, 1, shape[-1], scale=kept, steps=steps.floats(kind))
    grid = scale.shape if len(scale.shape) == len(shape) else (1,) * len(shape)
    gaps = steps.even(8, fills=steps.SIGNED[8])
    return rounding.on_grid(rounding.symmetric(8, reach=127, scale=kept), shape, grid, steps=gaps)


def _module_scales(name: str, namespace: Namespace) -> tuple[Part, ...]:
    module = name.rpartition(".")[0]
    found = ((last, namespace.tensors.get(f"{module}.{last}" if module else last)) for last in MODULE_SCALES)
    return tuple(Part(last, "scales", stored) for last, stored in found if stored is not None)


def _module_scale(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """The scale of a module whose weight quanto left plain: a LayerNorm, or a layer before `freeze()`."""
    module, _, last = anchor.name.rpartition(".")
    weight = f"{module}.weight" if module else "weight"
    quantized = any(f"{weight}.{part}" in namespace.tensors for part in ("_data", "_data._data"))
    if last not in MODULE_SCALES or namespace.quantization.get("quant_method") != "quanto" or quantized:
        return None
    return LogicalTensor(anchor.name, anchor.shape, "plain", "buffer", (Part(last, "buffers", anchor),), None)


def _check_map(name: str, qtype: str, namespace: Namespace) -> None:
    entry = namespace.quantization.get(name.rpartition(".")[0])
    said = entry.get("weights") if isinstance(entry, Mapping) else None
    if said is not None and ALIASES.get(said, said) != qtype:
        raise FormatError(f"stored as {qtype}, but the quantization map says `{said}`", tensor=name)


def _check_scale(scale: StoredTensor, shape: tuple[int, ...]) -> None:
    """One scale, or one per index of the first or of the last dimension."""
    ones = [1] * len(shape)
    allowed: list[list[int]] = [[], ones, [*shape[:1], *ones[1:]], [*ones[:-1], *shape[-1:]]]
    if list(scale.shape) not in allowed:
        raise FormatError(f"{list(scale.shape)} does not scale the rows of {list(shape)}", tensor=scale.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    values = codes.to(torch.float32).view(stop - start, tensor.columns)
    stored = tensor.part("_scale")
    scale = stored.load(device=device).to(torch.float32)
    if stored.elements > 1 and stored.shape[0] == stored.elements:
        repeats = tensor.rows // tensor.shape[0]  # rows of one output channel
        scale = scale[torch.arange(start, stop, device=device) // repeats].view(-1, 1)
    return values.mul_(scale)


def expose(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live `WeightQBytesTensor` as it would be saved."""
    return {f"{name}._data": owner._data, f"{name}._scale": owner._scale}


SCHEME = Scheme(
    name="quanto-qbytes",
    title="optimum-quanto 8 bits (qint8, qfloat8)",
    variants=tuple(f"quanto-{qtype}" for qtype in QTYPES.values()),
    claim=claim,
    anchors=("_data", *MODULE_SCALES),
    methods=("quanto",),
    live={"optimum.WeightQBytesTensor": expose},
    source="optimum-quanto 0.2.7, tensor/qbytes.py and nn/qmodule.py",
    verified="optimum-quanto 0.2.7",
)
