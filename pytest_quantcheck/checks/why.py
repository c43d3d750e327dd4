"""Why an artifact has the size it has: each byte under one reason, and what of it could be saved.

The size people expect is the bits of the codes for every logical parameter: a 4-bit model is 4/16 of the model in
16 bit and 4/32 of the model in 32 bit. Whatever lies above has a reason, and savings are arithmetic on measured bytes:
what a tensor would weigh in 16 bit, or at the bits per weight that the quantized tensors of this artifact have. The
records beside the codes (a few bytes a tensor) are left out of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import ceil
from typing import Literal, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks import cost, integrity
from pytest_quantcheck.containers.remote import is_url
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part
from pytest_quantcheck.ties import EMBEDDINGS, HEADS

Kind = Literal[
    "codes",
    "higher_bits",
    "embedding",
    "head",
    "matrices",
    "vectors",
    "adapters",
    "outliers",
    "scales",
    "zero_points",
    "codebooks",
    "index",
    "bookkeeping",
    "block_padding",
    "typed_fields",
    "rope_tables",
    "masks",
    "buffers",
    "tied_head",
    "copies",
    "shadows",
    "alignment",
    "tokenizer",
    "files",
    "headers",
    "stale_files",
    "dead",
]

# What the bytes of a class are where a quantized tensor has them, and where no tensor has.
_IN_TENSOR: dict[ByteClass, Kind] = {
    "codes": "codes",
    "scales": "scales",
    "zero_points": "zero_points",
    "codebooks": "codebooks",
    "index": "index",
    "unquantized": "outliers",
    "buffers": "buffers",
    "bookkeeping": "bookkeeping",
    "metadata": "typed_fields",
    "padding": "block_padding",
    "dead": "dead",
}
_OUTSIDE: dict[ByteClass, Kind] = {**_IN_TENSOR, "metadata": "headers", "padding": "alignment"}

_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|tok_embeddings|token_embd|position_embd|shared)(\.weight)?$")
_HEAD = re.compile(r"^output(\.weight)?$|(^|\.)(lm_head|embed_out|output_projection|generator_lm_head)(\.weight)?$")
_ROPE = re.compile(r"cos|sin|inv_freq|rope|rotary", re.IGNORECASE)
_MASK = re.compile(r"mask|position_ids|token_type_ids|attn\.bias$", re.IGNORECASE)
_MADE_AT_LOAD = re.compile(r"(cos|sin)_cache|(cos|sin)_cached|inv_freq|position_ids|mask|attn\.bias$")
_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|spiece|sentencepiece|special_tokens|added_tokens|chat_template|tekken)\S*|\S+\.tiktoken"
)
# Formats that say how long a block is and what its scale is.
_FIXED_SCALES = re.compile(r"^(ggml|bnb)-|mxfp|nvfp|nvint|if4|fp8-mx")
_HALF_MIN = 32  # bits from which a plain number has a 16-bit form
_NESTED_BLOCK, _NESTED_MAP = 256, 1024  # bitsandbytes: scales that share a scale, bytes of their code table


class Saving(NamedTuple):
    """At most so many bytes fewer, and by what."""

    bytes: int
    how: str


class Reason(NamedTuple):
    """Bytes of the artifact that are there for one reason.

    `names` are the tensors or files that have them, at most three of them; `holders` is how many there are. Of copies,
    `originals` are what each of `names` repeats. `savings` are alternatives, the largest first.
    """

    kind: Kind
    bytes: int
    share: float
    holders: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    savings: tuple[Saving, ...]
    originals: tuple[str | None, ...] = ()

    @property
    def could_save(self) -> int:
        """What the best of the savings leaves out."""
        return self.savings[0].bytes if self.savings else 0


class Explanation(NamedTuple):
    """Where the bytes of an artifact are. The reasons, largest first, sum to `file_bytes`.

    `bits` are those of the codes of most quantized parameters; None, like `expected_bytes`, where nothing is
    quantized. `code_bytes` are all codes, those of copies and of higher bits included.
    """

    source: str
    container: str
    file_bytes: int
    logical_params: int
    bits: Fraction | None
    bytes_in_16_bit: int
    bytes_in_32_bit: int
    expected_bytes: int | None
    code_bytes: int
    reasons: tuple[Reason, ...]
    cost: cost.Cost


class _Base(NamedTuple):
    """The encoding most quantized parameters have: bits of a code, and bits of a weight with all that belongs to it."""

    code_bits: Fraction
    weight_bits: Fraction


class _Share(NamedTuple):
    """Bytes of one tensor or file that are there for one reason."""

    kind: Kind
    bytes: int
    name: str
    dtype: str | None = None
    savings: tuple[Saving, ...] = ()
    original: str | None = None


def explain(artifact: Artifact) -> Explanation:
    """Return the size people expect of an artifact, and the reasons for the size it has."""
    base = _base(artifact.parameters)
    params = artifact.logical_params
    repeated = () if is_url(artifact.source) else integrity.repeated(artifact)  # telling takes all their bytes
    copies = {copy.name: first.name for first, copy in repeated}
    shares = [share for tensor in artifact.tensors for share in _of_tensor(tensor, base, copies.get(tensor.name))]
    shares += _outside(artifact)
    return Explanation(
        artifact.source,
        artifact.container,
        artifact.file_bytes,
        params,
        base and base.code_bits,
        2 * params,
        4 * params,
        ceil(params * base.code_bits / 8) if base else None,
        sum(tensor.bytes.get("codes", 0) for tensor in artifact.tensors if tensor.quantized),
        _reasons(shares, artifact.file_bytes),
        cost.felt(artifact),
    )


def _base(parameters: Iterable[LogicalTensor]) -> _Base | None:
    """The encoding of most quantized parameters, tensors whose codes have the same bits taken together."""
    params: Counter[float] = Counter()
    codes: Counter[float] = Counter()
    whole: Counter[float] = Counter()
    for tensor in parameters:
        if tensor.quantized and tensor.params:
            if not (found := tensor.bytes.get("codes", 0)):
                continue  # grids that are written as plain numbers
            bits = round(8 * found / tensor.params, 1)
            params[bits] += tensor.params
            codes[bits] += found
            whole[bits] += tensor.nbytes
    if not params:
        return None
    (usual, count), *_ = params.most_common(1)
    return _Base(_tidy(Fraction(8 * codes[usual], count)), Fraction(8 * whole[usual], count))


def _tidy(bits: Fraction) -> Fraction:
    """Whole bits where only the last byte of odd tensors is in the way."""
    nearest = Fraction(round(bits))
    return nearest if abs(bits - nearest) < Fraction(1, 1000) else bits


def _of_tensor(tensor: LogicalTensor, base: _Base | None, first: str | None) -> Iterator[_Share]:
    """The bytes of one tensor by reason; `first` is the tensor whose bytes it repeats."""
    size = tensor.nbytes
    if first is not None or tensor.role == "tied":
        kind: Kind = "tied_head" if _is_head(tensor.name) else "copies"
        original = first if first is not None else tensor.copy_of
        yield _Share(kind, size, tensor.name, _dtype(tensor), (Saving(size, "stored once"),), original)
    elif tensor.role == "shadow":
        yield _Share("shadows", size, tensor.name, _dtype(tensor), (Saving(size, "left out: the model reads another"),))
    elif tensor.role == "buffer":
        yield _buffer(tensor)
    elif tensor.quantized:
        yield from _encoded(tensor, base)
    else:
        yield from _plain(tensor, base)


def _buffer(tensor: LogicalTensor) -> _Share:
    kind: Kind = "rope_tables" if _ROPE.search(tensor.name) else "masks" if _MASK.search(tensor.name) else "buffers"
    made = (Saving(tensor.nbytes, "computed at load"),) if _MADE_AT_LOAD.search(tensor.name) else ()
    return _Share(kind, tensor.nbytes, tensor.name, _dtype(tensor), made)


def _plain(tensor: LogicalTensor, base: _Base | None) -> Iterator[_Share]:
    name, dtype = tensor.name, _dtype(tensor)
    surplus = tensor.bytes.get("metadata", 0)
    size = tensor.nbytes - surplus
    yield _Share(plain_kind(tensor), size, name, dtype, tuple(_plain_savings(tensor, size, base)))
    if surplus:
        yield _Share("typed_fields", surplus, name, dtype, (Saving(surplus, "in raw_data"),))


def plain_kind(tensor: LogicalTensor) -> Kind:
    """Return what an unquantized parameter is: embedding, head, vectors, matrices or adapters."""
    if tensor.role == "adapter":
        return "adapters"
    if len(tensor.shape) < 2:
        return "vectors"
    if _is_head(tensor.name):
        return "head"
    return "embedding" if tensor.name.endswith(EMBEDDINGS) or _EMBEDDING.search(tensor.name) else "matrices"


def _is_head(name: str) -> bool:
    return name.endswith(HEADS) or _HEAD.search(name) is not None


def _plain_savings(tensor: LogicalTensor, size: int, base: _Base | None) -> Iterator[Saving]:
    if base and len(tensor.shape) >= 2 and tensor.role != "adapter":
        bits = base.weight_bits
        saved = size - ceil(tensor.params * bits / 8)
        yield Saving(saved, f"quantized like the rest, {float(bits):.4g} bits a weight")
    if DTYPES[tensor.stored.dtype].kind == "float" and DTYPES[tensor.stored.dtype].bits >= _HALF_MIN:
        yield Saving(size - 2 * tensor.params, "in 16 bit")


def _encoded(tensor: LogicalTensor, base: _Base | None) -> Iterator[_Share]:
    for part in tensor.parts:
        for kind, size in part.bytes:
            if kind == "codes":
                continue
            yield _Share(
                _IN_TENSOR[kind], size, tensor.name, part.stored.dtype, tuple(_part_savings(tensor, part, kind, size))
            )
    codes = tensor.bytes.get("codes", 0)
    usual = codes if base is None else min(codes, ceil(tensor.params * base.code_bits / 8))
    yield _Share("codes", usual, tensor.name)
    if codes > usual and base:
        how = f"in {float(base.code_bits):.4g} bits like the rest"
        yield _Share("higher_bits", codes - usual, tensor.name, None, (Saving(codes - usual, how),))


def _part_savings(tensor: LogicalTensor, part: Part, kind: ByteClass, size: int) -> Iterator[Saving]:
    if kind == "padding":
        yield Saving(size, "blocks that divide the row")
    if kind == "metadata":
        yield Saving(size, "in raw_data")
    if kind == "index" and part.name.endswith("g_idx"):
        yield Saving(size, "without act-order")
    if kind == "zero_points" and not tensor.scheme.startswith("ggml-"):
        yield Saving(size, "symmetric codes")
    if kind == "scales":
        yield from _scale_savings(tensor, part, size)


def _scale_savings(tensor: LogicalTensor, part: Part, size: int) -> Iterator[Saving]:
    if tensor.scheme in ("bnb-nf4", "bnb-fp4"):
        scales = part.stored.elements
        nested = scales + 4 * -(-scales // _NESTED_BLOCK) + _NESTED_MAP
        if part.name == "absmax" and part.stored.dtype == "F32":
            yield Saving(size - nested, "double quantization")
        return
    if _FIXED_SCALES.search(tensor.scheme):
        return
    if part.stored.dtype == "F32":
        yield Saving(size - size // 2, "in 16 bit")
    if tensor.block and tensor.block < tensor.columns:
        yield Saving(size // 2, "blocks twice as long")


def _outside(artifact: Artifact) -> Iterator[_Share]:
    """The bytes that no tensor has: files beside the weights, headers, alignment."""
    left = dict(artifact.overhead)
    for file in artifact.beside:
        left[file.kind] -= file.nbytes
        if file.kind == "dead":
            saved = Saving(file.nbytes, "deleted: no part of this checkpoint")
            yield _Share("stale_files", file.nbytes, file.name, None, (saved,))
        else:
            kind: Kind = "tokenizer" if _TOKENIZER.fullmatch(file.name.rpartition("/")[2]) else "files"
            yield _Share(kind, file.nbytes, file.name)
    for name, size in left.items():
        saving = (Saving(size, "left out: no tensor uses them"),) if name == "dead" else ()
        yield _Share(_OUTSIDE[name], size, "", None, saving)


def _reasons(shares: Iterable[_Share], file_bytes: int) -> tuple[Reason, ...]:
    by_kind: dict[Kind, list[_Share]] = {}
    for share in shares:
        if share.bytes:
            by_kind.setdefault(share.kind, []).append(share)
    found = [_reason(kind, same, file_bytes) for kind, same in by_kind.items()]
    return tuple(sorted(found, key=lambda reason: -reason.bytes))


def _reason(kind: Kind, shares: list[_Share], file_bytes: int) -> Reason:
    size = sum(share.bytes for share in shares)
    largest = sorted(shares, key=lambda share: -share.bytes)
    names = tuple(dict.fromkeys(share.name for share in largest if share.name))
    copied = {share.name: share.original for share in shares if share.original}
    kinds = tuple(sorted({share.dtype for share in shares if share.dtype}))
    saved: Counter[str] = Counter()
    for share in shares:
        for saving in share.savings:
            saved[saving.how] += max(0, saving.bytes)
    savings = tuple(Saving(saving, how) for how, saving in saved.most_common() if saving)
    originals = tuple(copied.get(name) for name in names[:3]) if copied else ()
    return Reason(kind, size, size / file_bytes, len(names), names[:3], kinds, savings, originals)


def _dtype(tensor: LogicalTensor) -> str:
    return tensor.stored.dtype
