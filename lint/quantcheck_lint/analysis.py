"""One parsed module, and what rules ask of it: places, source code and positions of nodes."""

from __future__ import annotations

from functools import cached_property

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider

from quantcheck_lint.flow import Flow


class Analysis:
    """A piece of a source that libcst has parsed. Everything else is computed when it is first asked for."""

    def __init__(self, text: str, source: str) -> None:
        self.module = cst.parse_module(text)
        self._source = source

    @cached_property
    def flow(self) -> Flow:
        """Where sizes of tensors are read and added up."""
        return Flow(self.module, self._source)

    @cached_property
    def _positions(self) -> dict[cst.CSTNode, CodeRange]:
        # The wrapper copies the tree unless it is told that no node occurs twice, which holds for what was just parsed.
        wrapper = MetadataWrapper(self.module, unsafe_skip_copy=True)
        return dict(wrapper.resolve(PositionProvider))

    def code(self, node: cst.CSTNode) -> str:
        """The source of a node, in one line."""
        return " ".join(self.module.code_for_node(node).split())

    def position(self, node: cst.CSTNode) -> CodeRange:
        """Where a node is: lines from 1, columns from 0."""
        return self._positions[node]
