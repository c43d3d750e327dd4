"""Where `from pytest_quantcheck import ...` goes: into the import that is there, or behind the leading imports.

Never before the docstring or `from __future__`, never under `if TYPE_CHECKING`, always before the first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider

from quantcheck_lint.finding import Edit
from quantcheck_lint.trees import dotted, walk

LIBRARY = "pytest_quantcheck"


class NameTaken(Exception):
    """The module uses a needed name for something else."""


def import_edits(text: str, names: Sequence[str], newline: str, before: int) -> list[Edit]:
    """The edits that make `names` of the library known to the code from line `before` on."""
    module = cst.parse_module(text)
    positions = MetadataWrapper(module, unsafe_skip_copy=True).resolve(PositionProvider)
    ours = [node for node in _leading_imports(module) if _is_ours(node) and positions[node].end.line < before]
    if any(isinstance(node.names, cst.ImportStar) for node in ours):
        return []
    known = {alias.evaluated_alias or alias.evaluated_name for node in ours for alias in _aliases(node)}
    missing = [name for name in names if name not in known]
    if _bound(module) & set(missing):
        raise NameTaken
    if not missing:
        return []
    if ours:
        return [_extended(module, ours[0], missing, positions[ours[0]])]
    return [_new_line(text, module, missing, newline, positions)]


def _leading_imports(module: cst.Module) -> list[cst.ImportFrom]:
    return [
        small
        for statement in module.body
        if isinstance(statement, cst.SimpleStatementLine)
        for small in statement.body
        if isinstance(small, cst.ImportFrom)
    ]


def _is_ours(node: cst.ImportFrom) -> bool:
    return not node.relative and node.module is not None and dotted(node.module) == LIBRARY


def _aliases(node: cst.ImportFrom) -> Sequence[cst.ImportAlias]:
    return () if isinstance(node.names, cst.ImportStar) else node.names


def _bound(module: cst.Module) -> set[str]:
    """Every name that the module binds somewhere, imports of the library left out."""
    found: set[str] = set()
    for node in walk(module):
        match node:
            case cst.FunctionDef() | cst.ClassDef() | cst.Param():
                found.add(node.name.value)
            case cst.AssignTarget() | cst.For() | cst.CompFor() | cst.NamedExpr() | cst.AnnAssign():
                found.update(_names_in(node.target))
            case cst.ImportFrom() if not _is_ours(node):
                found.update(alias.evaluated_alias or alias.evaluated_name for alias in _aliases(node))
            case cst.Import():
                found.update(alias.evaluated_alias or alias.evaluated_name for alias in node.names)
    return found


def _names_in(target: cst.CSTNode) -> Iterator[str]:
    """The names that an assignment to `target` binds: attributes and items are none."""
    if isinstance(target, cst.Name):
        yield target.value
    elif isinstance(target, (cst.Tuple, cst.List)):
        for element in target.elements:
            yield from _names_in(element.value)


def _extended(module: cst.Module, node: cst.ImportFrom, missing: Sequence[str], at: CodeRange) -> Edit:
    """The import with the missing names behind the last one, in the style it is written in."""
    aliases = list(_aliases(node))
    comma = aliases[-2].comma if len(aliases) > 1 else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    last = aliases[-1]
    added = [cst.ImportAlias(cst.Name(name), comma=comma) for name in missing]
    added[-1] = added[-1].with_changes(comma=last.comma)
    new = node.with_changes(names=[*aliases[:-1], last.with_changes(comma=comma), *added])
    return Edit(at.start.line, at.start.column, at.end.line, at.end.column, module.code_for_node(new))


def _new_line(
    text: str, module: cst.Module, missing: Sequence[str], newline: str, positions: Mapping[cst.CSTNode, CodeRange]
) -> Edit:
    """A line behind the leading imports; without any, behind docstring and `__future__`, before the first statement."""
    line = f"from {LIBRARY} import {', '.join(missing)}{newline}"
    last = _last_leading(module)
    if last is not None and _is_import(last):
        at = positions[last].end.line + 1
        return _insert(text, at, line, newline)
    if last is not None:
        return _insert(text, positions[last].end.line + 1, newline + line, newline)
    first = positions[module.body[0]].start.line
    return _insert(text, first, line + newline, newline)


def _insert(text: str, at: int, line: str, newline: str) -> Edit:
    """Insert before line `at`; a text that ends without a line end gets one first."""
    lines = text.count("\n") + 1 if "\n" in text else text.count("\r") + 1
    if at > lines:
        last = text.rpartition("\n")[2]
        return Edit(lines, len(last), lines, len(last), newline + line)
    return Edit(at, 0, at, 0, line)


def _last_leading(module: cst.Module) -> cst.CSTNode | None:
    """The last statement of the head of a module: docstring, then imports."""
    last: cst.CSTNode | None = None
    for i, statement in enumerate(module.body):
        is_docstring = i == 0 and module.get_docstring() is not None
        if not (is_docstring or _is_import(statement)):
            break
        last = statement
    return last


def _is_import(statement: cst.CSTNode) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and all(
        isinstance(small, (cst.Import, cst.ImportFrom)) for small in statement.body
    )
