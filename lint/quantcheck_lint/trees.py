"""Small questions asked of libcst trees. Walks are iterative and skip white space, which libcst's visitors don't."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import libcst as cst

TRIVIA = frozenset({"__slots__", "lpar", "rpar", "lbracket", "rbracket", "lbrace", "rbrace", "header", "footer"})
TRIVIA_PREFIXES = ("whitespace", "comma", "semicolon", "colon", "trailing_whitespace", "leading_lines", "lines_after")


# What a field may hold beside nodes and sequences of them. libcst's own `isinstance` is slow: its nodes are abstract.
_SCALARS = frozenset({str, bool, type(None), cst.MaybeSentinel})


@cache
def _fields(kind: type[cst.CSTNode]) -> tuple[str, ...]:
    return tuple(
        name for name in kind.__dataclass_fields__ if name not in TRIVIA and not name.startswith(TRIVIA_PREFIXES)
    )


def children(node: cst.CSTNode) -> list[cst.CSTNode]:
    """The nodes below `node` in source order, white space and punctuation left out."""
    found: list[cst.CSTNode] = []
    for name in _fields(type(node)):
        value = getattr(node, name)
        kind = type(value)
        if kind is tuple or kind is list:
            found += value
        elif kind not in _SCALARS:
            found.append(value)
    return found


def walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """`node` and everything below it, parents first."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack += reversed(children(current))


def dotted(node: cst.CSTNode) -> str | None:
    """`a.b.c` for a name or a chain of attributes, `None` for anything else."""
    parts: list[str] = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    if not isinstance(node, cst.Name):
        return None
    parts.append(node.value)
    return ".".join(reversed(parts))


def called(node: cst.CSTNode) -> str:
    """The last name of what a call calls: `numel` for `p.data.numel()`, an empty string where there is none."""
    if not isinstance(node, cst.Call):
        return ""
    if isinstance(node.func, cst.Attribute):
        return node.func.attr.value
    return node.func.value if isinstance(node.func, cst.Name) else ""


def arguments(call: cst.Call) -> list[cst.BaseExpression]:
    """The positional arguments that are not starred."""
    return [arg.value for arg in call.args if arg.keyword is None and not arg.star]


def keyword(call: cst.Call, name: str) -> cst.BaseExpression | None:
    """The value given to the keyword `name`."""
    return next((arg.value for arg in call.args if arg.keyword is not None and arg.keyword.value == name), None)


def words(node: cst.CSTNode) -> Iterator[str]:
    """Every identifier and string literal under `node`, strings with their quotes."""
    for below in walk(node):
        if type(below) is cst.Name or type(below) is cst.SimpleString:
            yield below.value


def number(node: cst.CSTNode) -> float | None:
    """The value of an arithmetic expression over literals (`1024 ** 2`, `-4`, `1e6`)."""
    if isinstance(node, (cst.Integer, cst.Float)):
        try:
            return float(node.evaluated_value)
        except OverflowError:
            return None
    if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Minus):
        value = number(node.expression)
        return None if value is None else -value
    if not isinstance(node, cst.BinaryOperation):
        return None
    left, right = number(node.left), number(node.right)
    if left is None or right is None:
        return None
    return _arithmetic(node.operator, left, right)


def _arithmetic(operator: cst.BaseBinaryOp, left: float, right: float) -> float | None:
    try:
        match operator:
            case cst.Multiply():
                return left * right
            case cst.Divide() | cst.FloorDivide():
                return left / right
            case cst.Power():
                # A complex root or a number out of range is no unit of memory.
                return float(left**right) if abs(right) < 64 else None
            case cst.Add():
                return left + right
            case cst.Subtract():
                return left - right
    except (OverflowError, TypeError, ZeroDivisionError):
        return None
    return None


def names(node: cst.CSTNode, value: str) -> bool:
    """Whether the identifier `value` is read or written under `node`."""
    return any(type(below) is cst.Name and below.value == value for below in walk(node))


def requires_grad(node: cst.CSTNode) -> bool | None:
    """What a condition asks of `requires_grad`: true, false, or `None` when it asks something else or less."""
    match node:
        case cst.Attribute(attr=cst.Name(value="requires_grad")):
            return True
        case cst.UnaryOperation(operator=cst.Not()):
            inner = requires_grad(node.expression)
            return None if inner is None else not inner
        case cst.BooleanOperation(operator=cst.And()):
            sides = (requires_grad(node.left), requires_grad(node.right))
            return next((side for side in sides if side is not None), None)
        case cst.Comparison(
            comparisons=[cst.ComparisonTarget(operator, cst.Name(value=("True" | "False") as constant))]
        ):
            inner = requires_grad(node.left)
            asks_true = (constant == "True") != isinstance(operator, (cst.NotEqual, cst.IsNot))
            return None if inner is None else inner == asks_true
        case cst.Call(args=[cst.Arg(value=value)]) if called(node) in {"int", "bool", "float"}:
            return requires_grad(value)
        case cst.Call() if called(node) == "getattr":
            return True if any(word.strip("'\"") == "requires_grad" for word in words(node)) else None
    return None


def scopes(module: cst.Module) -> Iterator[list[cst.CSTNode]]:
    """The nodes of the module and of every function, each without the functions inside."""
    pending: list[cst.CSTNode] = [module]
    while pending:
        inside: list[cst.CSTNode] = []
        stack = list(children(pending.pop()))
        while stack:
            node = stack.pop()
            inside.append(node)
            if isinstance(node, cst.FunctionDef):
                pending.append(node)
            else:
                stack.extend(children(node))
        yield inside
