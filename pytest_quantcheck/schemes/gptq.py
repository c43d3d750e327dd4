"""GPTQ: codes packed along the inputs, zero points packed along the outputs, one scale per group and output.

    part     dtype     stored shape        packing
    qweight  I32       [ceil(K*b/32), N]   each column a stream of b-bit codes, lowest bits first; or planes, see below
    qzeros   I32       [G, ceil(N*b/32)]   each row the same way; the zero point, or the zero point less one
    scales   F16/BF16  [G, N]
    g_idx    I32       [K]                 the group of each input (act-order); absent: k // group_size

Formula: w[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k], in float32. b is 2 to 8; words may
also be I8, I16 or I64 (`pack_dtype`).
Source: GPTQModel 7.6.0, nn_modules/qlinear/__init__.py, utils/planar_packing.py, utils/model.py; auto-round 0.16.1,
auto_round_extension/torch/qlinear_torch.py and qlinear_torch_zp.py.

Planes: GPTQModel keeps 5, 6 and 7 bits, and 3 bits under `gptq_p`, as planes: for every 32 codes first the words of the
low plane, then those of the higher ones (5 = 4+1, 6 = 4+2, 7 = 4+2+1, 3 = 2+1). auto-round streams all widths.

Zero points: version 1 stores them less one, version 2 as they are, and labels lie (GPTQModel wrote version 2 under
`gptq`). A symmetric weight tells by itself: all its zero points are 2**(b-1). An asymmetric one cannot: the label
decides, and `readings` gives the tensor under both. Version 1 wraps at a zero point of 0: GPTQModel takes one from, and
adds one to, whole words of 2-, 4- and 8-bit fields, so the carry of a wrapped field must run into its neighbour; fields
of other widths wrap by themselves.

Embeddings are packed along the tokens: their codes are in the order of the logical weight, [K, N].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.dtypes import BITS
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import buffer_linear, packing, quantization_config, rewritten, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Reading, Scheme, joined
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "qweight": "codes",
    "qzeros": "zero_points",
    "scales": "scales",
    "g_idx": "index",
    buffer_linear.RECORD: "bookkeeping",  # live only
}
METHODS = ("gptq", "gptqmodel", "auto-round", "intel/auto-round")
WORDS = ("I32", "I16", "I8", "I64")
EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"})

# Bits -> widths of the planes, lowest first.
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}

# Label -> what is subtracted from a zero point before it is stored.
VERSIONS = {None: 1, "gptq": 1, "gptq_v2": 0, "gptq_p": 0}

# Round-to-nearest of the worst of Gaussian, Student-t and outlier weights, less 1 dB, and less 3 dB because GPTQ
# minimizes the error of outputs: (bits, largest group, floor).
FLOORS_DB = ((4, 32, 14.0), (4, 128, 11.0), (3, 128, 4.0), (8, 128, 36.0))


class Layout(NamedTuple):
    """How the codes and zero points of one weight are written, and how that was found out.

    `zero_offset` is 1 where zero points are stored less one. `decided_by` is "module" (a live module says it), "data"
    (all zero points are those of a symmetric weight), "label" (the config says it, and nothing confirms it) or None:
    then `zero_offset` is None too, or `planar` where it matters, and the values cannot be told.
    """

    bits: int
    inputs: int
    group_size: int | None
    planar: bool | None
    zero_offset: int | None
    decided_by: str | None
    embedding: bool
    repacked_for: str | None = None


class Said(NamedTuple):
    """What the config says: the numbers it knows, the widths that lie in planes, and the label of the zero points."""

    bits: frozenset[int]
    groups: frozenset[int]
    symmetric: bool | None
    planes: frozenset[int] | None
    zero_offset: int | None


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `qweight` or `qzeros` belongs to."""
    prefix, _, last = anchor.name.rpartition(".")
    if last not in ("qweight", "qzeros"):
        return None
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(joined(prefix, part))) is not None}
    qweight = found.get("qweight")
    record = buffer_linear.record(found.get(buffer_linear.RECORD))
    if record.get("awq") or (not record.get("repacked_for") and (qweight or anchor).dtype not in WORDS):
        return None
    for part in ("qweight", "scales", "qzeros"):
        if part not in found:
            raise FormatError(f"has no `{joined(prefix, part)}` beside it", tensor=anchor.name)
    said = _said(namespace.quantization, found["qweight"].name)
    layout = _layout(found, said, record, prefix)
    outputs = found["scales"].shape[1]
    return LogicalTensor(
        joined(prefix, "weight"),
        (layout.inputs, outputs) if layout.embedding else (outputs, layout.inputs),
        "gptq",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        layout,
        block=layout.group_size,
        floor_db=_floor_db(layout),
        rounding=_rounding(found, layout, said, record),
    )


def readings(tensor: LogicalTensor) -> tuple[LogicalTensor, ...]:
    """Return a GPTQ tensor under every reading of its zero points that nothing in the file rules out, best first."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.decided_by in ("module", "data") or layout.planar is None:
        return (tensor,)
    offsets = (0, 1) if layout.zero_offset == 0 else (1, 0)
    return tuple(tensor._replace(layout=layout._replace(zero_offset=offset)) for offset in offsets)


def alternatives(tensor: LogicalTensor) -> Iterator[Reading]:
    """Yield what is mistaken in GPTQ: the version of zero points, whether they count, the order of groups."""
    layout = tensor.layout
    if not isinstance(layout, Layout):
        return
    if layout.zero_offset == 1:
        words, advice = "zero points read as version 2, as they are stored", "say `checkpoint_format: gptq_v2`"
        yield Reading("zero-point-version", words, tensor._replace(layout=layout._replace(zero_offset=0)), advice)
    if layout.zero_offset == 0 and not layout.planar:
        words, advice = "zero points read as version 1, stored less one", "say `checkpoint_format: gptq`"
        yield Reading("zero-point-version", words, tensor._replace(layout=layout._replace(zero_offset=1)), advice)
    if layout.bits in PLANES and layout.planar is not None and not layout.inputs % 32 and not tensor.shape[0] % 32:
        words = "codes in one stream" if layout.planar else "codes in planes"
        other = tensor._replace(layout=layout._replace(planar=not layout.planar))
        yield Reading("planes", words, other, "`checkpoint_format` is another's: only `gptq_p` has planes of 3 bits")
    if layout.bits in (2, 4, 8):
        middle = 2 ** (layout.bits - 1)
        change = partial(rewritten.fill, bits=layout.bits, number=middle - (layout.zero_offset or 0))
        words, advice = f"all zero points {middle}", "the codes are symmetric, `qzeros` is not theirs"
        yield Reading("zero-points-not-meant", words, rewritten.part(tensor, "qzeros", change), advice)
    if tensor.has("g_idx") and layout.group_size is not None:
        words, advice = "inputs in groups as they come", "the codes are in the order of groups: `g_idx` is not theirs"
        yield Reading("group-index", words, rewritten.without(tensor, "g_idx"), advice)


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a matrix of scales in a GPTQ checkpoint cannot be a weight: its codes are missing."""
    if stored.name.endswith(".scales") and len(stored.shape) == 2:
        return f"has no `{joined(_module(stored.name), 'qweight')}` beside it"
    return None


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    _check_decodable(tensor, layout)
    groups = _groups(tensor, layout, device)  # (K,)
    if layout.embedding:
        return _decode_tokens(tensor, layout, groups, start, stop, device)
    found = _coded(tensor, layout, start, stop, device)
    if _in_order(groups, layout):
        return packing.expand(found).view(stop - start, layout.inputs)
    return packing.expand_scattered(found, groups)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where groups of inputs are as they come."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    _check_decodable(tensor, layout)
    if layout.embedding or not _in_order(_groups(tensor, layout, device), layout):
        return None
    return _coded(tensor, layout, start, stop, device)


def _coded(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> Coded:
    """Outputs `start` up to `stop` as if their groups were in order."""
    import torch

    words = packing.turned(packing.load_columns(tensor.stored, start, stop, device))  # (rows, words)
    if layout.planar:
        codes, table = _unpack(words, layout, layout.inputs).to(torch.uint8).view(-1), None
    else:
        codes, table = packing.integers(words, layout.bits, layout.inputs)
    zeros = _zeros(tensor, layout, start, stop, device).t().to(torch.float32)  # (rows, G)
    scales = packing.load_columns(tensor.part("scales"), start, stop, device).t().to(torch.float32)  # (rows, G)
    return Coded(codes, table, scales.contiguous(), layout.group_size or layout.inputs, zeros.contiguous())


def _in_order(groups: torch.Tensor, layout: Layout) -> bool:
    return layout.group_size is not None and packing.in_order(groups, layout.group_size)


def _decode_tokens(
    tensor: LogicalTensor, layout: Layout, groups: torch.Tensor, start: int, stop: int, device: str
) -> torch.Tensor:
    import torch

    codes, outputs = _token_codes(tensor, layout, start, stop, device), (0, tensor.columns)  # (rows, N)
    zeros = _zeros(tensor, layout, *outputs, device)[groups[start:stop]]  # (rows, N)
    scales = packing.load_columns(tensor.part("scales"), *outputs, device).to(torch.float32)  # (G, N)
    return (codes - zeros).to(torch.float32).mul_(scales[groups[start:stop]])


def _check_decodable(tensor: LogicalTensor, layout: Layout) -> None:
    if layout.repacked_for:
        what = f"may be repacked for `{layout.repacked_for}`: read the checkpoint, or load it with TorchLinear"
    elif layout.planar is None:
        what = f"{layout.bits}-bit codes may run on as a stream or lie in planes, and no config says which"
    elif layout.zero_offset is None:
        what = "zero points may be stored as they are or less one, and no config says which (see `gptq.readings`)"
    elif layout.group_size is None and not tensor.has("g_idx"):
        what = f"has no `g_idx`, and no config says which group size has {tensor.part('scales').shape[0]:,} groups"
    else:
        return
    raise NotDecodable(what, tensor=tensor.name)


def _groups(tensor: LogicalTensor, layout: Layout, device: str) -> torch.Tensor:
    """The group of each input."""
    import torch

    if not tensor.has("g_idx"):
        assert layout.group_size is not None
        return torch.arange(layout.inputs, device=device) // layout.group_size
    g_idx, limit = tensor.part("g_idx"), tensor.part("scales").shape[0]
    groups = g_idx.load(device=device).to(torch.int64)
    if len(groups) and (int(groups.min()) < 0 or int(groups.max()) >= limit):
        span = f"{int(groups.min())} to {int(groups.max())}"
        raise FormatError(f"names groups {span} (0 to {limit - 1} have scales)", tensor=g_idx.name)
    return groups


def _unpack(words: torch.Tensor, layout: Layout, count: int) -> torch.Tensor:
    """The first `count` codes of each row of words, from a stream or from planes."""
    if not layout.planar:
        return packing.unpack_words(words, layout.bits, count)
    blocks = words.reshape(len(words), words.shape[1] // layout.bits, layout.bits)  # (rows, blocks of 32 codes, bits)
    codes = words.new_zeros((*blocks.shape[:2], 32))
    word, shift = 0, 0
    for width in PLANES[layout.bits]:
        codes |= packing.unpack_words(blocks[:, :, word : word + width], width, 32) << shift
        word, shift = word + width, shift + width
    return codes.flatten(1)[:, :count]


def _token_codes(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    """The codes of some tokens: whole words of 64 codes are read around them."""
    first, words = start // 64 * 64, BITS[tensor.stored.dtype]
    low, high = first * layout.bits // words, min(-(-stop // 64) * 64 * layout.bits // words, tensor.stored.shape[0])
    rows = tensor.stored.load(low * tensor.columns, max(low, high) * tensor.columns, device).view(-1, tensor.columns)
    return _unpack(rows.t(), layout, stop - first).t()[start - first :]


def _zeros(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    """The zero points of outputs `start` up to `stop`, whole words of 64 fields read around them."""
    import torch

    qzeros = tensor.part("qzeros")
    first, word = start // 64 * 64, BITS[qzeros.dtype]
    low, high = first * layout.bits // word, min(-(-stop // 64) * 64 * layout.bits // word, qzeros.shape[1])
    words = packing.load_columns(qzeros, low, max(low, high), device)
    if layout.zero_offset and layout.bits in (2, 4, 8):
        words = words + sum(1 << shift for shift in range(0, word, layout.bits))  # carries run on, as in GPTQModel
    zeros = _unpack(words, layout, stop - first)
    if layout.zero_offset and layout.bits not in (2, 4, 8):
        zeros = (zeros + 1) & ((1 << layout.bits) - 1)
    return zeros[:, start - first :].to(torch.int32)


def _said(quantization: Mapping[str, Any], qweight: str) -> Said:
    method = quantization.get("quant_method")
    if method is not None and method not in METHODS:
        raise FormatError(f"fits no layout of quant_method `{method}` (as GPTQ it would be read)", tensor=qweight)
    symmetric = quantization.get("sym")
    planes, offset = _label(quantization, qweight) if quantization else (None, None)
    return Said(
        quantization_config.each(quantization, "bits", "wbits", "w_bit"),
        quantization_config.each(quantization, "group_size"),
        symmetric if isinstance(symmetric, bool) else None,
        planes,
        offset,
    )


def _label(quantization: Mapping[str, Any], qweight: str) -> tuple[frozenset[int], int | None]:
    """The widths that lie in planes, and what is subtracted from zero points, as the config labels them."""
    if str(quantization.get("quant_method")).endswith("auto-round"):
        return frozenset(), _label_of_auto_round(quantization, qweight)
    label = quantization.get("checkpoint_format", quantization.get("format"))
    if (label is not None and not isinstance(label, str)) or label not in VERSIONS:
        known = ", ".join(f"`{name}`" for name in VERSIONS if name)
        raise FormatError(f"has the shapes of GPTQ, but checkpoint_format is `{label}` ({known})", tensor=qweight)
    return frozenset(PLANES) - (frozenset() if label == "gptq_p" else {3}), VERSIONS[label]


def _label_of_auto_round(quantization: Mapping[str, Any], qweight: str) -> int | None:
    """What auto-round subtracts; old files name a backend instead of a format, which says less."""
    label = str(quantization.get("packing_format", quantization.get("backend", "auto_round:auto_gptq")))
    if label == "auto_round" or "gptqmodel" in label:
        return 0
    if "gptq" in label or label == "auto":
        return 1
    if "packing_format" in quantization or "awq" in label:
        raise FormatError(f"has the shapes of GPTQ, but packing_format is `{label}`", tensor=qweight)
    return None


def _layout(parts: Mapping[str, StoredTensor], said: Said, record: Mapping[str, Any], prefix: str) -> Layout:
    if record.get("repacked_for"):
        return _repacked(parts, said, record)
    _check_matrices(parts)
    bits, inputs = _bits(parts, said, record)
    group_size = _group_size(parts, said, inputs, record)
    planar, offset, decided_by = _convention(parts["qzeros"], parts["scales"].shape[1], bits, said, record)
    if planar and (inputs % 32 or parts["scales"].shape[1] % 32):
        what = f"{bits}-bit planes hold 32 codes each, not {inputs:,} inputs and {parts['scales'].shape[1]:,} outputs"
        raise FormatError(what, tensor=parts["qweight"].name)
    embedding = record.get("embedding") or prefix[prefix.rfind(".") + 1 :] in EMBEDDINGS
    return Layout(bits, inputs, group_size, planar, offset, decided_by, embedding)


def _repacked(parts: Mapping[str, StoredTensor], said: Said, record: Mapping[str, Any]) -> Layout:
    """A kernel may have moved its codes about: the module still knows its size."""
    inputs, bits = record.get("inputs"), record.get("bits")
    outputs = parts["scales"].shape[-1]
    qweight = parts["qweight"]
    if type(inputs) is not int or type(bits) is not int or qweight.nbytes * 8 != inputs * outputs * bits:
        rule = f"{inputs} inputs of {bits} bits and {outputs:,} outputs, as `{record['repacked_for']}` says"
        raise FormatError(f"{list(qweight.shape)} does not hold {rule}", tensor=qweight.name)
    return Layout(bits, inputs, record.get("group_size"), None, None, None, False, str(record["repacked_for"]))


def _check_matrices(parts: Mapping[str, StoredTensor]) -> None:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    for stored in (qweight, qzeros, scales):
        if len(stored.shape) != 2:
            raise FormatError(f"{list(stored.shape)} is not a matrix", tensor=stored.name)
    if scales.shape[1] != qweight.shape[1] or scales.dtype not in ("F16", "BF16", "F32"):
        rule = f"one for each of the {qweight.shape[1]:,} columns of `qweight`"
        raise FormatError(f"{scales.dtype} {list(scales.shape)} is not float scales, {rule}", tensor=scales.name)
    if qzeros.shape[0] != scales.shape[0] or qzeros.dtype != qweight.dtype:
        rule = f"{qweight.dtype} with {scales.shape[0]:,} rows, one per group of `scales`"
        raise FormatError(f"{qzeros.dtype} {list(qzeros.shape)} is not {rule}", tensor=qzeros.name)


def _bits(parts: Mapping[str, StoredTensor], said: Said, record: Mapping[str, Any]) -> tuple[int, int]:
    """The number of bits and of inputs that fit all shapes and what is said."""
    qweight, qzeros, g_idx = parts["qweight"], parts["qzeros"], parts.get("g_idx")
    if g_idx is not None and (g_idx.dtype not in ("I32", "I64") or len(g_idx.shape) != 1):
        raise FormatError(f"{g_idx.dtype} {list(g_idx.shape)} is not one group for each input", tensor=g_idx.name)
    (rows, outputs), word = qweight.shape, BITS[qweight.dtype]
    fitting = {}
    for bits in range(2, 9):
        inputs = g_idx.shape[0] if g_idx is not None else rows * word // bits // 32 * 32
        if rows == -(-inputs * bits // word) and qzeros.shape[1] == -(-outputs * bits // word):
            fitting[bits] = inputs
    wanted = {record["bits"]} if type(record.get("bits")) is int else said.bits
    allowed = [bits for bits in fitting if bits in wanted or not wanted]
    if len(allowed) != 1:
        shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in ("qzeros", "g_idx") if part in parts)
        says = f"{' or '.join(map(str, sorted(wanted)))}-bit" if wanted else "2- to 8-bit"
        raise FormatError(
            f"{qweight.dtype} {list(qweight.shape)} with {shapes} is not {says} GPTQ", tensor=qweight.name
        )
    return allowed[0], fitting[allowed[0]]


def _group_size(parts: Mapping[str, StoredTensor], said: Said, inputs: int, record: Mapping[str, Any]) -> int | None:
    """The group size that gives as many groups as there are scales; without a config, the power of two that does."""
    scales = parts["scales"]
    groups = scales.shape[0]
    wanted = {record["group_size"]} if type(record.get("group_size")) is int else said.groups
    sizes = {inputs if size == -1 else size for size in wanted} or {inputs, *(2**power for power in range(4, 11))}
    fitting = sorted(size for size in sizes if size > 0 and -(-inputs // size) == groups)
    if wanted and not fitting:
        rule = f"group_size {' or '.join(map(str, sorted(wanted)))} over {inputs:,} inputs"
        raise FormatError(f"has {groups:,} groups (not {rule})", tensor=scales.name)
    if groups == 1:
        return inputs
    return fitting[0] if len(fitting) == 1 else None


def _convention(
    qzeros: StoredTensor, outputs: int, bits: int, said: Said, record: Mapping[str, Any]
) -> tuple[bool | None, int | None, str | None]:
    """Whether codes lie in planes, what is subtracted from zero points, and who says so."""
    planar = _planar(bits, said, record)
    if record.get("zero_offset") is not None:
        return planar, record["zero_offset"], "module"
    if said.symmetric is not False and not record.get("meta"):
        seen = _symmetric(qzeros, outputs, bits, planar)
        if seen is not None:
            return *seen, "data"
    if said.zero_offset is None:
        return planar, None, None
    return planar, 0 if planar else said.zero_offset, "label"


def _planar(bits: int, said: Said, record: Mapping[str, Any]) -> bool | None:
    if bits not in PLANES:
        return False
    if isinstance(record.get("planar"), bool):
        return bool(record["planar"])
    return None if said.planes is None else bits in said.planes


def _symmetric(qzeros: StoredTensor, outputs: int, bits: int, planar: bool | None) -> tuple[bool, int] | None:
    """What the first zero points say where they are those of a symmetric weight: planes, and what is subtracted."""
    count = min(outputs, 32)
    raw = qzeros.source.read(qzeros.offset, qzeros.offset + -(-count * bits // 8)) if qzeros.shape[0] else b""
    stored = int.from_bytes(raw, "little") & ((1 << count * bits) - 1)
    for planes in (False, True) if planar is None else (planar,):
        for offset in (1, 0):
            if stored == _uniform(bits, planes, 2 ** (bits - 1) - offset, count):
                return planes, offset
    return None


@lru_cache
def _uniform(bits: int, planes: bool, value: int, count: int) -> int:
    """What `count` fields of one value look like, as one little-endian number.

    >>> hex(_uniform(4, False, 7, 8))
    '0x77777777'
    """
    packed, shift, start = 0, 0, 0
    for width in PLANES[bits] if planes else (bits,):
        field = (value >> shift) & ((1 << width) - 1)
        packed |= sum(field << (start + width * at) for at in range(count))
        shift, start = shift + width, start + 32 * width
    return packed


def _floor_db(layout: Layout) -> float | None:
    size = layout.group_size or layout.inputs
    return next((floor for bits, group, floor in FLOORS_DB if layout.bits == bits and size <= group), None)


def _rounding(
    parts: Mapping[str, StoredTensor], layout: Layout, said: Said, record: Mapping[str, Any]
) -> Rounding | None:
    """Without `g_idx`: groups that activation order scattered are as wide as others."""
    if layout.repacked_for:
        return None
    size, scale = layout.group_size or layout.inputs, rounding.kept_in(parts["scales"])
    symmetric = said.symmetric is not False and not record.get("meta")
    if symmetric and _symmetric(parts["qzeros"], parts["scales"].shape[1], layout.bits, layout.planar):
        to_code = rounding.symmetric(layout.bits, scale=scale)
    else:
        to_code = rounding.affine(layout.bits, scale=scale)
    if layout.embedding:
        return rounding.tiled(to_code, size, 1, margin_db=rounding.COMPENSATED_DB)
    return rounding.grouped(to_code, size, margin_db=rounding.COMPENSATED_DB)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


SCHEME = Scheme(
    name="gptq",
    title="GPTQ (2 to 8 bits, act-order; also auto-round)",
    variants=("gptq",),
    claim=claim,
    anchors=("qweight", "qzeros"),
    methods=METHODS,
    live={
        ":qweight": buffer_linear.expose,
        "gptqmodel.TorchInt8Linear": buffer_linear.expose,
        "gptqmodel.TorchInt8AwqLinear": buffer_linear.expose,
    },
    refuse=refuse,
    alternatives=alternatives,
    coders={decode: coded},
    source="GPTQModel 7.6.0, nn_modules/qlinear and utils; auto-round 0.16.1, auto_round_extension/torch",
    verified="GPTQModel 7.6.0, auto-round 0.16.1",
)
