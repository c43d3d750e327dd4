"""The terminal output of `quantcheck why` and `quantcheck diff`: sizes in GB and GiB, 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from pytest_quantcheck.checks.cost import Cost
from pytest_quantcheck.checks.diff import Difference, TensorChange, Total
from pytest_quantcheck.checks.tree import Node
from pytest_quantcheck.checks.why import Explanation, Kind, Reason
from pytest_quantcheck.errors import printable
from pytest_quantcheck.quantities import counted, format_binary_size, format_count, format_size, format_sizes
from pytest_quantcheck.report import durations
from pytest_quantcheck.report.terminal import open_console

INDENT = " " * 34
RUNS = 3

WHAT: dict[Kind, str] = {
    "codes": "codes",
    "higher_bits": "codes above {bits} bits",
    "embedding": "unquantized embedding",
    "head": "unquantized output head",
    "matrices": "unquantized matrices",
    "vectors": "norms, biases and other vectors",
    "adapters": "adapters",
    "outliers": "plain weights beside codes",
    "scales": "scales",
    "zero_points": "zero points",
    "codebooks": "codebooks",
    "index": "indices",
    "bookkeeping": "records beside weights",
    "block_padding": "padding of blocks",
    "typed_fields": "values in typed fields",
    "rope_tables": "rope tables",
    "masks": "masks and position ids",
    "buffers": "other buffers",
    "tied_head": "duplicated tied head",
    "copies": "copies of other tensors",
    "shadows": "full copies of packed weights",
    "alignment": "alignment",
    "tokenizer": "tokenizer files",
    "files": "configuration and other files",
    "headers": "headers and metadata",
    "stale_files": "stale or duplicate files",
    "dead": "bytes that no tensor uses",
}
_MANY = {"embedding": "unquantized embeddings", "head": "unquantized output heads"}
_PLAIN: tuple[Kind, ...] = ("embedding", "head", "matrices", "vectors", "adapters")
_FILES: tuple[Kind, ...] = ("tokenizer", "files", "stale_files")

Line = tuple[str, str]  # text and style


def print_explanation(explanation: Explanation, root: Node) -> None:
    """Print the size that was expected, the reasons for the one it has, what it costs to use, and the tree."""
    print_lines(_headline(explanation))
    print_lines([("", ""), (f"{'share':>6}  {'bytes':>10}{'':>13}  reason", "bold")])
    for reason in explanation.reasons:
        print_lines(_reason_lines(reason, explanation))
    print_lines([("", ""), *_cost_lines(explanation.cost)])
    if root.children:
        print_lines([("", ""), *_tree_lines(root)])


def print_difference(difference: Difference, limit: int) -> None:
    """Print the totals, the classes and at most `limit` tensors, the rest summed."""
    size, params = difference.file_bytes, difference.logical_params
    print_lines([(printable(f"{difference.old_source} -> {difference.new_source}"), "bold")])
    print_lines([(f"bytes       {format_sizes(size.old)} -> {format_sizes(size.new)}, {_grown(size)}", "")])
    same = ", the same" if params.old == params.new else f" -> {format_count(params.new)}, {params.growth:+,}"
    print_lines([(f"parameters  {format_count(params.old)}{same}", "")])
    print_lines([("", ""), *_class_lines(difference)])
    print_lines([("", ""), *_change_lines(difference, limit)])


def _headline(explanation: Explanation) -> Iterator[Line]:
    size = explanation.file_bytes
    yield printable(f"{explanation.source} ({explanation.container})"), "bold"
    yield f"size        {format_sizes(size)}, {size:,} bytes", ""
    yield f"parameters  {format_count(explanation.logical_params)}", ""
    halves, words = explanation.bytes_in_16_bit, explanation.bytes_in_32_bit
    if explanation.bits is None or explanation.expected_bytes is None:
        yield f"in 16 bit   {format_sizes(halves)}: nothing is quantized", ""
        yield f"in 32 bit   {format_sizes(words)}", ""
        return
    bits, expected = f"{float(explanation.bits):.4g}", explanation.expected_bytes
    yield f"expected    {format_sizes(expected)}: every parameter in {bits} bits", ""
    yield f"            {bits}/16 of {format_sizes(halves)} in 16 bit", ""
    yield f"            {bits}/32 of {format_sizes(words)} in 32 bit", ""
    over = size - expected
    yield f"measured    {format_sizes(abs(over))} {'more' if over >= 0 else 'less'} than that", ""
    yield f"codes       {explanation.code_bytes / (size or 1):.1%} of the file", ""


def _reason_lines(reason: Reason, explanation: Explanation) -> Iterator[Line]:
    bits = None if explanation.bits is None else float(explanation.bits)
    words = what(reason.kind, reason.holders, reason.dtypes, bits)
    yield f"{reason.share:6.1%}  {columns(reason.bytes)}  {words}", ""
    yield from ((f"{INDENT}{name}", "dim") for name in _whose(reason))
    for saving in reason.savings:
        yield f"{INDENT}saves up to {format_sizes(saving.bytes)}:", "green"
        yield f"{INDENT}  {saving.how}", "green"


def what(kind: Kind, holders: int, dtypes: Sequence[str], bits: float | None) -> str:
    """Return a reason in words; `bits` are those of the codes."""
    width = "" if bits is None else f"{bits:.4g}"
    if kind == "codes":
        return f"codes of {width} bits, {counted(holders, 'tensor')}"
    words = (_MANY.get(kind, WHAT[kind]) if holders > 1 else WHAT[kind]).format(bits=width)
    return f"{words}, {'/'.join(dtypes)}" if kind in _PLAIN and dtypes else words


def _whose(reason: Reason) -> Iterator[str]:
    """The tensors or files where they are few, else how many they are."""
    if not reason.holders or reason.kind == "codes":
        return
    if reason.holders <= len(reason.names) and reason.kind not in ("codebooks", "bookkeeping", "vectors"):
        for name, original in zip_longest(reason.names, reason.originals):
            yield printable(name)
            if original:
                yield f"  repeats {printable(original)}"
        return
    yield counted(reason.holders, "file" if reason.kind in _FILES else "tensor")


def _cost_lines(cost: Cost) -> Iterator[Line]:
    if cost.downloads:
        times = [f"{durations.duration(link.seconds)} at {durations.speed(link.megabits)}" for link in cost.downloads]
        yield f"download    {', '.join(times[:2])},", ""
        yield f"            {', '.join(times[2:])}: the link alone", ""
    end = "" if cost.largest_decoded else ";"
    yield f"load        {format_sizes(cost.load)} at least: weights as stored{end}", ""
    if cost.largest_decoded:
        yield f"            and the largest quantized matrix in 16 bit, {format_sizes(cost.largest_decoded)};", ""
    yield "            not in it: KV cache, activations, the context of the device", ""
    smallest = next((fit for fit in cost.gpus if fit.fits), None)
    if smallest is None:
        largest = cost.gpus[-1]
        yield f"fits        no single GPU: {largest.gpu} lacks {format_binary_size(-largest.left)}", ""
        return
    yield f"fits        {smallest.gpu} and larger, with {format_binary_size(smallest.left)} left for that", ""


def _tree_lines(root: Node) -> Iterator[Line]:
    yield f"{'share':>6}  {'bytes':>10}{'':>13}  where", "bold"
    yield from _branch_lines(root, root.bytes or 1, 0)


def _branch_lines(node: Node, whole: int, level: int) -> Iterator[Line]:
    for child in node.children:
        name = printable(f"{'  ' * level}{_name(child)}")
        yield f"{child.bytes / whole:6.1%}  {columns(child.bytes)}  {name}", "" if child.children else "dim"
        yield from _branch_lines(child, whole, level + 1)


def _name(node: Node) -> str:
    """Its name and how many it stands for, where the name does not say it; of many runs of layers the first few."""
    runs = node.name.split(", ") if node.level == "layers" else [node.name]
    if node.number == 1 or (len(runs) == 1 and " to " in node.name):
        return node.name
    more = " ..." if len(runs) > RUNS else ""
    return f"{', '.join(runs[:RUNS])}{more} x {node.number:,}"


def _class_lines(difference: Difference) -> Iterator[Line]:
    yield f"{'growth':>12}{'':>13}  class", "bold"
    grown = [(kind, total) for kind, total in difference.classes.items() if total.old or total.new]
    for kind, total in sorted(grown, key=lambda row: -row[1].growth):
        yield f"{_growth(total.growth)}  {kind:<12} {format_size(total.old):>10} -> {format_size(total.new)}", ""


def _change_lines(difference: Difference, limit: int) -> Iterator[Line]:
    shown, rest = difference.tensors[:limit], difference.tensors[limit:]
    if shown:
        yield f"{'growth':>12}{'':>13}  tensor", "bold"
    for change in shown:
        yield f"{_growth(change.growth)}  {printable(change.name)}", "red" if change.growth > 0 else ""
        yield f"{'':>27}{_became(change)}", "dim"
    if rest:
        yield f"{_growth(sum(change.growth for change in rest))}  in {counted(len(rest), 'more tensor')}", ""
    if difference.outside.growth:
        yield f"{_growth(difference.outside.growth)}  outside of tensors: headers, padding, other files", ""
    yield f"{counted(difference.unchanged, 'tensor')} stored as before", ""


def _became(change: TensorChange) -> str:
    old = f"{change.old_scheme} {format_size(change.old_bytes)}" if change.old_scheme else ""
    new = f"{change.new_scheme} {format_size(change.new_bytes)}" if change.new_scheme else ""
    return f"{change.change}: {' -> '.join(filter(None, (old, new)))}"


def _growth(size: int) -> str:
    sign = "+" if size > 0 else ""
    return f"{sign + format_size(size):>12}  {sign + format_binary_size(size):>11}"


def columns(size: int) -> str:
    """Return bytes in both units, aligned."""
    return f"{format_size(size):>10}  {format_binary_size(size):>11}"


def _grown(total: Total) -> str:
    share = f" ({total.growth / total.old:+.1%})" if total.old else ""
    return f"{signed(total.growth)}{share}"


def signed(size: int) -> str:
    """Return a growth in bytes, with its sign."""
    return f"{'+' if size > 0 else ''}{format_size(size)}"


def print_lines(lines: Iterable[Line]) -> None:
    """Print lines, styled where the output is a terminal."""
    terminal = open_console()
    for text, style in lines:
        if terminal is None:
            print(text)
        else:
            from rich.text import Text

            terminal.print(Text(text, style=style), soft_wrap=True)
