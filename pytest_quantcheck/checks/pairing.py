"""Which tensor of a reference an artifact's tensor is compared with, by name, and how the two are brought to one shape.

    q_proj, k_proj, v_proj      one `qkv_proj` on the other side: rows one below the other
    gate_proj, up_proj          one `gate_up_proj`
    experts.0.gate_proj ...     one stack `experts.gate_proj` or `experts.gate_up_proj`, [experts, rows, columns]
    w1, w3, w2                  what Mixtral's files call gate_proj, up_proj and down_proj
    [in, out]                   a Conv1D, or experts whose outputs come last: turned

The reference is cut and put together to the shape of the artifact, never the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.views import Piece, assembled, outputs
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import format_shape
from pytest_quantcheck.tensor import COUNTED, LogicalTensor

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
RENAMES = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts(?:\.[0-9]+)?)\.w1(?=\.|$)"), r"\1.gate_proj"),
    (re.compile(r"(\.experts(?:\.[0-9]+)?)\.w3(?=\.|$)"), r"\1.up_proj"),
    (re.compile(r"(\.experts(?:\.[0-9]+)?)\.w2(?=\.|$)"), r"\1.down_proj"),
)
# Models whose fused experts have gate and up in turn, column by column.
INTERLEAVED = frozenset({"gpt_oss"})
_EXPERT = re.compile(r"(.*\.experts)\.([0-9]+)\.([^.]+)\.weight", re.DOTALL)
_STACK = re.compile(r"(.*\.experts)\.([^.]+?)(?:\.weight)?", re.DOTALL)


class Pair(NamedTuple):
    """A tensor and what it is compared with: a tensor, or a view of several, of the same shape."""

    tensor: LogicalTensor
    reference: LogicalTensor


class Pairing(NamedTuple):
    """What is compared with what, and a finding for everything that has no counterpart."""

    pairs: tuple[Pair, ...]
    findings: tuple[Finding, ...]


def pair(artifact: Artifact, reference: Artifact) -> Pairing:
    """Return each parameter of the artifact beside what the reference has there."""
    sides = _sides(artifact, reference)
    pairs: list[Pair] = []
    findings: list[Finding] = []
    used: set[str] = set()
    for tensor in _written(artifact):
        pieces = _counterpart(tensor, sides)
        if not pieces and tensor.copy_of:
            pieces = _counterpart(tensor._replace(name=tensor.copy_of), sides)
        used |= {piece.tensor.name for piece in pieces}
        if not pieces:
            findings.append(_unmatched(tensor))
        elif sum(piece.rows for piece in pieces) != outputs(tensor) or not _fits(tensor, pieces):
            findings.append(Finding("shape", "error", tensor.name, _shapes(tensor, pieces)))
        else:
            pairs.append(Pair(tensor, assembled(tensor.name, tensor.shape, pieces)))
    return Pairing(tuple(pairs), (*findings, *_left_over(reference, used)))


def _written(artifact: Artifact) -> Iterator[LogicalTensor]:
    """The parameters, and copies of them that have values of their own: a tied head that was quantized."""
    return (tensor for tensor in artifact.tensors if tensor.role in COUNTED or tensor.copy_of)


class _Side:
    """The tensors of one side by the names that all sides share."""

    def __init__(self, tensors: Iterable[tuple[str, LogicalTensor]], interleaved: bool) -> None:
        self.tensors: dict[str, LogicalTensor] = {}
        for name, tensor in tensors:
            self.tensors.setdefault(canonical(name), tensor)
        self.interleaved = interleaved
        self.prefixes: tuple[str, ...] = ()

    def get(self, name: str) -> LogicalTensor | None:
        """The tensor of that name; a prefix that only one side has (`model.`, `bert.`) is bridged."""
        found = self.tensors.get(name)
        for prefix in self.prefixes if found is None else ():
            found = self.tensors.get(prefix + name) or self.tensors.get(name.removeprefix(prefix))
            if found is not None:
                break
        return found


class _Sides(NamedTuple):
    ours: _Side
    theirs: _Side


def canonical(name: str) -> str:
    """Return the name that all sides share.

    >>> canonical("model.layers.0.block_sparse_moe.experts.3.w1.weight")
    'model.layers.0.mlp.experts.3.gate_proj.weight'
    """
    for pattern, there in RENAMES:
        name = pattern.sub(there, name)
    return name


def _sides(artifact: Artifact, reference: Artifact) -> _Sides:
    tensors = {tensor.name: tensor for tensor in reference.tensors if tensor.role in ("parameter", "tied")}
    aliases = {alias: tensors[first] for alias, first in reference.aliases.items() if first in tensors}
    interleaved = reference.configs.get("config.json", {}).get("model_type") in INTERLEAVED
    ours = _Side(((tensor.name, tensor) for tensor in artifact.parameters), interleaved=False)
    theirs = _Side([*tensors.items(), *aliases.items()], interleaved)
    theirs.prefixes = tuple(
        dict.fromkeys(name.partition(".")[0] + "." for name in [*ours.tensors, *theirs.tensors] if "." in name)
    )
    return _Sides(ours, theirs)


def _counterpart(tensor: LogicalTensor, sides: _Sides) -> tuple[Piece, ...]:
    """The pieces of the reference that a tensor is compared with; none where it has no counterpart."""
    name = canonical(tensor.name)
    same = sides.theirs.get(name)
    if same is not None:
        return (_oriented(tensor, same),)
    stack = _STACK.fullmatch(name)
    if stack and len(tensor.shape) == 3:
        experts = (f"{stack[1]}.{number}.{stack[2]}.weight" for number in range(tensor.shape[0]))
        return _joined(_matrix(expert, tensor.columns, sides) for expert in experts)
    return _matrix(name, tensor.columns, sides)


def _oriented(tensor: LogicalTensor, same: LogicalTensor) -> Piece:
    """All of a tensor, turned where one side has a Conv1D as its model keeps it and the other has not."""
    if tensor.transposed != same.transposed and same.shape == tensor.shape[::-1]:
        return Piece(same, 0, same.columns, turned=same.rows)
    return Piece(same, 0, outputs(same))


def _matrix(name: str, columns: int, sides: _Sides) -> tuple[Piece, ...]:
    """The pieces of the matrix (or bias) of that name: itself, the parts it is fused from, or its share of a fusion."""
    found = _whole(name, columns, sides.theirs)
    if found is not None:
        return (found,)
    module, _, last = name.rpartition(".")
    owner, _, leaf = module.rpartition(".")
    if leaf in FUSED:
        return _joined(_matrix(f"{owner}.{part}.{last}", columns, sides) for part in FUSED[leaf])
    for fused, parts in FUSED.items():
        whole = _whole(f"{owner}.{fused}.{last}", columns, sides.theirs) if leaf in parts else None
        if whole is not None:
            return _share(whole, leaf, [_rows_of(f"{owner}.{part}.{last}", sides.ours) for part in parts], parts, sides)
    return ()


def _share(
    whole: Piece, leaf: str, sizes: list[int | None], parts: tuple[str, ...], sides: _Sides
) -> tuple[Piece, ...]:
    """The rows of one part within the fusion; none where the parts do not add up to it."""
    at = parts.index(leaf)
    if sides.theirs.interleaved and whole.turned is not None and len(parts) == 2:
        return (whole._replace(start=whole.start + at, step=2),)
    known = [size for size in sizes if size is not None]
    if len(known) != len(sizes) or sum(known) != whole.rows:
        return ()
    return (whole.part(sum(known[:at]), known[at]),)


def _whole(name: str, columns: int, side: _Side) -> Piece | None:
    """The matrix of that name, as a tensor of its own or as one expert of a stack."""
    tensor = side.get(name)
    if tensor is not None:
        return Piece(tensor, 0, outputs(tensor))
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return None
    stack = side.get(f"{expert[1]}.{expert[3]}") or side.get(f"{expert[1]}.{expert[3]}.weight")
    number = int(expert[2])
    if stack is None or len(stack.shape) != 3 or number >= stack.shape[0]:
        return None
    rows = stack.shape[1]
    if columns == rows != stack.columns:  # outputs last
        return Piece(stack, 0, stack.columns, turned=rows, matrix=number * rows)
    return Piece(stack, number * rows, (number + 1) * rows)


def _rows_of(name: str, side: _Side) -> int | None:
    """The rows that a matrix of our side has, alone or as one expert of a stack."""
    tensor = side.get(name)
    if tensor is not None:
        return outputs(tensor)
    expert = _EXPERT.fullmatch(name)
    stack = expert and (side.get(f"{expert[1]}.{expert[3]}") or side.get(f"{expert[1]}.{expert[3]}.weight"))
    return stack.shape[1] if stack and len(stack.shape) == 3 else None


def _joined(found: Iterator[tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """All pieces one below the other; none where one of them is missing."""
    pieces: list[Piece] = []
    for some in found:
        if not some:
            return ()
        pieces += some
    return tuple(pieces)


def _fits(tensor: LogicalTensor, pieces: tuple[Piece, ...]) -> bool:
    """Whether every piece is as wide as the tensor; a tensor that is compared whole has its very shape."""
    if len(pieces) == 1 and pieces[0].whole:
        return pieces[0].tensor.shape == tensor.shape
    if len(tensor.shape) == 1:
        return all(len(piece.tensor.shape) == 1 for piece in pieces)
    return all((piece.turned or piece.tensor.columns) == tensor.columns for piece in pieces)


def _shapes(tensor: LogicalTensor, pieces: tuple[Piece, ...]) -> str:
    there = " and ".join(dict.fromkeys(format_shape(piece.tensor.shape) for piece in pieces))
    return f"is {format_shape(tensor.shape)}, the reference has {there}"


def _unmatched(tensor: LogicalTensor) -> Finding:
    if tensor.role == "adapter":
        return Finding("not-compared", "note", tensor.name, "is an adapter: the reference has none")
    severity: Literal["error", "warning"] = "error" if tensor.quantized else "warning"
    return Finding("not-compared", severity, tensor.name, "is not in the reference")


def _left_over(reference: Artifact, used: set[str]) -> Iterator[Finding]:
    for tensor in reference.parameters:
        if tensor.name not in used:
            yield Finding("not-compared", "warning", tensor.name, "is in the reference only")
