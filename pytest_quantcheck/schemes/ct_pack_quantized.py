"""compressed-tensors `pack-quantized`: integers of 1 to 8 bits in int32 words, signed codes shifted to unsigned.

    part               dtype          stored shape           packing
    weight_packed      I32            [..., N, ceil(K*b/32)] a stream along K, lowest bits first, each row anew
    weight_shape       I64 (old: I32) [2] (stacks: [3])      N, K: the words alone leave K open
    weight_scale       F32, BF16, F16 [..., N, K/group]      [N, 1] per channel, [1] per tensor
    weight_zero_point  I32            [ceil(N*b/32), G]      a stream along N, lowest bits first, each group anew
    weight_zero_point  I8             [1]                    per tensor only
    weight_g_idx       I32            [K]                    the group of each column; -1 throughout: not used

Formula: w[n, k] = (code[n, k] - 2**(b-1) - zero[n, g]) * scale[n, g], in float32, g = weight_g_idx[k] or k // group;
codes of the zero points are shifted by 2**(b-1), too. The library multiplies in the dtype of the scale.
Source: compressed-tensors 0.20.0, compressors/pack_quantized/, quantization/lifecycle/forward_helpers.py.

Until 0.17 a word held `32 // b` codes and none went across: [N, ceil(K / (32 // b))] (0.10.2,
quantized_compressors/pack_quantized.py). For 3, 5, 6 and 7 bits the number of words tells which; where both give the
same number, the `version` in the configuration does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import config_groups, packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "weight_scale": "scales",
    "weight_zero_point": "zero_points",
    "weight_g_idx": "index",
    "weight_shape": "bookkeeping",
    "input_scale": "scales",
    "input_zero_point": "zero_points",
    "input_global_scale": "scales",
    "output_scale": "scales",
    "output_zero_point": "zero_points",
    config_groups.ARGS: "bookkeeping",
}
FIRST_DENSE = (0, 18)  # the version since which codes go across words
SCALES = frozenset({"F64", "F32", "F16", "BF16"})

# Worst of Gaussian, Student-t and outlier weights less 1 dB, for groups of up to 128, symmetric and not.
FLOORS_DB = {8: (39.0, 39.0), 4: (14.0, 16.5), 3: (7.0, 7.0)}


class Layout(NamedTuple):
    """What the shapes and the configuration say. `bits` is 0 where they leave it open."""

    bits: int
    dense: bool | None
    group: int
    grid: packing.Grid
    symmetric: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `weight_packed` of int32 words holds."""
    module = anchor.name.rpartition(".")[0]
    prefix = f"{module}." if module else ""
    if anchor.dtype != "I32" or f"{prefix}scale_packed" in namespace.tensors:
        return None
    if len(anchor.shape) < 2 or not anchor.elements:
        raise FormatError(f"{list(anchor.shape)} is no matrix of words", tensor=anchor.name)
    scale = namespace.tensors.get(f"{prefix}weight_scale")
    if scale is None or scale.dtype not in SCALES:
        what = f"is {scale.dtype}" if scale else "is missing"
        raise FormatError(f"its `{prefix}weight_scale` {what} (a float scale belongs there)", tensor=anchor.name)
    parts = [Part("weight_packed", "codes", anchor)]
    for name, kind in PARTS.items():
        stored = namespace.tensors.get(f"{prefix}{name}")
        if stored is not None:
            parts.append(Part(name, kind, stored))
    shape = _shape(anchor, scale, module, namespace)
    layout = _layout(anchor, scale, shape, module, namespace)
    floors = FLOORS_DB.get(layout.bits) if layout.group <= 128 else None
    tensor = LogicalTensor(
        f"{prefix}weight",
        shape,
        f"ct-int{layout.bits}" if layout.bits else "ct-int",
        "parameter",
        tuple(parts),
        decode,
        layout,
        block=layout.group,
        floor_db=floors[0 if layout.symmetric else 1] if floors else None,
    )
    _check_parts(tensor, layout)
    return tensor._replace(rounding=_rounding(layout, scale))


def _rounding(layout: Layout, scale: StoredTensor) -> Rounding | None:
    if layout.bits < 2:
        return None
    family = rounding.symmetric if layout.symmetric else rounding.affine
    to_code = family(layout.bits, scale=rounding.kept_in(scale))
    return rounding.grouped(to_code, layout.group, margin_db=rounding.COMPENSATED_DB)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    groups = _scattered(tensor, layout, device)
    found = _coded(tensor, layout, start, stop, device)
    if groups is not None:
        return packing.expand_scattered(found, groups)
    return packing.expand(found).view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where groups are as they come."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    return _coded(tensor, layout, start, stop, device) if _scattered(tensor, layout, device) is None else None


def _scattered(tensor: LogicalTensor, layout: Layout, device: str) -> torch.Tensor | None:
    """The group of each column, where activation order scattered them."""
    if not tensor.has("weight_g_idx"):
        return None
    groups = packing.group_index(tensor.part("weight_g_idx"), layout.grid.columns, device)
    return None if groups is None or packing.in_order(groups, layout.group) else groups


def _coded(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> Coded:
    """Some rows as if their groups were as they come."""
    import torch

    if not layout.bits or layout.dense is None:
        missing = "`version`, and words of either packing fit" if layout.bits else "`num_bits`"
        raise NotDecodable(f"the configuration does not say its {missing}", tensor=tensor.name)
    width, middle = tensor.stored.shape[-1], 1 << layout.bits - 1
    words = tensor.stored.load(start * width, stop * width, device).view(stop - start, width)
    if layout.dense:
        codes, table = packing.integers(words, layout.bits, tensor.columns)
    else:
        codes = packing.word_codes(packing.as_bytes(words), layout.bits, tensor.columns).to(torch.uint8).reshape(-1)
        table = None
    scales = packing.grid_rows(tensor.part("weight_scale"), layout.grid, slice(start, stop), device).to(torch.float32)
    zeros = _zeros(tensor, layout, start, stop, device)
    zeros = torch.full_like(scales, middle) if zeros is None else zeros + middle
    return Coded(codes, table, scales, layout.group, zeros)


def _zeros(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor | None:
    """The zero points of a window, one for each row and group, or None where there are none."""
    import torch

    if not tensor.has("weight_zero_point"):
        return None
    stored = tensor.part("weight_zero_point")
    if stored.dtype != "I32":
        return packing.grid_rows(stored, layout.grid, slice(start, stop), device).to(torch.float32)
    found = [
        _packed_zeros(stored, layout, matrix, rows, device)
        for matrix, rows in packing.matrix_windows(start, stop, tensor.shape[-2])
    ]
    return torch.cat(found) if found else torch.zeros((0, layout.grid.columns), device=device)


def _packed_zeros(stored: StoredTensor, layout: Layout, matrix: int, rows: slice, device: str) -> torch.Tensor:
    import torch

    words, groups = stored.shape[-2:]
    size = 4 * words * groups
    loaded = stored.load_bytes(matrix * size, (matrix + 1) * size, device).view(words, groups, 4)
    streams = loaded.transpose(0, 1).reshape(groups, 4 * words)
    unpack = packing.row_codes if layout.dense else packing.word_codes
    codes = unpack(streams, layout.bits, rows.stop)[:, rows]
    return (codes.t() - (1 << layout.bits - 1)).to(torch.float32)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Add to the parameters of a live module what its `quantization_scheme` says about its weight."""
    weights = getattr(getattr(owner, "quantization_scheme", None), "weights", None)
    if weights is None or not hasattr(weights, "model_dump"):
        return None
    library = sys.modules.get(type(weights).__module__.partition(".")[0])
    said = {**weights.model_dump(mode="json"), "version": getattr(library, "__version__", None)}
    return {config_groups.ARGS: json.dumps(said, default=str).encode()}


def _shape(packed: StoredTensor, scale: StoredTensor, module: str, namespace: Namespace) -> tuple[int, ...]:
    stored = namespace.tensors.get(f"{module}.weight_shape" if module else "weight_shape")
    if stored is None:
        return *packed.shape[:-1], _columns_of_groups(packed, scale, module, namespace)
    sizes = packing.read_integers(stored)
    if len(sizes) != len(packed.shape) or sizes[:-1] != packed.shape[:-1] or sizes[-1] < 1:
        raise FormatError(f"says {list(sizes)}, but {list(packed.shape)} words hold the codes", tensor=stored.name)
    return sizes


def _columns_of_groups(packed: StoredTensor, scale: StoredTensor, module: str, namespace: Namespace) -> int:
    """K of a file that has lost its `weight_shape`: exact where groups fill the rows."""

    def fits(args: Mapping[str, Any]) -> bool:
        group, bits = args.get("group_size"), args.get("num_bits")
        if not isinstance(group, int) or not isinstance(bits, int) or group < 1 or not 1 <= bits <= 8:
            return False
        return _words(group * scale.shape[-1], bits, packed.shape[-1]) != ()

    if len(scale.shape) != len(packed.shape):
        raise FormatError("has no `weight_shape`, and its scales are not grouped: K is open", tensor=packed.name)
    args = config_groups.weight_args(module, namespace, fits)
    if args is None:
        raise FormatError("has no `weight_shape`, and nothing says its group size: K is open", tensor=packed.name)
    return int(args["group_size"]) * scale.shape[-1]


def _words(columns: int, bits: int, words: int) -> tuple[bool, ...]:
    """The packings (True: dense) by which so many words hold a row of so many codes."""
    dense, whole = -(-columns * bits // 32), -(-columns // (32 // bits))
    return tuple(packing for packing, wanted in ((True, dense), (False, whole)) if wanted == words)


def _layout(
    packed: StoredTensor, scale: StoredTensor, shape: tuple[int, ...], module: str, namespace: Namespace
) -> Layout:
    columns, words = shape[-1], packed.shape[-1]
    possible = [bits for bits in range(1, 9) if _words(columns, bits, words)]
    if not possible:
        raise FormatError(f"{words} words hold no {columns} codes of 1 to 8 bits", tensor=packed.name)
    grid = _grid(scale, shape)

    def fits(args: Mapping[str, Any]) -> bool:
        whole = args.get("type", "int") == "int" and args.get("num_bits") in possible
        return whole and _fits_groups(args, columns, grid.columns)

    args = config_groups.weight_args(module, namespace, fits)
    bits = int(args["num_bits"]) if args else possible[0] if len(possible) == 1 else 0
    group = columns if grid.columns == 1 else int(args["group_size"]) if args else columns // grid.columns
    if grid.columns > 1 and -(-columns // group) != grid.columns:
        raise FormatError(f"{list(scale.shape)} is no grid over {list(shape)}", tensor=scale.name)
    version = (args or {}).get("version") or namespace.quantization.get("version")
    zero = f"{module}.weight_zero_point" if module else "weight_zero_point"
    return Layout(bits, _is_dense(columns, bits, words, version), group, grid, zero not in namespace.tensors)


def _fits_groups(args: Mapping[str, Any], columns: int, groups: int) -> bool:
    size = args.get("group_size")
    if groups == 1:
        return not isinstance(size, int) or size < 1 or size >= columns
    return isinstance(size, int) and size > 0 and -(-columns // size) == groups


def _grid(scale: StoredTensor, shape: tuple[int, ...]) -> packing.Grid:
    if scale.elements == 1:
        return packing.Grid(1, 1, prod(shape[:-1]), prod(shape[:-1]))
    if len(scale.shape) != len(shape) or scale.shape[:-1] != shape[:-1] or not scale.elements:
        raise FormatError(f"{list(scale.shape)} is no grid over {list(shape)}", tensor=scale.name)
    return packing.Grid(shape[-2], scale.shape[-1], shape[-2], 1)


def _is_dense(columns: int, bits: int, words: int, version: object) -> bool | None:
    """Whether codes go across words; None where nothing tells."""
    if not bits or 32 % bits == 0 or columns <= 32 // bits:
        return True
    fitting = _words(columns, bits, words)
    if len(fitting) == 1:
        return fitting[0]
    found = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return (int(found[1]), int(found[2])) >= FIRST_DENSE if found else None


def _check_parts(tensor: LogicalTensor, layout: Layout) -> None:
    rows, columns = tensor.shape[-2:]
    if tensor.has("weight_g_idx") and tensor.part("weight_g_idx").shape != (columns,):
        stored = tensor.part("weight_g_idx")
        raise FormatError(f"{list(stored.shape)} is not one group for each of {columns:,} columns", tensor=stored.name)
    if not tensor.has("weight_zero_point") or not layout.bits:
        return
    stored = tensor.part("weight_zero_point")
    if stored.dtype != "I32":
        wanted: tuple[int, ...] = tensor.part("weight_scale").shape
    else:
        words = -(-rows * layout.bits // 32) if layout.dense is not False else -(-rows // (32 // layout.bits))
        wanted = (*tensor.shape[:-2], words, layout.grid.columns)
    if stored.shape != wanted:
        rule = f"{list(wanted)} for {rows:,} rows of {layout.bits} bits"
        raise FormatError(f"{list(stored.shape)} does not hold its zero points ({rule})", tensor=stored.name)


SCHEME = Scheme(
    name="ct-pack-quantized",
    title="compressed-tensors, packed integers",
    variants=tuple(f"ct-int{bits}" for bits in range(1, 9)),
    claim=claim,
    anchors=("weight_packed",),
    methods=("compressed-tensors", "compressed_tensors"),
    live={"torch.Linear": expose, "torch.Embedding": expose},
    coders={decode: coded},
    source="compressed-tensors 0.20.0, compressors/pack_quantized; 0.10.2 for the older packing",
    verified="compressed-tensors 0.20.0",
)
