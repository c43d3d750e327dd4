"""AQLM: every tile of the matrix is a sum of vectors, one from each codebook, times the scale of its rows.

    part       dtype          stored shape                     packing
    codes      I8 I16 I32     [N / og, K / ig, books]          signed; code = c & (entries - 1)
    codebooks  float          [books, entries, og, ig]         entries is a power of two
    scales     float          [N / og, 1, 1, 1]

Formula: W[o * og + a, i * ig + b] = scales[o] * sum over c of codebooks[c, codes[o, i, c], a, b].
Source: aqlm 1.1.7, aqlm/utils.py (`_dequantize_weight`, `unpack_int_data`) and aqlm/inference.py (`QuantizedLinear`).

The first forward on a CPU turns codes of 256-entry codebooks around in place, to [K / ig, N / og, books]
(`prepare_matmul_op`), and they are saved so. Where N / og = K / ig the shape does not tell: a live layer does (its
kernel is the numba one), a file is taken as written by the quantizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme, joined
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "aqlm_linear"  # live only: the sizes, and whether the codes were turned around
RECORD_LIMIT = 1 << 10
SETTINGS = ("num_codebooks", "nbits_per_codebook", "out_group_size", "in_group_size")


class Layout(NamedTuple):
    """How the codes lie: groups of rows and of columns, vectors, and which axis is first."""

    out_groups: int
    in_groups: int
    books: int
    entries: int
    turned: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `codes` and `codebooks` stand for."""
    prefix, _, last = anchor.name.rpartition(".")
    found = {part: namespace.tensors.get(joined(prefix, part)) for part in ("codes", "codebooks", "scales")}
    codes, codebooks, scales = found.values()
    ours = namespace.quantization.get("quant_method") == "aqlm" or (codes is not None and codebooks is not None)
    if last not in found or not ours:
        return None
    if codes is None or codebooks is None or scales is None:
        missing = next(part for part, stored in found.items() if stored is None)
        raise FormatError(f"has no `{joined(prefix, missing)}` beside it", tensor=anchor.name)
    record = namespace.tensors.get(joined(prefix, RECORD))
    live = strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT) if record else {}
    layout = _layout(codes, codebooks, scales, live)
    _check_settings(codebooks, namespace)
    out_size, in_size = codebooks.shape[2:]
    parts = [Part("codes", "codes", codes), Part("codebooks", "codebooks", codebooks), Part("scales", "scales", scales)]
    if record is not None:
        parts.append(Part(RECORD, "bookkeeping", record))
    return LogicalTensor(
        joined(prefix, "weight"),
        (layout.out_groups * out_size, layout.in_groups * in_size),
        "aqlm",
        "parameter",
        tuple(parts),
        decode,
        layout,
        block=in_size,
    )


def _layout(codes: StoredTensor, codebooks: StoredTensor, scales: StoredTensor, live: Mapping[str, Any]) -> Layout:
    if len(codebooks.shape) != 4 or DTYPES[codebooks.dtype].kind != "float":
        rule = "floats [books, entries, out group, in group]"
        raise FormatError(f"{codebooks.dtype} {list(codebooks.shape)} is no codebook ({rule})", tensor=codebooks.name)
    books, entries = codebooks.shape[:2]
    if entries & (entries - 1) or entries > 1 << BITS[codes.dtype]:
        rule = f"a power of two that {codes.dtype} codes can name"
        raise FormatError(f"has {entries:,} entries ({rule})", tensor=codebooks.name)
    if len(codes.shape) != 3 or codes.shape[2] != books or DTYPES[codes.dtype].kind != "int":
        rule = f"integers [out groups, in groups, {books}]"
        raise FormatError(f"{codes.dtype} {list(codes.shape)} is no set of codes ({rule})", tensor=codes.name)
    out_groups = scales.shape[0] if scales.shape else 0
    if scales.elements != out_groups or out_groups not in codes.shape[:2]:
        raise FormatError(f"{list(scales.shape)} is not one scale for each group of rows", tensor=scales.name)
    turned = live.get("turned", codes.shape[0] != out_groups)
    if turned and entries != 256:
        raise FormatError(f"{list(codes.shape)} does not start with {out_groups:,} groups of rows", tensor=codes.name)
    return Layout(out_groups, codes.shape[0 if turned else 1], books, entries, turned)


def _check_settings(codebooks: StoredTensor, namespace: Namespace) -> None:
    """What the configuration says of the codebooks must be what they are."""
    books, entries, out_size, in_size = codebooks.shape
    for name, measured in zip(SETTINGS, (books, entries.bit_length() - 1, out_size, in_size), strict=True):
        announced = namespace.quantization.get(name, measured)
        if announced != measured:
            raise FormatError(f"has {name} {measured}, the configuration says {announced}", tensor=codebooks.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    books = tensor.part("codebooks")
    out_size, in_size = books.shape[2:]
    groups = slice(start // out_size, -(-stop // out_size))
    count = max(0, groups.stop - groups.start) if stop > start else 0
    codes = _codes(tensor, layout, groups.start, groups.start + count, device)  # (groups, in groups, books)
    values = torch.zeros(count * layout.in_groups, out_size * in_size, device=device)
    width = layout.entries * out_size * in_size
    for book in range(layout.books):
        table = books.load(book * width, (book + 1) * width, device).to(torch.float32)
        values += packing.look_up(codes[:, :, book].reshape(-1), table.view(layout.entries, -1))
    scales = tensor.part("scales").load(groups.start, groups.start + count, device).to(torch.float32)
    values = values.view(count, layout.in_groups, out_size, in_size).mul_(scales.view(-1, 1, 1, 1))
    rows = values.transpose(1, 2).reshape(count * out_size, tensor.columns)
    first = start - groups.start * out_size
    return rows[first : first + stop - start]


def _codes(tensor: LogicalTensor, layout: Layout, first: int, last: int, device: str) -> torch.Tensor:
    """The codes of some groups of rows, 0 up to the number of entries."""
    import torch

    if layout.turned:
        codes = tensor.stored.load(device=device).view(layout.in_groups, layout.out_groups, layout.books)
        codes = codes[:, first:last].transpose(0, 1)
    else:
        width = layout.in_groups * layout.books
        codes = tensor.stored.load(first * width, last * width, device).view(-1, layout.in_groups, layout.books)
    return codes.to(torch.int32) & (layout.entries - 1)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a layer with its sizes: its codes may have been turned around by a forward on a CPU."""
    if name:
        return None
    codes, out_groups = owner.codes, owner.out_features // owner.out_group_size
    record = {"turned": codes.shape[0] != out_groups or _has_run_on_cpu(owner)}
    held = {part: getattr(owner, part) for part in ("codes", "codebooks", "scales")}
    return held | {RECORD: json.dumps(record).encode()}


def _has_run_on_cpu(owner: Any) -> bool:
    """Whether the layer chose the kernel that needs its codes turned around."""
    forward = getattr(getattr(owner, "gemv_op", None), "forward", None)
    closure = getattr(forward, "__closure__", None) or ()
    return any(getattr(cell.cell_contents, "__name__", "") == "numba_gemm_lut" for cell in closure)


SCHEME = Scheme(
    name="aqlm",
    title="AQLM (additive codebooks)",
    variants=("aqlm",),
    claim=claim,
    anchors=("codes", "codebooks"),
    methods=("aqlm",),
    live={"aqlm.QuantizedLinear": expose},
    source="aqlm 1.1.7, aqlm/utils.py and aqlm/inference.py",
    verified="aqlm 1.1.7",
)
