"""AWQ, `gemm` version: codes and zero points packed along the outputs, four-bit codes interleaved by eight.

    part     dtype     stored shape        packing
    qweight  I32       [K, ceil(N*b/32)]   each row a stream of b-bit codes, lowest bits first
    qzeros   I32       [G, ceil(N*b/32)]   the same way
    scales   F16/BF16  [G, N]

Formula: w[n, k] = (code[k, n] - zero[k // g, n]) * scales[k // g, n], in float32, with g = K / G.
Source: AutoAWQ 0.2.9, awq/utils/packing_utils.py; GPTQModel 7.6.0, quantization/awq/utils/packing_utils.py; auto-round
0.16.1, auto_round/utils/bit_packing.py.

Interleaved: of every eight neighbours the stream holds 0, 2, 4, 6, 1, 3, 5, 7. Always so at 4 bits, never at 2, 3 and
8; at 5, 6 and 7 bits auto-round interleaves and GPTQModel doesn't.

No floor: AWQ moves part of each input channel's scale into the layer before, so its weights are not those of the
unquantized model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import buffer_linear, packing, quantization_config, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Reading, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "qweight": "codes",
    "qzeros": "zero_points",
    "scales": "scales",
    buffer_linear.RECORD: "bookkeeping",  # live only
}
AUTO_ROUND = ("auto-round", "intel/auto-round")
METHODS = ("awq", *AUTO_ROUND)
FROM_STREAM = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight neighbours lies in the stream


class Layout(NamedTuple):
    """How the codes of one weight are written; `interleaved` is None where nothing says."""

    bits: int
    group_size: int
    interleaved: bool | None
    repacked_for: str | None = None


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `qweight` belongs to, where its shapes are those of the gemm version."""
    prefix = anchor.name.removesuffix("qweight")
    if (namespace.quantization.get("quant_method") or "awq") not in METHODS or prefix[-1:] not in ("", "."):
        return None
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    record = buffer_linear.record(found.get(buffer_linear.RECORD))
    shape = _repacked(found, record) or _shape(found)
    if shape is None or not _may_be_awq(namespace.quantization, record):
        return None
    layout = _layout(found, shape, namespace.quantization, record)
    return LogicalTensor(
        f"{prefix}weight",
        shape,
        "awq",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        layout,
        block=layout.group_size,
        rounding=rounding.grouped(
            rounding.affine(layout.bits, scale=rounding.kept_in(found["scales"])),
            layout.group_size,
            margin_db=rounding.COMPENSATED_DB,
        ),
    )


def alternatives(tensor: LogicalTensor) -> Iterator[Reading]:
    """Yield the other order of codes: AWQ's interleaving done where it should not be, or not done."""
    layout = tensor.layout
    if not isinstance(layout, Layout) or layout.interleaved is None or layout.repacked_for:
        return
    if layout.bits != 4 and tensor.shape[0] % 32:
        return
    words = "codes in sequence" if layout.interleaved else "codes interleaved by eight"
    advice = f"the packer did {'not ' if layout.interleaved else ''}use AWQ's order"
    other = tensor._replace(layout=layout._replace(interleaved=not layout.interleaved))
    yield Reading("awq-order", words, other, advice)


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a matrix of scales in an AWQ checkpoint cannot be a weight: its codes are missing."""
    if stored.name.endswith(".scales") and len(stored.shape) == 2:
        return f"has no `{stored.name.removesuffix('scales')}qweight` beside it"
    return None


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    return packing.expand(coded(tensor, start, stop, device)).view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` as codes."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.repacked_for:
        what = f"may be repacked for `{layout.repacked_for}`: read the checkpoint, or load it with AwqTorchLinear"
        raise NotDecodable(what, tensor=tensor.name)
    if layout.interleaved is None:
        what = f"{layout.bits}-bit codes may be interleaved or not, and no config says which"
        raise NotDecodable(what, tensor=tensor.name)
    codes = _rows(tensor.stored, layout, start, stop, device)  # (rows, K)
    zeros = _rows(tensor.part("qzeros"), layout, start, stop, device).to(torch.float32)  # (rows, G)
    scales = packing.load_columns(tensor.part("scales"), start, stop, device).t().to(torch.float32)  # (rows, G)
    return Coded(codes.reshape(-1), None, scales.contiguous(), layout.group_size, zeros)


def _rows(stored: StoredTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    """The codes of outputs `start` up to `stop` as uint8; whole words of 32 codes are read around them."""
    import torch

    first = start // 32 * 32
    low, high = first * layout.bits // 32, min(-(-stop // 32) * layout.bits, stored.shape[1])
    words = packing.load_columns(stored, low, max(low, high), device)  # (K, words)
    if 32 % layout.bits == 0:
        order = FROM_STREAM if layout.interleaved else range(32 // layout.bits)
        codes = packing.fields(packing.turned(words), layout.bits, order)
        return codes[start - first : stop - first]
    codes = packing.unpack_words(words, layout.bits, words.shape[1] * 32 // layout.bits)
    if layout.interleaved:
        codes = codes.view(len(codes), codes.shape[1] // 8, 8)[:, :, list(FROM_STREAM)].flatten(1)
    return codes[:, start - first : stop - first].t().to(torch.uint8).contiguous()


def _shape(parts: Mapping[str, StoredTensor]) -> tuple[int, int] | None:
    """The shape of the weight, [N, K], or None where the shapes are those of another layout."""
    if not all(part in parts and len(parts[part].shape) == 2 for part in ("qweight", "qzeros", "scales")):
        return None
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    integers = qweight.dtype == qzeros.dtype == "I32" and scales.dtype in ("F16", "BF16", "F32")
    if not integers or qzeros.shape != (scales.shape[0], qweight.shape[1]) or qweight.shape[1] >= scales.shape[1]:
        return None
    return scales.shape[1], qweight.shape[0]


def _repacked(parts: Mapping[str, StoredTensor], record: Mapping[str, Any]) -> tuple[int, int] | None:
    """The shape of a weight whose kernel may have moved its codes about: the module still knows its size."""
    if not (record.get("awq") and record.get("repacked_for")):
        return None
    inputs, bits, qweight, scales = record["inputs"], record["bits"], parts.get("qweight"), parts.get("scales")
    if qweight is None or scales is None or qweight.nbytes * 8 != (inputs or 0) * scales.shape[-1] * (bits or 0):
        what = f"does not hold {inputs} inputs of {bits} bits, as `{record['repacked_for']}` says"
        raise FormatError(what, tensor=parts["qweight"].name if qweight else None)
    return scales.shape[-1], inputs


def _may_be_awq(quantization: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    method = quantization.get("quant_method")
    if method in AUTO_ROUND:
        return bool(record.get("awq")) or "awq" in str(quantization.get("packing_format", quantization.get("backend")))
    return True


def _layout(
    parts: Mapping[str, StoredTensor],
    shape: tuple[int, int],
    quantization: Mapping[str, Any],
    record: Mapping[str, Any],
) -> Layout:
    qweight, groups = parts["qweight"], parts["scales"].shape[0]
    outputs, inputs = shape
    if record.get("repacked_for"):
        return Layout(record["bits"], record.get("group_size") or inputs, None, str(record["repacked_for"]))
    fitting = [bits for bits in range(2, 9) if qweight.shape[1] == -(-outputs * bits // 32)]
    said = {record["bits"]} if record.get("bits") else quantization_config.each(quantization, "bits", "w_bit")
    allowed = [bits for bits in fitting if bits in said or not said]
    if len(allowed) != 1:
        says = f"{' or '.join(map(str, sorted(said)))}-bit" if said else "2- to 8-bit"
        what = f"I32 {list(qweight.shape)} with {outputs:,} outputs is not {says} AWQ"
        raise FormatError(what, tensor=qweight.name)
    _check_groups(parts["scales"], inputs, groups, quantization)
    return Layout(allowed[0], inputs // groups, _interleaved(allowed[0], quantization, record))


def _check_groups(scales: StoredTensor, inputs: int, groups: int, quantization: Mapping[str, Any]) -> None:
    said = quantization_config.each(quantization, "group_size", "q_group_size")
    wanted = {inputs if size == -1 else size for size in said}
    if not groups or inputs % groups or (wanted and inputs // groups not in wanted):
        rule = f"groups of {' or '.join(map(str, sorted(wanted)))}" if wanted else "equal groups"
        raise FormatError(f"has {groups:,} rows (not {rule} over {inputs:,} inputs)", tensor=scales.name)


def _interleaved(bits: int, quantization: Mapping[str, Any], record: Mapping[str, Any]) -> bool | None:
    if bits not in (5, 6, 7):
        return bits == 4
    if record:
        return bool(record["auto_round"])
    method = quantization.get("quant_method")
    return None if method is None else method in AUTO_ROUND


SCHEME = Scheme(
    name="awq",
    title="AWQ, gemm version (also auto-round)",
    variants=("awq",),
    claim=claim,
    anchors=("qweight",),
    methods=METHODS,
    live={":qweight": buffer_linear.expose},
    refuse=refuse,
    alternatives=alternatives,
    coders={decode: coded},
    source="AutoAWQ 0.2.9, awq/utils/packing_utils.py; GPTQModel 7.6.0, quantization/awq/utils/packing_utils.py",
    verified="GPTQModel 7.6.0, auto-round 0.16.1",
)
