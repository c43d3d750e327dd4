"""VPTQ: every input column of a block of output rows is one vector of a codebook, plus one of a residual codebook.

    part                      dtype  stored shape                    packing
    indices                   I32    [C, ceil(N / v), words]         per row a bit stream, lowest bits first; a code
                                                                     is main | residual << bits of main
    centroids.weight          float  [C, entries * v]                C codebooks, one per group of columns
    res_centroids.weight      float  [C, residual entries * v]       where there is a residual
    outlier_indices           I16    [1, ceil(N / ov), outliers]     unsigned; the outlier columns stand first
    outlier_centroids.weight  float  [1, outlier entries * ov]
    perm                      I16    [K]                             unsigned; column j was quantized as perm[j]
    weight_scale, weight_bias float  [K]

    indices                   I16    [C, ceil(N / v), group]         unsigned; where `is_indice_packed` is false

Formula: q[v * n + a, k] = centroids[c][main, a] + res_centroids[c][residual, a]; W = q[:, argsort(perm)] * weight_scale
+ weight_bias. Rows beyond N are padding.
Source: vptq 0.0.5.post1, vptq/ops/quant_gemm.py (`dequant`), vptq/utils/pack.py, vptq/layers/vqlinear.py; transformers
5.17, integrations/vptq.py (`config_for_layers`, `shared_layer_config`).

Departs from the library in one mask: its `unpack_index_tensor` cuts the residual to the bits of the main index.

The stored shapes do not say v, the entries or N: the module's block of the configuration does. N may also follow from
the bias or from the model's configuration; where nothing says it, it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.dtypes import BITS
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import architecture, packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme, joined
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "vptq_linear"  # live only: what `config_for_layers` says of a module in a file
RECORD_LIMIT = 1 << 12

PARTS: dict[str, ByteClass] = {
    "indices": "codes",
    "centroids.weight": "codebooks",
    "res_centroids.weight": "codebooks",
    "outlier_indices": "codes",
    "outlier_centroids.weight": "codebooks",
    "perm": "index",
    "weight_scale": "scales",
    "weight_bias": "zero_points",
}


class Book(NamedTuple):
    """One codebook: the length of its vectors and how many there are; 0 where there is none."""

    vector: int
    entries: int

    @property
    def bits(self) -> int:
        """The bits of an index into it."""
        return max(0, self.entries - 1).bit_length()


class Layout(NamedTuple):
    """What the configuration says of one module."""

    groups: int
    group: int
    main: Book
    residual: Book
    outlier: Book
    outliers: int
    packed: bool
    permuted: bool
    normed: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `indices` stand for."""
    prefix, _, last = anchor.name.rpartition(".")
    record = namespace.tensors.get(joined(prefix, RECORD))
    centroids = namespace.tensors.get(joined(prefix, "centroids.weight"))
    ours = record is not None or centroids is not None or namespace.quantization.get("quant_method") == "vptq"
    if last != "indices" or not ours:
        return None
    settings = _settings(prefix, record, namespace)
    layout = _layout(settings, anchor)
    found = {part: namespace.tensors.get(joined(prefix, part)) for part in PARTS}
    parts = [Part(part, PARTS[part], stored) for part, stored in found.items() if stored is not None]
    if record is not None:
        parts.append(Part(RECORD, "bookkeeping", record))
    columns = layout.groups * layout.group + layout.outliers
    tensor = LogicalTensor(
        joined(prefix, "weight"), (0, columns), "vptq", "parameter", tuple(parts), decode, layout, block=layout.group
    )
    tensor = tensor._replace(shape=(_rows(tensor, layout, settings, namespace), columns))
    _check(tensor, layout)
    _check_features(tensor, settings)
    return tensor


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say what a codebook without indices lacks: by its name it is an embedding like any other."""
    prefix, centroids, _ = stored.name.rpartition("centroids.weight")
    if not centroids:
        return None
    return f"is a codebook, but has no `{prefix.removesuffix('res_').removesuffix('outlier_')}indices` beside it"


def _settings(prefix: str, record: StoredTensor | None, namespace: Namespace) -> Mapping[str, Any]:
    """The block of one module; blocks that modules share go by the last component of their names."""
    if record is not None:
        return strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)
    own, shared = (namespace.quantization.get(key) for key in ("config_for_layers", "shared_layer_config"))
    settings = own.get(prefix) if isinstance(own, Mapping) else None
    if settings is None and isinstance(shared, Mapping):
        settings = shared.get(prefix.rpartition(".")[2])
    if not isinstance(settings, Mapping):
        where = "`config_for_layers` or `shared_layer_config`"
        raise UnknownEncoding(f"has no block in {where}: nothing says how long its vectors are", tensor=prefix)
    return settings


def _layout(settings: Mapping[str, Any], indices: StoredTensor) -> Layout:
    try:
        (outlier_vector, vector), (outlier_entries, entries), (_, residual_entries) = (
            settings[key] for key in ("vector_lens", "num_centroids", "num_res_centroids")
        )
        numbers = (
            *(settings["group_num"], settings["group_size"], vector, entries, max(0, residual_entries)),
            *(max(0, outlier_vector), max(0, outlier_entries), settings.get("outlier_size", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"its block of the configuration is not one of vptq: {error!r}", tensor=indices.name
        ) from None
    if any(type(number) is not int or number < 0 for number in numbers) or not (vector and entries):
        raise FormatError(f"its block of the configuration has sizes {numbers}", tensor=indices.name)
    groups, group, vector, entries, residual_entries, outlier_vector, outlier_entries, outliers = numbers
    with_outliers = outlier_vector > 1 and outlier_entries > 0
    layout = Layout(
        groups,
        group,
        Book(vector, entries),
        Book(vector, residual_entries),
        Book(outlier_vector, outlier_entries) if with_outliers else Book(0, 0),
        outliers if with_outliers else 0,
        settings.get("is_indice_packed", True) is True,
        settings.get("enable_perm") is True,
        settings.get("enable_norm") is True,
    )
    _check_bits(layout, indices)
    return layout


def _check_bits(layout: Layout, indices: StoredTensor) -> None:
    """Packed indices have the whole bits of their codebooks: the library packs no other sizes right."""
    for book in (layout.main, layout.residual):
        if layout.packed and book.entries & (book.entries - 1):
            raise FormatError(f"names {book.entries:,} entries (packed: a power of two)", tensor=indices.name)
    if layout.residual.entries and not layout.packed:
        raise FormatError("is not packed and has a residual, which no layer of vptq can hold", tensor=indices.name)
    if layout.main.bits + layout.residual.bits > 32:
        raise FormatError("has indices of more than 32 bits", tensor=indices.name)


def _rows(tensor: LogicalTensor, layout: Layout, settings: Mapping[str, Any], namespace: Namespace) -> int:
    """N, which the blocks of rows give up to padding."""
    vectors = tensor.stored.shape[1] if len(tensor.stored.shape) == 3 else 0
    most, least = vectors * layout.main.vector, (vectors - 1) * layout.main.vector + 1
    bias = namespace.tensors.get(tensor.name.removesuffix("weight") + "bias")
    announced = settings.get("out_features", -1)
    if type(announced) is int and announced > 0:
        rows: int = announced
    elif bias is not None:
        rows = bias.elements
    elif least == most:
        rows = most
    else:
        shape = architecture.fitting_shape(
            tensor.name, namespace.config, lambda n, k: least <= n <= most and k == tensor.columns
        )
        if shape is None:
            rule = "no out_features in its block, no bias, and the model's configuration does not say"
            raise UnknownEncoding(f"has {least:,} to {most:,} rows ({rule})", tensor=tensor.name)
        rows = shape[0]
    return rows


def _check(tensor: LogicalTensor, layout: Layout) -> None:
    """The sizes of all parts follow from the configuration and the shape."""
    rows, columns = tensor.shape
    bits, vectors = layout.main.bits + layout.residual.bits, -(-rows // layout.main.vector)
    words = -(-layout.group * bits // 32) if layout.packed else layout.group
    wanted = {
        "indices": (layout.groups, vectors, words),
        "centroids.weight": (layout.groups, layout.main.entries * layout.main.vector),
    }
    if layout.residual.entries:
        wanted["res_centroids.weight"] = (layout.groups, layout.residual.entries * layout.residual.vector)
    if layout.outlier.entries:
        wanted["outlier_indices"] = (1, -(-rows // layout.outlier.vector), layout.outliers)
        wanted["outlier_centroids.weight"] = (1, layout.outlier.entries * layout.outlier.vector)
    if layout.permuted:
        wanted["perm"] = (columns,)
    if layout.normed:
        wanted |= {"weight_scale": (columns,), "weight_bias": (columns,)}
    for part, shape in wanted.items():
        if not tensor.has(part):
            raise FormatError(f"has no `{tensor.name.removesuffix('weight')}{part}`", tensor=tensor.stored.name)
        if tensor.part(part).shape != shape:
            rule = f"{list(shape)} by its block of the configuration"
            raise FormatError(f"has the shape {list(tensor.part(part).shape)} ({rule})", tensor=tensor.part(part).name)
    for extra in (part for part in tensor.parts if part.name not in wanted and part.name != RECORD):
        raise FormatError("is there, but its block of the configuration has none", tensor=extra.stored.name)
    if BITS[tensor.stored.dtype] != (32 if layout.packed else 16):
        raise FormatError(f"{tensor.stored.dtype} is no index type", tensor=tensor.stored.name)


def _check_features(tensor: LogicalTensor, settings: Mapping[str, Any]) -> None:
    announced = settings.get("in_features", -1)
    if announced not in (-1, tensor.columns):
        rule = f"in_features {announced} in its block of the configuration"
        raise FormatError(f"has {tensor.columns:,} columns ({rule})", tensor=tensor.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    window = slice(start, stop)
    groups = [_group(tensor, layout, group, window, device) for group in range(layout.groups)]
    if layout.outlier.entries:
        groups.insert(0, _outliers(tensor, layout, window, device))
    values = torch.cat(groups, dim=1)
    if tensor.has("perm"):
        perm = tensor.part("perm").load(device=device).to(torch.int64)
        perm = perm & 0xFFFF if tensor.part("perm").dtype == "I16" else perm
        values = values[:, packing.inverse(perm, tensor.part("perm"))]
    if tensor.has("weight_scale"):
        values = values * tensor.part("weight_scale").load(device=device).float()
        values += tensor.part("weight_bias").load(device=device).float()
    return values


def _group(tensor: LogicalTensor, layout: Layout, group: int, window: slice, device: str) -> torch.Tensor:
    """One group of columns of a window of rows: main vectors plus residual ones."""
    blocks = _blocks(window, layout.main.vector)
    raw = _index_bytes(tensor.part("indices"), group, blocks, device)
    bits = layout.main.bits + layout.residual.bits if layout.packed else 16
    codes = packing.bit_rows(raw, bits, layout.group)
    main = codes & (1 << layout.main.bits) - 1 if layout.packed else codes
    values = _vectors(tensor.part("centroids.weight"), layout.main, group, main, device)
    if layout.residual.entries:
        residual = codes >> layout.main.bits
        values += _vectors(tensor.part("res_centroids.weight"), layout.residual, group, residual, device)
    return _cut(values, window, layout.main.vector)


def _outliers(tensor: LogicalTensor, layout: Layout, window: slice, device: str) -> torch.Tensor:
    raw = _index_bytes(tensor.part("outlier_indices"), 0, _blocks(window, layout.outlier.vector), device)
    codes = packing.bit_rows(raw, 16, layout.outliers)
    values = _vectors(tensor.part("outlier_centroids.weight"), layout.outlier, 0, codes, device)
    return _cut(values, window, layout.outlier.vector)


def _blocks(window: slice, vector: int) -> slice:
    """The blocks of rows that a window touches."""
    first = window.start // vector
    return slice(first, max(first, -(-window.stop // vector)))


def _cut(values: torch.Tensor, window: slice, vector: int) -> torch.Tensor:
    lead = window.start % vector
    return values[lead : lead + window.stop - window.start]


def _index_bytes(stored: StoredTensor, group: int, blocks: slice, device: str) -> torch.Tensor:
    """The bytes of some rows of indices of one group."""
    width = stored.shape[2] * BITS[stored.dtype] // 8
    at = group * stored.shape[1]
    raw = stored.load_bytes((at + blocks.start) * width, (at + blocks.stop) * width, device)
    return raw.view(blocks.stop - blocks.start, width)


def _vectors(stored: StoredTensor, book: Book, group: int, codes: torch.Tensor, device: str) -> torch.Tensor:
    """The vectors that codes name, each standing upright in its column.

    codes  # (vectors, columns)
    ->     # (vectors * v, columns)
    """
    if codes.numel() and int(codes.max()) >= book.entries:
        raise FormatError(
            f"has {book.entries:,} entries, its indices name entry {int(codes.max()):,}", tensor=stored.name
        )
    size = book.entries * book.vector
    table = stored.load(group * size, (group + 1) * size, device).float().view(book.entries, book.vector)
    values = packing.look_up(codes.reshape(-1), table).view(*codes.shape, book.vector)
    return values.transpose(1, 2).reshape(-1, codes.shape[1])


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a layer with what its block of the configuration would say; its codebooks are modules of their own."""
    if name:
        return None
    record = {
        "vector_lens": [owner.outlier_vector_len, owner.vector_len],
        "num_centroids": [owner.num_outlier_centroids, owner.num_centroids],
        "num_res_centroids": [owner.outlier_num_res_centroids, owner.num_res_centroids],
        "group_num": owner.group_num,
        "group_size": owner.group_size,
        "outlier_size": owner.outlier_size,
        "is_indice_packed": owner.is_indice_packed,
        "enable_perm": owner.enable_perm,
        "enable_norm": owner.enable_norm,
        "in_features": owner.in_features,
        "out_features": owner.out_features,
    }
    held = {part: owner._parameters[part] for part in PARTS if owner._parameters.get(part) is not None}
    return held | {RECORD: json.dumps(record).encode()}


SCHEME = Scheme(
    name="vptq",
    title="VPTQ (vector codebooks, residuals, outliers)",
    variants=("vptq",),
    claim=claim,
    anchors=("indices",),
    methods=("vptq",),
    live={"vptq.VQuantLinear": expose},
    refuse=refuse,
    source="vptq 0.0.5.post1, vptq/ops/quant_gemm.py and vptq/utils/pack.py",
    verified="vptq 0.0.5.post1",
)
