"""Output heads that repeat the embedding of their model: they count once, the copy is dead weight.

A config.json that says `tie_word_embeddings` names the pair. ONNX and GGUF files say nothing of it: there the values
decide. Exporters write a tied head as a matrix of its own, turned, and quantizers then encode it without the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from pytest_quantcheck import content
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import Container, LogicalTensor

# Output heads that models tie to their input embedding, and the last two components of such embeddings.
HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "generator_lm_head.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
    "tok_embeddings.weight",
)
SILENT = ("onnx", "gguf")  # containers that do not say what is tied
TABLE_MIN = 1 << 12  # values
TABLES = 4  # more matrices that share the longest dimension are layers


class _Pair(NamedTuple):
    embedding: LogicalTensor
    head: LogicalTensor


def mark(tensors: list[LogicalTensor], container: Container) -> tuple[list[LogicalTensor], list[Finding]]:
    """Return the tensors with copies of the embedding as `tied`, and what there is to say about them."""
    config = container.configs.get("config.json", {})
    if container.kind == "live" or config.get("tie_word_embeddings", container.kind in SILENT) is not True:
        return tensors, []
    copies: dict[str, str] = {}
    findings: list[Finding] = []
    for pair in _pairs(tensors, container):
        # Nearly every GGUF has a head of its own, in another type than the embedding: nothing worth torch.
        same = content.same_values(*pair, decoded=container.kind != "gguf")
        if same:
            copies[pair.head.stored.name] = pair.embedding.name
        findings += _said(pair, same, configured="tie_word_embeddings" in config, kind=container.kind)
    return [_tied(tensor, copies) for tensor in tensors] if copies else tensors, findings


def _tied(tensor: LogicalTensor, copies: dict[str, str]) -> LogicalTensor:
    original = copies.get(tensor.stored.name)
    return tensor if original is None else tensor._replace(role="tied", copy_of=original)


def _pairs(tensors: list[LogicalTensor], container: Container) -> Iterator[_Pair]:
    """The embedding with each tensor that may be its copy."""
    found = _tables(tensors) if container.kind == "onnx" else _named(tensors)
    for other in found[1:]:
        if other.role != "tied" and content.fits(found[0], other):
            yield _Pair(found[0], other)


def _named(tensors: list[LogicalTensor]) -> list[LogicalTensor]:
    """The embedding and the head, by their names."""
    found = [next((t for t in tensors if t.name.endswith(names)), None) for names in (EMBEDDINGS, HEADS)]
    return [tensor for tensor in found if tensor] if all(found) else []


def _tables(tensors: list[LogicalTensor]) -> list[LogicalTensor]:
    """The matrices along the vocabulary, the longest dimension of all; the embedding first, heads last."""
    matrices = [tensor for tensor in tensors if tensor.role == "parameter" and len(tensor.shape) == 2]
    longest = max((max(tensor.shape) for tensor in matrices), default=0)
    found = [tensor for tensor in matrices if max(tensor.shape) == longest and prod(tensor.shape) >= TABLE_MIN]
    if len(found) > TABLES:
        return []
    return sorted(found, key=lambda tensor: (not tensor.name.endswith(EMBEDDINGS), tensor.name.endswith(HEADS)))


def _said(pair: _Pair, same: bool | None, *, configured: bool, kind: str) -> Iterator[Finding]:
    embedding, head = pair
    if same:
        why = ", to which config.json ties it" if configured else ""
        what = f"repeats `{embedding.name}`{why}: {head.nbytes:,} bytes could be saved"
        yield Finding("duplicate-tensor", "warning", head.name, what)
    elif same is None and (configured or kind == "onnx"):
        what = f"may repeat `{embedding.name}`: telling takes torch to decode them; both are counted"
        yield Finding("tied-weights", "note", head.name, what)
    elif configured:
        what = f"differs from `{embedding.name}`, but config.json says tie_word_embeddings: a loader drops one of them"
        yield Finding("tied-weights", "warning", head.name, what)
