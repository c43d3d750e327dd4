"""Gemma's own quantization: 2, 4 or 8 bits with one scale per row, linear layers and embeddings.

    part                       dtype      stored shape             packing
    weight                     U8 or I8   [N, ceil(K * bits / 8)]  lowest bits first; I8 is 8 bits as it is
    weight_scale               F32        [N, 1]
    input_activation_scale     F32        []                       for activations only
    output_activation_scale    F32        []

    embedding_quantized        U8 or I8   [V, ceil(K * bits / 8)]  the table of an embedding
    embedding_scale            F32        [V, blocks]              each for K / blocks columns

Formula: w = (code - 2 ** (bits - 1)) * scale; 8-bit codes are signed already.
Source: transformers 5.17, integrations/gemma_quant.py (`QuantizedLinear`, `QuantizedEmbedding`).

Bits come from `num_bits` and `module_quant_configs` of the configuration (live: the layer). The last byte of a row may
be padded: K is then a size that the model's configuration names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import architecture, packing, patterns, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme, joined
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "gemma_layer"  # live only: bits and columns
RECORD_LIMIT = 1 << 10
ACTIVATIONS = ("input_activation_scale", "output_activation_scale")
CACHES = ("k_cache_scale", "v_cache_scale")
BITS = (2, 4, 8)
FLOORS_DB = {8: 28.0}


class Layout(NamedTuple):
    """Bits of a code, and columns per scale."""

    bits: int
    block: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the linear weight or the embedding that a scale belongs to, or the scale of a cache as a buffer."""
    prefix, _, last = anchor.name.rpartition(".")
    record = namespace.tensors.get(joined(prefix, RECORD))
    if record is None and namespace.quantization.get("quant_method") != "gemma":
        return None
    if last in CACHES:
        return LogicalTensor(anchor.name, anchor.shape, "plain", "buffer", (Part("weight", "buffers", anchor),), None)
    codes_name = {"weight_scale": "weight", "embedding_scale": "embedding_quantized"}.get(last)
    if codes_name is None:
        return None
    codes = namespace.tensors.get(joined(prefix, codes_name))
    if codes is None:
        raise FormatError(f"has no `{joined(prefix, codes_name)}` beside it", tensor=anchor.name)
    parts = [Part(codes_name, "codes", codes), Part(last, "scales", anchor)]
    for name in (*ACTIVATIONS, RECORD):
        extra = namespace.tensors.get(joined(prefix, name))
        if extra is not None:
            parts.append(Part(name, "bookkeeping", extra))
    live = strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT) if record else {}
    bits = _bits(prefix, codes, live, namespace)
    columns = live["columns"] if live else _columns(joined(prefix, "weight"), codes, bits, namespace)
    _check(codes, anchor, bits, columns)
    return LogicalTensor(
        joined(prefix, "weight"),
        (codes.shape[0], columns),
        f"gemma-int{bits}",
        "parameter",
        tuple(parts),
        decode,
        Layout(bits, columns // anchor.shape[1]),
        block=columns // anchor.shape[1],
        floor_db=FLOORS_DB.get(bits),
        rounding=rounding.grouped(
            rounding.symmetric(bits), columns // anchor.shape[1], margin_db=rounding.COMPENSATED_DB
        ),
    )


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say what codes without a scale lack."""
    last = stored.name.rpartition(".")[2]
    if last in ACTIVATIONS:
        return "belongs to a quantized layer, but has no `weight` and `weight_scale` beside it"
    if stored.dtype not in ("U8", "I8") or last not in ("weight", "embedding_quantized"):
        return None
    return f"{stored.dtype} {list(stored.shape)} is packed, but has no scale beside it"


def _bits(prefix: str, codes: StoredTensor, live: Mapping[str, Any], namespace: Namespace) -> int:
    """The bits of one module: the first pattern found in its name decides, `num_bits` where there is none."""
    if live:
        bits = live["bits"]
    else:
        default = namespace.quantization.get("num_bits", 4)
        modules = namespace.quantization.get("module_quant_configs")
        modules = modules if isinstance(modules, Mapping) else {}
        try:
            own: Mapping[str, Any] = next(
                (block for pattern, block in modules.items() if patterns.found_in(prefix, pattern)), {}
            )
        except FormatError as error:
            raise error.at(tensor=codes.name) from None
        bits = own.get("num_bits", default) if isinstance(own, Mapping) else default
    if type(bits) is not int or bits not in BITS or codes.dtype not in ({"I8"} if bits == 8 else {"I8", "U8"}):
        raise FormatError(f"is {codes.dtype} with {bits} bits (I8 for 8, bytes for 2 and 4)", tensor=codes.name)
    return int(bits)


def _columns(name: str, codes: StoredTensor, bits: int, namespace: Namespace) -> int:
    """K: all codes of the bytes of a row, unless the model's configuration names a size that needs padding."""
    packed = codes.shape[-1] if codes.shape else 0
    whole = packed * 8 // bits
    shape = architecture.fitting_shape(
        name, namespace.config, lambda rows, width: rows == codes.shape[0] and -(-width * bits // 8) == packed
    )
    if shape is not None:
        return shape[1]
    sizes = architecture.named_sizes(namespace.config)
    fitting = [size for size in range(whole - 8 // bits + 1, whole + 1) if size in sizes]
    if len(fitting) > 1:
        raise UnknownEncoding(f"has {fitting} columns: the configuration names these sizes", tensor=codes.name)
    return fitting[0] if fitting else whole


def _check(codes: StoredTensor, scale: StoredTensor, bits: int, columns: int) -> None:
    if len(codes.shape) != 2 or not columns or codes.shape[1] != -(-columns * bits // 8):
        rule = f"{bits} bits for {columns:,} columns"
        raise FormatError(f"{codes.dtype} {list(codes.shape)} is no table of codes ({rule})", tensor=codes.name)
    if len(scale.shape) != 2 or scale.shape[0] != codes.shape[0] or not scale.shape[1] or columns % scale.shape[1]:
        rule = f"{codes.shape[0]:,} rows of {columns:,} columns"
        raise FormatError(f"{list(scale.shape)} does not divide {rule}", tensor=scale.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    width = tensor.stored.shape[1]
    raw = tensor.stored.load_bytes(start * width, stop * width, device).view(stop - start, width)
    if layout.bits == 8:
        codes = raw.view(torch.int8).to(torch.float32)
    else:
        codes = packing.bit_rows(raw, layout.bits, tensor.columns).to(torch.float32) - 2 ** (layout.bits - 1)
    blocks = tensor.columns // layout.block
    scales = tensor.parts[1].stored.load(start * blocks, stop * blocks, device).to(torch.float32)
    values = codes.view(stop - start, blocks, layout.block).mul_(scales.view(stop - start, blocks, 1))
    return values.view(stop - start, tensor.columns)


def expose_linear(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a linear layer with its bits and columns."""
    return None if name else _show(owner, ("weight", "weight_scale", *ACTIVATIONS), owner.in_features)


def expose_embedding(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show an embedding with its bits and columns."""
    return None if name else _show(owner, ("embedding_quantized", "embedding_scale"), owner.embedding_dim)


def _show(owner: Any, names: tuple[str, ...], columns: int) -> dict[str, Any]:
    record = {"bits": owner.num_bits, "columns": columns}
    held = {name: owner._parameters[name] for name in names if name in owner._parameters}
    return held | {RECORD: json.dumps(record).encode()}


SCHEME = Scheme(
    name="gemma",
    title="Gemma (2, 4 and 8 bits per row, embeddings too)",
    variants=tuple(f"gemma-int{bits}" for bits in BITS),
    claim=claim,
    anchors=("weight_scale", "embedding_scale", *CACHES),
    methods=("gemma",),
    live={"transformers.QuantizedLinear": expose_linear, "transformers.QuantizedEmbedding": expose_embedding},
    refuse=refuse,
    source="transformers 5.17, integrations/gemma_quant.py",
    verified="transformers 5.17.0",
)
