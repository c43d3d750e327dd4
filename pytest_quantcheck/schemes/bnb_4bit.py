"""bitsandbytes 4-bit: NF4 and FP4 codes in blocks with one absolute maximum each, optionally quantized once more.

    part                                  dtype            stored shape                     packing
    weight                                quant_storage    [ceil(numel/2) / itemsize, 1]    flat, high nibble first
    weight.absmax                         F32 (U8: nested) [ceil(numel/blocksize)]          over the flat tensor
    weight.quant_map                      F32              [16]                             value of each code
    weight.nested_absmax                  F32              [ceil(blocks/256)]
    weight.nested_quant_map               F32              [256]
    weight.quant_state.bitsandbytes__nf4  U8               JSON: quant_type, blocksize, dtype, shape, nested_*

Formula: w[i] = quant_map[code[i]] * absmax[i // blocksize], in float32, i over the row-major flat tensor: blocks run on
across rows. Nested: absmax[k] = nested_quant_map[byte[k]] * nested_absmax[k // nested_blocksize] + nested_offset.
Source: bitsandbytes 0.50.2, functional.py (`QuantState`), backends/default/ops.py, nn/modules.py, nn/parametrize.py.

Departs from the library where the library is wrong: its AVX-512 decode starts blocks anew on every row when in_features
is a multiple of 16 but not of the block size (csrc/cpu_ops.cpp `dequantizeBlockwise4bitCpu`).

On CPUs with AVX512-BF16 the first forward repacks the live weight in place (`packing_format_for_cpu`): rows in groups
of 32, per group a byte column holds 64 nibbles of 32 rows as two planes; absmax becomes bf16 `[K / blocksize, N]`.

Not stored with the weight: a `Params4bit` before its first move to a device is still plain numbers, and one that lost
its quant_state (FSDP, `.data` copies) is counted from its module and not decodable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rewritten, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Reading, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, Steps, StoredTensor

if TYPE_CHECKING:
    import torch

STATE = "quant_state.bitsandbytes__"
STATE_LIMIT = 64 << 10
LOST, PENDING = "lost", "pending"  # live only, see `expose`

PARTS: dict[str, ByteClass] = {
    "absmax": "scales",
    "quant_map": "codebooks",
    "nested_absmax": "scales",
    "nested_quant_map": "codebooks",
}

# Worst of Gaussian, Student-t and outlier weights, less 1 dB, by the largest block size it holds for.
FLOORS_DB = {
    "nf4": ((64, 18.5), (128, 17.4), (256, 15.8), (4096, 7.9)),
    "fp4": ((64, 15.0), (128, 13.9), (256, 12.3), (4096, 5.0)),
}

# The levels of each type, and a byte full of the code of 1.
TABLES = {"nf4": (packing.NF4, 0xFF), "fp4": (packing.FP4, 0x33)}
# The codes of 0 and 1 in `nested_quant_map`, and the widest gap of it.
NESTED_ZERO_AND_ONE = (127, 255)
NESTED_GAP = 0.9 / 64


class Layout(NamedTuple):
    """What the quantization state says beside its tensors."""

    quant_type: str
    blocksize: int
    nested_blocksize: int
    nested_offset: float
    packed_for_cpu: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a part of its quantization state belongs to."""
    name = _weight_name(anchor.name)
    weight = namespace.tensors.get(name)
    if weight is None:
        raise FormatError(f"has no weight `{name}` beside it", tensor=anchor.name)
    record = _record(name, namespace)
    if record.name.endswith(PENDING):
        return _pending(weight, record)
    state = _read_state(record)
    tensor = LogicalTensor(
        name,
        _shape(state, record),
        f"bnb-{state.get('quant_type') or '4bit'}",
        "parameter",
        _parts(weight, record, namespace),
        decode,
    )
    if record.name.endswith(LOST):
        _check_codes(weight, tensor.params)
        return tensor._replace(decoder=_decode_lost)
    layout = _layout(state, record)
    _check(tensor, layout)
    expected = _rounding(layout, tensor.columns, nested=tensor.has("nested_absmax"))
    return tensor._replace(
        layout=layout, block=layout.blocksize, floor_db=_floor_db(layout), rounding=expected, flat=True
    )


def _record(name: str, namespace: Namespace) -> StoredTensor:
    """The one quantization state of a weight."""
    kinds = ("nf4", "fp4", LOST, PENDING)
    found = [stored for kind in kinds if (stored := namespace.tensors.get(f"{name}.{STATE}{kind}")) is not None]
    if len(found) > 1:
        raise FormatError("has two quantization states", tensor=name)
    if not found:
        what = f"has no `{name}.{STATE}nf4` or `fp4`: its quantization state is missing"
        raise FormatError(what, tensor=name)
    return found[0]


def _parts(weight: StoredTensor, record: StoredTensor, namespace: Namespace) -> tuple[Part, ...]:
    statistics = [
        Part(part, kind, stored)
        for part, kind in PARTS.items()
        if (stored := namespace.tensors.get(f"{weight.name}.{part}")) is not None
    ]
    return (Part("weight", "codes", weight), *statistics, Part("quant_state", "bookkeeping", record))


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a column of a 4-bit checkpoint cannot be plain numbers: packed weights look like one."""
    storage = str(namespace.quantization.get("bnb_4bit_quant_storage", "uint8"))
    if not namespace.quantization.get("load_in_4bit") or DTYPES[stored.dtype].torch != storage:
        return None
    if not stored.name.endswith(".weight") or len(stored.shape) != 2 or stored.shape[1] != 1 or stored.shape[0] == 1:
        return None
    return f"{stored.dtype} {list(stored.shape)} is packed 4-bit, but has no `{stored.name}.{STATE}nf4` or `fp4`"


def alternatives(tensor: LogicalTensor) -> Iterator[Reading]:
    """Yield what is mistaken in 4-bit weights: the table, the size of blocks, the mean of nested statistics."""
    layout = tensor.layout
    if not isinstance(layout, Layout):
        return
    for kind, (values, _) in TABLES.items():
        other = rewritten.table(tensor, "quant_map", values)
        advice = f"the codes are {kind}: `quant_type` or `quant_map` is wrong"
        yield Reading("table", f"the table of {kind}", other, advice)
    for blocksize in () if layout.packed_for_cpu else (32, 64, 128, 256, 512, 1024, 2048, 4096):
        if blocksize > layout.blocksize and -(-tensor.params // blocksize) < tensor.part("absmax").elements:
            other = tensor._replace(layout=layout._replace(blocksize=blocksize))
            yield Reading("block-size", f"blocks of {blocksize}", other, f"`blocksize` should be {blocksize}")
    if tensor.has("nested_absmax"):
        shifted = tensor._replace(layout=layout._replace(nested_offset=layout.nested_offset + 1))
        words = "a number fitted to `nested_offset`"
        yield Reading("nested-offset", words, shifted, "`nested_offset` was lost or is another's", along=True)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where every row is full blocks."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.packed_for_cpu or tensor.columns % layout.blocksize:
        return None
    found = _blocks(tensor, layout, start * tensor.columns, stop * tensor.columns, device)
    return found._replace(scales=found.scales.view(stop - start, -1))


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.packed_for_cpu:
        return _decode_packed_for_cpu(tensor, layout, start, stop, device)
    first, last = start * tensor.columns, stop * tensor.columns
    if last <= first:
        return _table(tensor, device).new_empty((stop - start, tensor.columns))
    lead = first % layout.blocksize  # the window opens inside a block: decode from the start of that block
    values = packing.expand(_blocks(tensor, layout, first - lead, last, device)).view(-1)
    return values[lead : last - first + lead].view(stop - start, tensor.columns)


def _blocks(tensor: LogicalTensor, layout: Layout, first: int, last: int, device: str) -> Coded:
    """The blocks from value `first`, where one starts, to the one that holds the last, as one row."""
    codes = tensor.stored.load_bytes(first // 2, -(-last // 2), device)
    blocks = slice(first // layout.blocksize, -(-last // layout.blocksize))
    pairs = packing.nibble_pairs(_table(tensor, device), high_first=True)
    return Coded(codes, pairs, _absmax(tensor, layout, blocks, device).view(1, -1), layout.blocksize)


def _absmax(tensor: LogicalTensor, layout: Layout, blocks: slice, device: str) -> torch.Tensor:
    """The absolute maximum of each block, as float32, nested statistics undone."""
    import torch

    absmax = tensor.part("absmax").load(blocks.start, blocks.stop, device)
    if not tensor.has("nested_absmax"):
        return absmax.to(torch.float32)
    table = tensor.part("nested_quant_map").load(device=device).to(torch.float32)
    values = packing.look_up(absmax, table.view(-1, 1)).view(-1)
    size = layout.nested_blocksize
    first = blocks.start // size
    nested = tensor.part("nested_absmax").load(first, -(-blocks.stop // size), device).to(torch.float32)
    outer = nested.repeat_interleave(size)[blocks.start - first * size : blocks.stop - first * size]
    return values.mul_(outer).add_(layout.nested_offset)


def _decode_packed_for_cpu(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    import torch

    rows, columns = tensor.shape
    low, high = start // 32 * 32, min(-(-stop // 32) * 32, rows)
    codes = tensor.stored.load_bytes(low * columns // 2, high * columns // 2, device)
    planes = codes.view(-1, 32)
    nibbles = torch.cat((planes & 15, planes >> 4), dim=1)  # (groups * columns / 2, 64)
    nibbles = nibbles.view(-1, columns // 2, 32, 2).transpose(1, 2).reshape(high - low, columns)
    values = packing.look_up(nibbles.view(-1), _table(tensor, device).view(-1, 1)).view(high - low, columns)
    absmax = tensor.part("absmax").load(device=device).to(torch.float32).view(columns // layout.blocksize, rows)
    values.view(high - low, -1, layout.blocksize).mul_(absmax.t()[low:high].unsqueeze(-1))
    return values[start - low : stop - low]


def _table(tensor: LogicalTensor, device: str) -> torch.Tensor:
    import torch

    return tensor.part("quant_map").load(device=device).to(torch.float32)


def _decode_lost(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    raise NotDecodable(
        "its parameter lost its quant_state and its module has none: the scales are gone", tensor=tensor.name
    )


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a 4-bit module or parameter as it would be saved, its quantization state found wherever it still is."""
    if name:
        return _show(name, owner, getattr(owner, "quant_state", None))
    weight = getattr(owner, "weight", None)  # no parameter where FSDP has flattened it
    if weight is None:
        return None
    state = getattr(weight, "quant_state", None) or getattr(owner, "quant_state", None)
    sizes = [getattr(owner, attribute, None) for attribute in _SIZES]
    features = tuple(size for size in sizes if size is not None)
    return _show("weight", weight, state, features=features)


_SIZES = ("out_features", "in_features", "num_embeddings", "embedding_dim")


def expose_parametrization(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a parameter that `replace_parameter_4bit` quantized in place: fused experts, mostly."""
    states = [module.quant_state for module in owner.children() if hasattr(module, "quant_state")]
    return _show("original", owner._parameters["original"], states[0]) if states else None


def _show(name: str, weight: Any, state: Any, *, features: tuple[int, ...] = ()) -> dict[str, Any] | None:
    if state is None:
        return _show_without_state(name, weight, features)
    shown = {name: weight, f"{name}.absmax": state.absmax, f"{name}.quant_map": state.code}
    record = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "shape": list(state.shape),
        "packed_for_cpu": getattr(state, "packing_format_for_cpu", False),
    }
    if state.nested:
        shown |= {f"{name}.nested_absmax": state.state2.absmax, f"{name}.nested_quant_map": state.state2.code}
        record["nested_blocksize"] = state.state2.blocksize
        record["nested_offset"] = None if state.offset.is_meta else state.offset.item()
    return shown | {f"{name}.{STATE}{state.quant_type}": json.dumps(record).encode()}


def _show_without_state(name: str, weight: Any, features: tuple[int, ...]) -> dict[str, Any] | None:
    shape = tuple(weight.shape)
    quantized = shape != features if features else getattr(weight, "bnb_quantized", False)
    if quantized:
        record = {"shape": features, "quant_type": getattr(weight, "quant_type", None)}
        return {name: weight, f"{name}.{STATE}{LOST}": json.dumps(record).encode()}
    if weight.dtype.is_floating_point:
        return None  # not quantized yet: plain numbers
    return {name: weight, f"{name}.{STATE}{PENDING}": b"{}"}  # on meta, already cast to quant_storage


def _weight_name(part: str) -> str:
    stem, _, last = part.rpartition(".")
    return stem.removesuffix(".quant_state") if last.startswith("bitsandbytes__") else stem


def _read_state(stored: StoredTensor) -> dict[str, Any]:
    try:
        return strict_json.parse_object(stored.read(limit=STATE_LIMIT), limit=STATE_LIMIT)
    except FormatError as error:
        raise error.at(tensor=stored.name) from None


def _shape(state: Mapping[str, Any], stored: StoredTensor) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise FormatError(
            f"quantization state has the shape `{shape}` (a list of sizes belongs there)", tensor=stored.name
        )
    return tuple(shape)


def _layout(state: Mapping[str, Any], stored: StoredTensor) -> Layout:
    announced, quant_type = stored.name.rpartition("__")[2], state.get("quant_type")
    if quant_type != announced:
        raise FormatError(f"says quant_type `{quant_type}`, is named `{announced}`", tensor=stored.name)
    offset = state.get("nested_offset") or 0.0
    if type(offset) not in (float, int):
        raise FormatError(f"nested_offset `{offset}` is not a number", tensor=stored.name)
    return Layout(
        announced,
        _even(state.get("blocksize"), stored),
        _even(state.get("nested_blocksize", 256), stored),
        offset,
        state.get("packed_for_cpu") is True,
    )


def _even(blocksize: object, stored: StoredTensor) -> int:
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize < 2 or blocksize % 2:
        raise FormatError(f"blocksize `{blocksize}` is not a positive even integer", tensor=stored.name)
    return blocksize


def _check(tensor: LogicalTensor, layout: Layout) -> None:
    """The sizes of all parts follow from the shape and the block sizes."""
    _check_codes(tensor.stored, tensor.params)
    blocks = -(-tensor.params // layout.blocksize)
    nested = tensor.has("nested_absmax") or (tensor.has("absmax") and tensor.part("absmax").dtype == "U8")
    wanted = {"absmax": blocks, "quant_map": 16}
    if nested:
        wanted |= {"nested_absmax": -(-blocks // layout.nested_blocksize), "nested_quant_map": 256}
    for part, elements in wanted.items():
        if not tensor.has(part):
            raise FormatError(f"has no `{tensor.name}.{part}`", tensor=tensor.name)
        stored = tensor.part(part)
        if stored.elements != elements:
            rule = f"{elements:,} for {list(tensor.shape)} in blocks of {layout.blocksize}"
            raise FormatError(f"has {stored.elements:,} values ({rule})", tensor=stored.name)


def _check_codes(weight: StoredTensor, params: int) -> None:
    bits = BITS[weight.dtype]
    wanted, stored = -(-4 * params // bits) * bits // 8, weight.elements * bits // 8
    if stored != wanted:
        rule = f"{wanted:,} for {params:,} values in {weight.dtype}"
        raise FormatError(f"has {stored:,} bytes of 4-bit codes ({rule})", tensor=weight.name)


def _pending(weight: StoredTensor, state: StoredTensor) -> LogicalTensor:
    """A meta tensor that will be loaded and quantized: counted by its shape, which is still the logical one."""
    parts = (Part("weight", "unquantized", weight), Part("quant_state", "bookkeeping", state))
    return LogicalTensor(weight.name, weight.shape, "plain", "parameter", parts, None)


def _floor_db(layout: Layout) -> float | None:
    floors = FLOORS_DB[layout.quant_type]
    return next((floor for blocksize, floor in floors if layout.blocksize <= blocksize), None)


def _rounding(layout: Layout, columns: int, *, nested: bool) -> Rounding:
    table, unit = TABLES[layout.quant_type]
    to_level = rounding.codebook(table, scale="nested" if nested else "float32")
    gaps = steps.levels(table, 1.0, unit)
    return rounding.flat(
        to_level, layout.blocksize, columns, steps=partial(_nested_steps, gaps=gaps, unit=unit) if nested else gaps
    )


def _nested_steps(tensor: LogicalTensor, start: int, stop: int, device: str, *, gaps: Steps, unit: int) -> torch.Tensor:
    """Wider by what each absmax lost after its codes were chosen: up to half of the widest gap of its own table."""
    at = [part.name for part in tensor.parts].index("absmax")
    ones = steps.filled(tensor, unit)
    zero, one = (steps.filled(ones, code, part=at).decode(start, stop, device) for code in NESTED_ZERO_AND_ONE)
    lost = one.sub_(zero).mul_(NESTED_GAP / 2).div_(ones.decode(start, stop, device)).abs_()  # of the absmax
    step = gaps(tensor, start, stop, device)
    return step + (step + 2 * tensor.decode(start, stop, device).abs_()) * lost


SCHEME = Scheme(
    name="bnb-4bit",
    title="bitsandbytes 4-bit (NF4, FP4, double quantization)",
    variants=("bnb-nf4", "bnb-fp4"),
    claim=claim,
    anchors=("absmax", "quant_map", *(f"bitsandbytes__{kind}" for kind in ("nf4", "fp4", LOST, PENDING))),
    methods=("bitsandbytes", "bitsandbytes_4bit"),
    live={
        "bitsandbytes.Linear4bit": expose,
        "bitsandbytes.Embedding4bit": expose,
        "bitsandbytes.Params4bit": expose,
        "torch.ParametrizationList": expose_parametrization,
    },
    refuse=refuse,
    alternatives=alternatives,
    coders={decode: coded},
    source="bitsandbytes 0.50.2, functional.py, nn/modules.py and nn/parametrize.py",
    verified="bitsandbytes 0.50.2",
)
