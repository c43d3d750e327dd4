"""Logical tensors made of others: rows put together or cut out, matrices turned, rows and columns scaled.

A view has a shape and decodes like any tensor, in windows, so that what is compared always has one shape on both sides.

    piece     rows `start` up to `stop` of a tensor (of a vector: its values), every `step`-th of them
    turned    the tensor holds matrices `[turned, rows]` where the view has `[rows, turned]`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

WINDOW = 1 << 22  # values decoded at a time where a matrix is turned


class Piece(NamedTuple):
    """Rows of a tensor. Those of a turned matrix are its columns; `matrix` is the first stored row of it."""

    tensor: LogicalTensor
    start: int
    stop: int
    step: int = 1
    turned: int | None = None
    matrix: int = 0

    @property
    def rows(self) -> int:
        """The number of rows it gives."""
        return len(range(self.start, self.stop, self.step))

    @property
    def whole(self) -> bool:
        """Whether it is all of its tensor, as it is."""
        return self[1:] == (0, outputs(self.tensor), 1, None, 0)

    def part(self, offset: int, rows: int) -> Piece:
        """Return `rows` of its rows, from `offset`."""
        start = self.start + offset * self.step
        return self._replace(start=start, stop=min(self.stop, start + rows * self.step))


class Scaled(NamedTuple):
    """A tensor whose values are multiplied by a factor for each column, or each row."""

    tensor: LogicalTensor
    factors: torch.Tensor  # (columns,) or (rows,) float32
    by_row: bool


def assembled(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> LogicalTensor:
    """Return the pieces, one below the other, as a tensor of that shape; a whole tensor as it is."""
    if len(pieces) == 1 and pieces[0].whole and pieces[0].tensor.shape == shape:
        return pieces[0].tensor
    return _view(name, shape, tuple(piece.tensor for piece in pieces), decode_pieces, pieces)


def scaled(tensor: LogicalTensor, factors: torch.Tensor, *, by_row: bool = False) -> LogicalTensor:
    """Return the tensor with each column (or row) multiplied by its factor."""
    return _view(tensor.name, tensor.shape, (tensor,), decode_scaled, Scaled(tensor, factors, by_row))


def is_view(tensor: LogicalTensor) -> bool:
    """Whether the tensor is made of others, so that its shape cannot be read in another way."""
    return tensor.decoder in (decode_pieces, decode_scaled)


def is_scaled(tensor: LogicalTensor) -> bool:
    """Whether the values are multiplied by factors, so that they are not those of the tensor to the bit."""
    return tensor.decoder is decode_scaled


def is_turned(tensor: LogicalTensor) -> bool:
    """Whether rows of the tensor are columns somewhere, so that many at once cost as much as one."""
    if isinstance(tensor.layout, Scaled):
        return is_turned(tensor.layout.tensor)
    return tensor.decoder is decode_pieces and any(piece.turned for piece in tensor.layout)  # type: ignore[attr-defined]


def decode_pieces(view: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of a view of pieces, reading no other rows of theirs."""
    import torch

    pieces: tuple[Piece, ...] = view.layout  # type: ignore[assignment]  # what `assembled` put there
    if len(view.shape) == 1:
        values = [piece.tensor.decode(device=device)[0, piece.start : piece.stop : piece.step] for piece in pieces]
        return torch.cat(values).view(1, -1)[start:stop]
    rows, found = 0, []
    for piece in pieces:
        first, last = max(start - rows, 0), min(stop - rows, piece.rows)
        rows += piece.rows
        if first < last:
            found.append(_rows(piece.part(first, last - first), device))
    return torch.cat(found) if found else torch.empty((0, view.columns), device=device)


def decode_scaled(view: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of a scaled tensor."""
    layout: Scaled = view.layout  # type: ignore[assignment]  # what `scaled` put there
    factors = layout.factors.to(device)
    values = layout.tensor.decode(start, stop, device)
    return values * (factors[start:stop, None] if layout.by_row else factors)


def _rows(piece: Piece, device: str) -> torch.Tensor:
    if piece.turned is None:
        return piece.tensor.decode(piece.start, piece.stop, device)[:: piece.step]
    return _turned(piece, piece.turned, device)


def _turned(piece: Piece, rows: int, device: str) -> torch.Tensor:
    """Return columns of a matrix of `rows` rows as rows, without decoding more of it at once than a window.

    ->  # (piece.rows, rows)
    """
    import torch

    tensor = piece.tensor
    turned = torch.empty((piece.rows, rows), dtype=torch.float32, device=device)
    if not (tensor.quantized or is_view(tensor) or tensor.paired_rows) and 8 * piece.rows < tensor.columns:
        cells = tensor._replace(shape=(tensor.params, 1))  # plain values: only these are read
        for row in range(rows):
            first = (piece.matrix + row) * tensor.columns
            turned[:, row] = cells.decode(first + piece.start, first + piece.stop, device)[:: piece.step, 0]
        return turned
    step = max(1, WINDOW // max(1, tensor.columns))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        window = tensor.decode(piece.matrix + first, piece.matrix + last, device)
        turned[:, first:last] = window[:, piece.start : piece.stop : piece.step].t()
    return turned


def _view(
    name: str,
    shape: tuple[int, ...],
    tensors: tuple[LogicalTensor, ...],
    decoder: object,
    layout: object,
) -> LogicalTensor:
    once = {id(tensor): tensor for tensor in tensors}.values()
    parts = tuple(part for tensor in once for part in tensor.parts)
    scheme = next((tensor.scheme for tensor in tensors if tensor.quantized), "plain")
    return LogicalTensor(name, shape, scheme, "parameter", parts, decoder, layout)  # type: ignore[arg-type]


def outputs(tensor: LogicalTensor) -> int:
    """The rows of a matrix or a stack; the values of a vector.

    It is what pieces are counted in.
    """
    return tensor.columns if len(tensor.shape) == 1 else tensor.rows
