"""An artifact as a tree: component, layer, tensor, part. Layers that look alike are one branch."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Literal, NamedTuple, get_args

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.layers import LAYER
from pytest_quantcheck.tensor import LogicalTensor

Level = Literal["artifact", "component", "layers", "tensor", "part"]
LEVELS: tuple[Level, ...] = get_args(Level)
DEPTH = LEVELS.index("part")
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


class Node(NamedTuple):
    """A branch and its bytes, which are the sum of those of its children, the largest first.

    `number` is how many layers, tensors or parts it stands for.
    """

    level: Level
    name: str
    bytes: int
    number: int = 1
    children: tuple[Node, ...] = ()


def tree(artifact: Artifact, depth: int = DEPTH) -> Node:
    """Return all bytes of an artifact: components, and at `depth` 2 their layers, at 3 tensors, at 4 parts.

    A component of one tensor is that tensor.
    """
    components: dict[str, list[LogicalTensor]] = {}
    for tensor in artifact.tensors:
        components.setdefault(_component(tensor.name), []).append(tensor)
    found = [_component_node(name, tensors) for name, tensors in components.items()]
    found += [Node("component", f"({kind})", size) for kind, size in artifact.overhead.items() if size]
    return _cut(_branch("artifact", artifact.source, found), depth)


def _component(name: str) -> str:
    """`model.layers` for what is in a layer, else the module that has the tensor."""
    match = LAYER.match(name)
    return match.group(1) if match else name.rpartition(".")[0] or name


def _component_node(component: str, tensors: list[LogicalTensor]) -> Node:
    layers: dict[int, list[LogicalTensor]] = {}
    for tensor in tensors:
        match = LAYER.match(tensor.name)
        layers.setdefault(int(match.group(2)) if match else -1, []).append(tensor)
    if len(tensors) == 1 and -1 in layers:
        return _branch("component", tensors[0].name, _parts(tensors))
    own = _tensor_nodes(layers.pop(-1, []), len(component) + 1)
    alike: dict[Hashable, list[int]] = {}
    for index, inside in sorted(layers.items()):
        alike.setdefault(_looks(inside), []).append(index)
    stacks = [_layers_node(component, indices, layers) for indices in alike.values()]
    return _branch("component", component, [*stacks, *own])


def _layers_node(component: str, indices: list[int], layers: dict[int, list[LogicalTensor]]) -> Node:
    """The layers of these indices as one, their tensors summed over them."""
    tensors = [tensor for index in indices for tensor in layers[index]]
    prefix = [len(f"{component}.{index}.") for index in indices for _ in layers[index]]
    return _branch("layers", f"{component}.{ranges(indices)}", _grouped(tensors, prefix), len(indices))


def _looks(tensors: list[LogicalTensor]) -> Hashable:
    """What two layers have in common where they are alike; records beside weights may differ by a digit."""
    return tuple(
        sorted((INDEX.sub("*", tensor.name), tensor.shape, tensor.scheme, tensor.stored.dtype) for tensor in tensors)
    )


def _tensor_nodes(tensors: list[LogicalTensor], prefix: int) -> list[Node]:
    return _grouped(tensors, [prefix if len(tensor.name) > prefix else 0 for tensor in tensors])


def _grouped(tensors: Iterable[LogicalTensor], prefixes: Iterable[int]) -> list[Node]:
    """One node for tensors of the same name but for their numbers: the experts of a layer, the siblings of a stack."""
    groups: dict[str, list[LogicalTensor]] = {}
    for tensor, prefix in zip(tensors, prefixes, strict=True):
        groups.setdefault(INDEX.sub("*", "." + tensor.name[prefix:])[1:], []).append(tensor)
    return [_branch("tensor", name, _parts(same), len(same)) for name, same in groups.items()]


def _parts(tensors: list[LogicalTensor]) -> list[Node]:
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            for kind, size in part.bytes:
                found = sizes.setdefault(f"{part.name} ({kind})", [0, 0])
                found[0] += size
                found[1] += 1
    return [Node("part", name, size, count) for name, (size, count) in sizes.items()]


def ranges(indices: list[int]) -> str:
    """Return sorted numbers as people write them.

    >>> ranges([0, 1, 2, 7, 9, 10])
    '0 to 2, 7, 9 to 10'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


def _branch(level: Level, name: str, children: list[Node], number: int = 1) -> Node:
    largest = tuple(sorted(children, key=lambda node: -node.bytes))
    return Node(level, name, sum(node.bytes for node in children), number, largest)


def _cut(node: Node, depth: int) -> Node:
    children = [_cut(child, depth) for child in node.children if LEVELS.index(child.level) <= depth]
    return node._replace(children=tuple(children))
