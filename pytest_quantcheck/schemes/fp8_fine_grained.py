"""Fine-grained FP8: float8 weights with a scale per block, per row or per tensor, and FP4 experts beside them.

    part              dtype                stored shape                    packing
    weight            F8_E4M3 (or E5M2)    [..., N, K]                     none
    weight (FP4)      I8, U8 or F4         [..., N, K/2]                   E2M1, low nibble first
    weight_scale_inv  F32, BF16, E8M0, U8  [..., ceil(N/bn), ceil(K/bk)]   [], [1] or [E] per tensor, [N, 1] per row
    activation_scale  F32                  []                              static quantization of the input

`weight_scale_inv` is `scale` in DeepSeek-V4, `weight_scale` in AutoFP8 and in FP8 embeddings. Fused experts have
`gate_up_proj` with `gate_up_proj_scale_inv`. `activation_scale` is also called `input_scale` or
`act_scale`.

Formula: w[n, k] = weight[n, k] * weight_scale_inv[n // bn, k // bk], in float32: it multiplies, whatever its name says.
(bn, bk) is `weight_block_size`; FP4 always has (1, 32), mxfp8 has (1, 32) where nothing else is said. Scales in U8 or
E8M0 are exponents: 2**(e - 127). A fused `gate_up_proj` that is one block high still has two rows of scales, one for
each half.
Source: transformers 5.17, integrations/finegrained_fp8.py; DeepSeek-V3, inference/kernel.py `weight_dequant_kernel`.

Departs from transformers where it is wrong: its `Fp8Dequantize` takes `rows // scale_rows` for the block, so 192 rows
under 128-row blocks get blocks of 96 (silently), and the 576 rows of DeepSeek's `kv_a_proj` raise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

METHODS = ("fp8", "mxfp8")
CODES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
PACKED = frozenset({"I8", "U8", "F4"})
SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
EXPONENTS = frozenset({"F8_E8M0", "U8"})

# ending of a scale -> ending of its weight
WEIGHTS = {"weight_scale_inv": "weight", "_scale_inv": "", "weight_scale": "weight", "scale": "weight"}
BLOCK_SIZE = "_block_size"  # live only, see `expose`
RECORD_LIMIT = 1 << 10

FP4_BLOCK = MX_BLOCK = (1, 32)
DEFAULT_BLOCK = (128, 128)  # of transformers' FineGrainedFP8Config

FLOORS_DB = {"fp8-block": 30.5, "fp8-row": 30.5, "fp8-tensor": 29.5, "fp8-mx": 29.5, "fp8-e2m1": 17.0}
FLOOR_E5M2_DB = 24.5


class Layout(NamedTuple):
    """How scales lie over each `rows` rows. `block` is None where nothing says it and the grid does not tell."""

    grid: tuple[int, int]
    rows: int
    block: tuple[int, int] | None
    packed: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a scale belongs to."""
    name = _weight_name(anchor, namespace)
    if name is None:
        return None
    weight = namespace.tensors.get(name)
    if weight is None:
        raise FormatError(f"has no weight `{name}` beside it", tensor=anchor.name)
    packed = weight.dtype in PACKED
    if not packed and weight.dtype not in CODES:
        raise FormatError(f"{weight.dtype} is neither float8 nor packed FP4, but has `{anchor.name}`", tensor=name)
    if anchor.dtype not in SCALES:
        raise FormatError(f"{anchor.dtype} is not a scale of this format (F32, BF16, E8M0 or U8)", tensor=anchor.name)
    shape = weight.shape
    if len(shape) < 2 or not weight.elements:
        raise FormatError(f"{list(shape)} is no matrix, but has `{anchor.name}`", tensor=name)
    if packed and weight.dtype != "F4":  # a safetensors header counts F4 values, not bytes
        shape = (*shape[:-1], 2 * shape[-1])
    record = namespace.tensors.get(f"{name}{BLOCK_SIZE}") if anchor.role else None
    layout = _layout(anchor, shape, packed, _settings(record, namespace))
    parts: tuple[Part, ...] = (Part("weight", "codes", weight), Part("weight_scale_inv", "scales", anchor))
    parts += tuple(Part("activation_scale", "scales", stored) for stored in _activation_scales(name, namespace))
    if record is not None:
        parts += (Part("block_size", "bookkeeping", record),)
    variant = _variant(anchor, layout)
    return LogicalTensor(
        name,
        shape,
        variant,
        "parameter",
        parts,
        decode,
        layout,
        block=layout.block[1] if layout.block else None,
        floor_db=FLOOR_E5M2_DB if weight.dtype.startswith("F8_E5M2") else FLOORS_DB[variant],
        rounding=_rounding(weight, shape, anchor.dtype in EXPONENTS, layout),
    )


def _rounding(weight: StoredTensor, shape: tuple[int, ...], powers: bool, layout: Layout) -> Rounding:
    """Scales that are powers of two are rounded up, as DeepSeek does."""
    if layout.packed:
        gaps = steps.levels(packing.E2M1, 1.0, 0x22, clips=True)
        return rounding.grouped(rounding.codebook(packing.E2M1, scale="floor"), 32, steps=gaps)
    kind = rounding.float_of(weight)
    height, width = layout.block or (1, shape[-1])
    gaps = steps.floats(kind, clips=powers)
    return rounding.placed_floats(kind, shape, height, width, scale="ceil" if powers else "float32", steps=gaps)


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a float8 tensor of an FP8 checkpoint cannot be plain numbers."""
    if stored.dtype not in CODES and stored.dtype != "F8_E8M0":
        return None
    return f"{stored.dtype} {list(stored.shape)} has no `{stored.name}_scale_inv`, `weight_scale` or `scale` beside it"


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    return packing.expand(coded(tensor, start, stop, device), tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` as codes."""
    import torch

    layout, columns = tensor.layout, tensor.columns
    assert isinstance(layout, Layout)
    if layout.block is None:
        what = f"nothing says the block size of its {layout.grid[0]} x {layout.grid[1]} scales (`weight_block_size`)"
        raise NotDecodable(what, tensor=tensor.name)
    codes = packing.e2m1_codes if layout.packed else packing.byte_codes
    stored = tensor.part("weight_scale_inv")
    grid = packing.Grid(*layout.grid, layout.rows, layout.block[0])
    scales = packing.grid_rows(stored, grid, slice(start, stop), device)
    scales = packing.powers_of_two(scales) if stored.dtype in EXPONENTS else scales.to(torch.float32)
    return Coded(*codes(tensor.stored, start * columns, stop * columns, device), scales, layout.block[1])


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Add to the parameters of a live FP8 module the block size, which only the module knows."""
    block = getattr(owner, "block_size", None)
    record = json.dumps({"weight_block_size": list(block) if block else None}).encode()
    names = [own for own, parameter in owner._parameters.items() if parameter is not None]
    return {f"{own}{BLOCK_SIZE}": record for own in names if any(f"{own}{end}" in names for end in _SCALE_ENDS)}


_SCALE_ENDS = ("_scale_inv", "_scale")


def _weight_name(anchor: StoredTensor, namespace: Namespace) -> str | None:
    """The name of the weight, or None where the anchor is somebody else's scale."""
    prefix, _, last = anchor.name.rpartition(".")
    if last.endswith("_scale_inv"):
        return anchor.name.removesuffix("_scale_inv")
    if last not in ("weight_scale", "scale"):
        return None
    name = f"{prefix}.weight" if prefix else "weight"
    announced = namespace.quantization.get("quant_method") in METHODS or f"{name}{BLOCK_SIZE}" in namespace.tensors
    weight = namespace.tensors.get(name)
    if not announced or weight is None or (weight.dtype not in CODES and weight.dtype not in PACKED):
        return None
    return name


_ACTIVATION_SCALES = ("activation_scale", "input_scale", "act_scale")


def _activation_scales(name: str, namespace: Namespace) -> Iterator[StoredTensor]:
    alone = name == "weight" or name.endswith(".weight")
    prefix = name[: -len("weight")] if alone else f"{name}_"
    for ending in _ACTIVATION_SCALES:
        stored = None if alone and ending not in namespace.endings else namespace.tensors.get(prefix + ending)
        if stored is not None:
            yield stored


def _settings(record: StoredTensor | None, namespace: Namespace) -> Mapping[str, Any]:
    """What says the block size: the live module, or the configuration of this method."""
    if record is not None:
        return strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)
    return namespace.quantization if namespace.quantization.get("quant_method") in METHODS else {}


def _block_size(scale: StoredTensor, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size that is said, or that the method has where nothing is said; None where there is no method."""
    if not settings:
        return None
    default = MX_BLOCK if settings.get("quant_method") == "mxfp8" else DEFAULT_BLOCK
    block = settings.get("weight_block_size", default)
    if block is None:
        return None
    if isinstance(block, (list, tuple)) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise FormatError(f"`weight_block_size` is `{block}` (two positive sizes belong there)", tensor=scale.name)


def _layout(scale: StoredTensor, shape: tuple[int, ...], packed: bool, settings: Mapping[str, Any]) -> Layout:
    """Fit the scales to the weight; what does not fit is a `FormatError`."""
    said = _Said(FP4_BLOCK if packed else _block_size(scale, settings), bool(settings), _is_blocked(scale, settings))
    try:
        return _fitted(scale.shape, shape, packed, said, "gate_up" in scale.name)
    except FormatError as error:
        raise error.at(tensor=scale.name) from None


class _Said(NamedTuple):
    """What is said about blocks: their size, whether anything is said at all, and whether these scales are blocks'."""

    block: tuple[int, int] | None
    known: bool
    blocked: bool


@lru_cache(maxsize=1024)
def _fitted(scales: tuple[int, ...], shape: tuple[int, ...], packed: bool, said: _Said, fused: bool) -> Layout:
    """The layout of one pair of shapes: a model has few, however many tensors."""
    grid, block = _grid(scales, shape), said.block
    rows, columns = shape[-2:]
    per_tensor = grid == (1, 1) and not packed
    if per_tensor and (block is None or not said.blocked):
        rows = prod(shape[:-1]) if prod(scales) == 1 else rows
        return Layout(grid, rows, (rows, columns), packed)
    if grid == (rows, 1) and block != FP4_BLOCK:
        return Layout(grid, rows, (1, columns), packed)
    if block is None and not said.known:
        return Layout(grid, rows, None, packed)
    block = block or (rows, columns)
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if grid == wanted:
        return Layout(grid, rows, block, packed)
    if grid == (2, wanted[1]) and wanted[0] == 1 and fused and rows % 2 == 0:
        return Layout(grid, rows, (rows // 2, block[1]), packed)
    rule = f"{wanted[0]} x {wanted[1]} for {list(shape)} in blocks of {block[0]} x {block[1]}"
    raise FormatError(f"{list(scales)} does not fit its weight ({rule})")


def _is_blocked(scale: StoredTensor, settings: Mapping[str, Any]) -> bool:
    """Whether blocks are asked for by name: AutoFP8 and embeddings have one `weight_scale` whatever the others have."""
    return bool(settings.get("weight_block_size")) and scale.name.endswith("_scale_inv")


def _grid(scales: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows and columns of scales over one matrix."""
    if prod(scales) == 1 or scales == shape[:-2]:
        return 1, 1
    if len(scales) == len(shape) and scales[:-2] == shape[:-2]:
        return scales[-2], scales[-1]
    if scales == shape[:-1]:
        return shape[-2], 1
    raise FormatError(f"{list(scales)} is no grid over {list(shape)}")


def _variant(scale: StoredTensor, layout: Layout) -> str:
    if layout.packed:
        return "fp8-e2m1"
    if layout.grid == (1, 1):
        return "fp8-tensor"
    if layout.block == MX_BLOCK and scale.dtype in EXPONENTS:
        return "fp8-mx"
    return "fp8-row" if layout.grid[1] == 1 and layout.block and layout.block[0] == 1 else "fp8-block"


SCHEME = Scheme(
    name="fp8-fine-grained",
    title="Fine-grained FP8 (DeepSeek, mxfp8, FP4 experts)",
    variants=("fp8-block", "fp8-row", "fp8-tensor", "fp8-mx", "fp8-e2m1"),
    claim=claim,
    anchors=("scale_inv", "scale"),
    methods=METHODS,
    live={
        "transformers.FP8Linear": expose,
        "transformers.FP8Experts": expose,
        "transformers.FP8Embedding": expose,
    },
    refuse=refuse,
    coders={decode: coded},
    source="transformers 5.17.0, integrations/finegrained_fp8.py; DeepSeek-V3, inference/kernel.py",
    verified="transformers 5.17.0",
)
