"""A tree of bytes as nested rectangles: one view per branch, laid out by squarify.

A view shows a branch whole: its children, and inside of them theirs, as long as there is room to see them. Following a
child's link shows the view of the child. Every view is laid out twice, for wide pages and for phones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import squarify

from pytest_quantcheck.quantities import format_size

SHAPES = {"landscape": (1040.0, 520.0), "portrait": (360.0, 480.0)}  # width and height, in CSS pixels
MOST = 40  # children of one branch; the rest is one rectangle
LEAST_SHARE = 0.002  # of all bytes: what is smaller has no view of its own
STRIP = 18.0  # the height of a title
ROOM = (34.0, 30.0)  # width and height from which the inside is drawn
LETTER = 6.7


class Branch(NamedTuple):
    """A node of the tree as it is drawn: `kind` is the class most of its bytes are in, `view` where it is shown."""

    name: str
    bytes: int
    kind: str
    view: str | None
    children: tuple[Branch, ...]


class Cell(NamedTuple):
    """A rectangle of a view. `link` is the view that a click on it shows; `steps_in` is how deep it is nested."""

    x: float
    y: float
    width: float
    height: float
    branch: Branch
    share: float
    label: str
    size: str
    link: str | None
    steps_in: int

    @property
    def framed(self) -> bool:
        """Whether its children are drawn inside of it."""
        return bool(self.branch.children) and _has_room(self.width, self.height)


class View(NamedTuple):
    """One branch, whole: the branches that lead to it, itself last, and its cells in the order they are painted."""

    path: tuple[Branch, ...]
    cells: dict[str, tuple[Cell, ...]]


def views(tree: Mapping[str, Any], prefix: str) -> list[View]:
    """Return the views of a tree as `report.json` writes it; their names begin with `prefix`, the whole is first."""
    whole = tree["bytes"]
    if not whole or not tree["children"]:
        return []
    names = (f"{prefix}-{number}" for number in range(whole))
    return list(_views(_branch(tree, whole, names)._replace(name="all bytes"), whole, ()))


def _views(branch: Branch, whole: int, above: tuple[Branch, ...]) -> Iterator[View]:
    path = (*above, branch)
    cells = {
        shape: tuple(_cells(branch, (0, 0, width, height), whole, None, 0)) for shape, (width, height) in SHAPES.items()
    }
    yield View(path, cells)
    for child in branch.children:
        if child.view:
            yield from _views(child, whole, path)


def _branch(node: Mapping[str, Any], whole: int, names: Iterator[str]) -> Branch:
    """A node of one child is that child; children without bytes are not drawn."""
    name, number = node["name"], node["count"]
    while len(node["children"]) == 1:
        (node,) = node["children"]
        name, number = (name, number) if node["level"] == "part" else (node["name"], number * node["count"])
    several = f" × {number:,}" if number > 1 else ""
    is_large = node["children"] and node["bytes"] >= LEAST_SHARE * whole
    view = next(names) if is_large else None
    children = [_branch(child, whole, names) for child in node["children"] if child["bytes"]]
    return Branch(f"{name}{several}", node["bytes"], _kind(node), view, tuple(_few(children)))


def _few(children: list[Branch]) -> list[Branch]:
    """The largest, the rest as one."""
    if len(children) <= MOST:
        return children
    rest = children[MOST:]
    size = sum(branch.bytes for branch in rest)
    together = Branch(f"{len(rest):,} smaller", size, rest[0].kind, None, ())
    return sorted([*children[:MOST], together], key=lambda branch: -branch.bytes)


def _kind(node: Mapping[str, Any]) -> str:
    sizes: Counter[str] = Counter()
    _add_kinds(node, sizes)
    return max(sizes, key=lambda kind: sizes[kind])


def _add_kinds(node: Mapping[str, Any], sizes: Counter[str]) -> None:
    """The class is in the parentheses at the end of the name of a part, and of bytes outside of tensors."""
    if not node["children"]:
        sizes[node["name"].rpartition("(")[2].rstrip(")")] += node["bytes"]
    for child in node["children"]:
        _add_kinds(child, sizes)


def _cells(
    branch: Branch, place: tuple[float, float, float, float], whole: int, link: str | None, steps_in: int
) -> Iterator[Cell]:
    """The children of a branch in its place, and in theirs what there is room for."""
    x, y, width, height = place
    sizes = squarify.normalize_sizes([child.bytes for child in branch.children], width, height)
    for child, found in zip(branch.children, squarify.squarify(sizes, x, y, width, height), strict=True):
        target = child.view if steps_in == 0 else link
        cell = _cell(child, (found["x"], found["y"], found["dx"], found["dy"]), whole, target, steps_in)
        yield cell
        if cell.framed:
            inside = (cell.x + 2, cell.y + STRIP, cell.width - 4, cell.height - STRIP - 2)
            yield from _cells(child, inside, whole, target, steps_in + 1)


def _cell(
    branch: Branch, place: tuple[float, float, float, float], whole: int, link: str | None, steps_in: int
) -> Cell:
    x, y, width, height = place
    letters = int((width - 8) / LETTER)
    size = format_size(branch.bytes)
    label = _shortened(branch.name, letters) if height >= STRIP - 4 else ""
    below = size if height >= 2 * STRIP and len(size) <= letters else ""
    return Cell(x, y, width, height, branch, branch.bytes / whole, label, below, link, steps_in)


def _shortened(name: str, letters: int) -> str:
    if len(name) <= letters:
        return name
    return f"{name[: letters - 1]}…" if letters >= 5 else ""


def _has_room(width: float, height: float) -> bool:
    return width >= ROOM[0] and height >= ROOM[1] + STRIP
