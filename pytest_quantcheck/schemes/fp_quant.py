"""FP-Quant: MXFP4 and NVFP4 codes of a weight that was rotated by a Hadamard matrix.

    part                      dtype         stored shape     packing
    qweight                   U8            [N, K/2]         E2M1, low nibble first
    scales                    U8            [Np, Gp]         bytes of E8M0 (mxfp4, 32 columns) or E4M3 (nvfp4, 16)
    dqweight                  BF16, F32     [N, K]           pseudo-quantized: the rotated values themselves
    weight                    BF16, F32     [N, K]           master weights: not rotated, quantized in each forward
    forward_hadamard_matrix   BF16, F32     [h, h]           orthonormal
    backward_hadamard_matrix  BF16, F32     [h, h]
    weight_global_scale       BF16, F32     [1]              what the rotated weight was multiplied with
    act_global_scale          BF16, F32     [1]              the same of the activation

Of qweight, dqweight and weight one has values; the others are absent, or saved with shape [0]. Scales may be padded to
128 rows and 4 columns, row by row; they are brought into the order of the kernel when it is called.
Formula: w = (E2M1[code] * scale / weight_global_scale) @ forward_hadamard_matrix.T, in float32, in runs of h columns.
Source: fp_quant 0.3.2, module/linear.py; qutlass, qutlass/__init__.py and tests/mxfp4_test.py (`_dq_fp4`).

The factor 3 of `forward_method: abs_max` is stored as weight_global_scale; `quest` has 1 there.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

METHOD = "fp_quant"
ROTATION = "forward_hadamard_matrix"
PARTS: dict[str, ByteClass] = {
    "scales": "scales",
    "weight_global_scale": "scales",
    "act_global_scale": "scales",
    ROTATION: "bookkeeping",
    "backward_hadamard_matrix": "bookkeeping",
}
HOLDERS = ("qweight", "dqweight", "weight")
FLOORS_DB = {32: 17.0, 16: 19.0}


class Layout(NamedTuple):
    """The columns that share a scale, and how many scales a stored row has."""

    group: int
    stored_groups: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of the module that a rotation matrix belongs to."""
    prefix = anchor.name.removesuffix(ROTATION)
    held = [(name, stored) for name in HOLDERS if (stored := namespace.tensors.get(f"{prefix}{name}")) is not None]
    full = [(name, stored) for name, stored in held if stored.elements]
    if not full:
        raise FormatError(f"has none of `{prefix}qweight`, `dqweight` and `weight` beside it", tensor=anchor.name)
    master = next((stored for name, stored in full if name == "weight"), None)
    holder, stored = ("weight", master) if master is not None else full[0]
    others = ((name, kind, namespace.tensors.get(f"{prefix}{name}")) for name, kind in PARTS.items())
    parts = [Part(name, kind, part) for name, kind, part in others if part is not None]
    parts += [Part(name, "bookkeeping", rest) for name, rest in held if rest is not stored]
    name = f"{prefix}weight"
    if len(stored.shape) < 2:
        raise FormatError(f"{list(stored.shape)} is no matrix, but has `{anchor.name}`", tensor=stored.name)
    if holder == "weight":
        return LogicalTensor(
            name,
            stored.shape,
            "plain",
            "parameter",
            (Part("weight", "unquantized", stored), *parts),
            packing.decode_floats,
        )
    shape = (*stored.shape[:-1], 2 * stored.shape[-1]) if holder == "qweight" else stored.shape
    _check_rotation(anchor, shape)
    codes = Part(holder, "codes" if holder == "qweight" else "unquantized", stored)
    if holder == "dqweight":
        return LogicalTensor(name, shape, "fp-quant-pseudo", "parameter", (codes, *parts), decode_rotated)
    layout = _layout(stored, shape, {part.name: part.stored for part in parts}, namespace)
    variant = "fp-quant-mxfp4" if layout.group == 32 else "fp-quant-nvfp4"
    return LogicalTensor(
        name,
        shape,
        variant,
        "parameter",
        (codes, *parts),
        decode,
        layout,
        block=layout.group,
        floor_db=FLOORS_DB[layout.group],
        rounding=Rounding(_nearest, margin_db=rounding.COMPENSATED_DB),
    )


def _nearest(tensor: LogicalTensor, values: torch.Tensor, largest: float | None) -> torch.Tensor:
    """What rotated values round to, rotated back; calibrated by GPTQ as a rule."""
    layout, device = tensor.layout, str(values.device)
    assert isinstance(layout, Layout)
    scale: rounding.ScaleKind = "floor" if layout.group == 32 else "e4m3-scaled"
    within = rounding.grouped(rounding.codebook(packing.E2M1, scale=scale), layout.group)
    rotated = _runs(tensor, values, _rotation(tensor, device))
    return _unrotated(tensor, within.nearest(tensor, rotated, None), device)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32, not rotated."""
    import torch

    layout, width = tensor.layout, tensor.columns // 2
    assert isinstance(layout, Layout)
    values = packing.e2m1_values(tensor.stored.load_bytes(start * width, stop * width, device))
    values = values.view(stop - start, tensor.columns)
    stored = tensor.part("scales").load(start * layout.stored_groups, stop * layout.stored_groups, device)
    scales = stored.view(stop - start, layout.stored_groups)[:, : tensor.columns // layout.group].contiguous()
    dtype = torch.float8_e8m0fnu if layout.group == 32 else torch.float8_e4m3fn
    packing.scale_groups(values, scales.view(dtype).to(torch.float32), layout.group)
    share = tensor.part("weight_global_scale").load(device=device).to(torch.float32)
    return _unrotated(tensor, values.div_(share), device)


def decode_rotated(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of a pseudo-quantized weight as float32, not rotated."""
    return _unrotated(tensor, packing.decode_floats(tensor, start, stop, device), device)


def _unrotated(tensor: LogicalTensor, values: torch.Tensor, device: str) -> torch.Tensor:
    return _runs(tensor, values, _rotation(tensor, device).t())


def _rotation(tensor: LogicalTensor, device: str) -> torch.Tensor:
    import torch

    stored = tensor.part(ROTATION)
    return stored.load(device=device).to(torch.float32).view(stored.shape)


def _runs(tensor: LogicalTensor, values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Each run of columns times a matrix."""
    runs = values.reshape(len(values) * tensor.columns // len(matrix), len(matrix))
    return (runs @ matrix).view(len(values), tensor.columns)


def _layout(
    codes: StoredTensor, shape: tuple[int, ...], parts: dict[str, StoredTensor], namespace: Namespace
) -> Layout:
    scales, share = parts.get("scales"), parts.get("weight_global_scale")
    if codes.dtype != "U8" or len(shape) != 2:
        raise FormatError(f"{codes.dtype} {list(codes.shape)} is not U8 [N, K/2]", tensor=codes.name)
    if scales is None or share is None or share.elements != 1:
        raise FormatError("has no `scales`, or no single `weight_global_scale`", tensor=codes.name)
    rows, columns = shape
    fitting = [group for group in (32, 16) if scales.shape in _grids(rows, columns, group)]
    said = {"mxfp4": 32, "nvfp4": 16}.get(str(namespace.quantization.get("forward_dtype")))
    if said is not None:
        fitting = [group for group in fitting if group == said]
    if len(fitting) != 1 or scales.dtype not in ("U8", "F8_E8M0", "F8_E4M3"):
        rule = f"[{rows}, {columns // 32}] for mxfp4, [{rows}, {columns // 16}] for nvfp4, or padded to 128 x 4"
        raise FormatError(f"{scales.dtype} {list(scales.shape)} are not its scales ({rule})", tensor=scales.name)
    return Layout(fitting[0], scales.shape[1])


def _grids(rows: int, columns: int, group: int) -> tuple[tuple[int, int], ...]:
    across = columns // group
    return (rows, across), (-(-rows // 128) * 128, -(-across // 4) * 4)


def _check_rotation(rotation: StoredTensor, shape: tuple[int, ...]) -> None:
    size = rotation.shape[0] if rotation.shape else 0
    if len(rotation.shape) != 2 or rotation.shape[1] != size or size == 0 or prod(shape[-1:]) % size:
        rule = f"a square whose side divides {shape[-1]:,}"
        raise FormatError(f"{list(rotation.shape)} does not rotate {list(shape)} ({rule})", tensor=rotation.name)


SCHEME = Scheme(
    name="fp-quant",
    title="FP-Quant (rotated MXFP4 and NVFP4)",
    variants=("fp-quant-mxfp4", "fp-quant-nvfp4", "fp-quant-pseudo"),
    claim=claim,
    anchors=(ROTATION,),
    methods=(METHOD,),
    source="fp_quant 0.3.2, module/linear.py; qutlass, tests/mxfp4_test.py",
    verified="by the reference decode in qutlass' own tests",
)
