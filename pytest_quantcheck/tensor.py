"""The records that pass from containers over schemes to checks.

A container yields `StoredTensor`s and never interprets numbers. A scheme turns groups of them into
`LogicalTensor`s: what the unquantized model has there. A check sees only those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from pytest_quantcheck import dtypes
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.finding import Finding

if TYPE_CHECKING:
    import torch

ByteClass = Literal[
    "codes",
    "scales",
    "zero_points",
    "codebooks",
    "index",
    "unquantized",
    "buffers",
    "bookkeeping",
    "metadata",
    "padding",
    "dead",
]
BYTE_CLASSES: tuple[ByteClass, ...] = get_args(ByteClass)

# parameter: counts. adapter: counts, told apart (LoRA and its kin). tied: shares the values of a tensor that counts.
# buffer: never counts. shadow: a full copy that the model no longer uses. part: belongs to an encoded weight.
Role = Literal["parameter", "adapter", "tied", "buffer", "shadow", "part"]
COUNTED: tuple[Role, ...] = ("parameter", "adapter")
DEAD: tuple[Role, ...] = ("tied", "shadow")  # all their bytes are of the class `dead`


class Source(Protocol):
    """Where the bytes of stored tensors are."""

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes from `start` up to `stop`, counted from the start of the source."""

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` of a stored tensor, flat, in its torch dtype, on `device`."""


@runtime_checkable
class SourceOfPieces(Protocol):
    """A source that loads many small pieces faster at once than one by one."""

    def load_each(self, stored: StoredTensor, ranges: Sequence[tuple[int, int]], device: str) -> torch.Tensor:
        """Return the elements of some ranges of a stored tensor, one behind the other."""


class StoredTensor(NamedTuple):
    """One tensor of a container, as stored.

    `dtype` is the safetensors name; `shape` counts values, also where several share a byte (F4, F6).
    `nbytes` is what it weighs: a live part that several weights share weighs nothing the second time, and of a sharded
    tensor only what is here. `role` and `requires_grad` are known for live modules only. `whole` is the shape of the
    weight that all ranks have together where the stored parts are a shard of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Source
    offset: int = 0
    role: Role | None = None
    requires_grad: bool | None = None
    whole: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        """The number of stored values, which is what `numel()` says."""
        return math.prod(self.shape)

    @property
    def value_bytes(self) -> int:
        """The bytes that its values have where they are read; of a sparse tensor, the zeros that are not stored too."""
        return dtypes.nbytes(self.dtype, self.elements) if self.dtype in dtypes.DTYPES else self.nbytes

    @property
    def surplus(self) -> tuple[tuple[ByteClass, int], ...]:
        """The bytes beyond those of the values, as of another class: a protobuf may write each value as a varint."""
        more = self.nbytes - self.value_bytes
        return (("metadata", more),) if more > 0 else ()

    def read(self, *, limit: int) -> bytearray:
        """Return all bytes of a small tensor; over `limit` bytes is a `FormatError`."""
        size = dtypes.nbytes(self.dtype, self.elements)
        if size > limit:
            raise FormatError(f"{size:,} bytes where a small record belongs (limit {limit:,})", tensor=self.name)
        return self.source.read(self.offset, self.offset + size)

    def load(self, start: int = 0, stop: int | None = None, device: str = "cpu") -> torch.Tensor:
        """Return stored elements `start` up to `stop` as a flat tensor of the stored dtype on `device`."""
        return self.source.load(self, start, self.elements if stop is None else stop, device)

    def load_each(self, ranges: Sequence[tuple[int, int]], device: str = "cpu") -> torch.Tensor:
        """Return the stored elements of some ranges, one behind the other."""
        import torch

        if isinstance(self.source, SourceOfPieces):
            return self.source.load_each(self, ranges, device)
        return torch.cat([self.load(start, stop, device) for start, stop in ranges])

    def load_bytes(self, start: int = 0, stop: int | None = None, device: str = "cpu") -> torch.Tensor:
        """Return bytes `start` up to `stop` as a flat uint8 tensor on `device`, whatever dtype they are stored in."""
        raw = self._replace(dtype="U8", shape=(self.nbytes,))
        return self.source.load(raw, start, self.nbytes if stop is None else stop, device)


class Part(NamedTuple):
    """One stored tensor of an encoded weight: its name in the format, its byte class, and where it is.

    `between` are the bytes of other classes that are written between those of `kind`: the scales of ggml's blocks.
    """

    name: str
    kind: ByteClass
    stored: StoredTensor
    between: tuple[tuple[ByteClass, int], ...] = ()

    @property
    def bytes(self) -> tuple[tuple[ByteClass, int], ...]:
        """All its bytes, by class."""
        return (self.kind, self.stored.nbytes - sum(size for _, size in self.between)), *self.between


class Origin(NamedTuple):
    """What a converter made a tensor of: the name it has in the unquantized model, and what was done to its values.

    `paired_rows`: the rows of each head (so many) were written as pairs, row i of its first half beside row i of its
    second (llama.cpp does that to q and k). `transposed`: the unquantized model keeps the matrix the other way round.
    `shift`: what was added to every value.
    """

    name: str
    paired_rows: int | None = None
    transposed: bool = False
    shift: float = 0.0


Decoder = Callable[["LogicalTensor", int, int, str], "torch.Tensor"]
Coder = Callable[["LogicalTensor", int, int, str], "Coded | None"]
Cells = Callable[["LogicalTensor", int, int, int], list[float]]


Steps = Callable[["LogicalTensor", int, int, str], "torch.Tensor"]


class Rounding(NamedTuple):
    """How the values of a reference would be written in an encoding by rounding to nearest: what to expect of it.

    `nearest(tensor, values, largest)` takes rows of the reference, float32 `[rows, columns]`, and returns what they
    would decode to, with scales of their own; it is a module-level function. Windows must start and end at multiples
    of `rows` (a grid of blocks of 128 rows has 128). `whole` formats scale by the largest magnitude of the whole
    tensor, which is given as `largest`; for others it is None. `margin_db` is what a sound quantizer of this format may
    stay below rounding to nearest.

    `steps(tensor, start, stop, device)` returns, float32 `[rows, columns]`, twice how far a value may be from what is
    stored for it, were it rounded to nearest under the stored scales: no error is over half of it. It is infinite for a
    code at the end of a range that may clip. None where codes are not chosen one by one (GPTQ), or not known.

    `levels(largest)` says how blocks of `rows` rows and `size` columns are rounded, given the largest magnitude of
    each, float32 `[blocks, 1]`: for a loop that does it on the way. The last block of a row may be shorter. A `size`
    of 0 is all that is rounded at once. None where more must be known, or blocks run on across rows.
    """

    nearest: Callable[[LogicalTensor, torch.Tensor, float | None], torch.Tensor]
    rows: int = 1
    whole: bool = False
    margin_db: float = 1.5
    steps: Steps | None = None
    levels: Callable[[torch.Tensor], Levels] | None = None
    size: int = 1


class Integers(NamedTuple):
    """Integers from `low` to `high`; a half goes to the even one."""

    low: float
    high: float


class Floats(NamedTuple):
    """Floats up to `top` with so many bits of mantissa, subnormal below 2**least; a half goes to the even one."""

    top: float
    mantissa: int
    least: int
    dtype: str


class Levels(NamedTuple):
    """How blocks are rounded: w becomes `scale` times the one of `among` that is nearest to `w * step`.

    A table has the level nearest to each place of its range: w becomes `scale * among[w * step + entries / 2]`.

    steps, scales  # (blocks, 1) float32
    among          # (entries,) float32, an odd number, where it is a table
    """

    steps: torch.Tensor
    scales: torch.Tensor
    among: torch.Tensor | Integers | Floats


class Coded(NamedTuple):
    """Rows of values as codes, for a loop that decodes and compares at once; a `Coder` gives None where it cannot.

    Value i of a row is `((table[code i] - zeros[row, g]) * scales[row, g] + shifts[row, g]) * factor`, where g is
    i // size, in float32, each operation rounded; None is left out. Rows lie one behind the other.

    codes                  # (rows * columns / width,) uint8, each of `width` values, in their order
    table                  # (256, width) float32; None: the codes are the numbers, int8, uint8 or floats of one byte
    scales, zeros, shifts  # (rows, ceil(columns / size)) float32
    """

    codes: torch.Tensor
    table: torch.Tensor | None
    scales: torch.Tensor
    size: int
    zeros: torch.Tensor | None = None
    shifts: torch.Tensor | None = None
    factor: float = 1.0

    def rows(self, start: int, stop: int) -> Coded:
        """Return some of the rows, each of whole codes."""
        width, cut = len(self.codes) // max(1, len(self.scales)), slice(start, stop)
        zeros, shifts = (None if factors is None else factors[cut] for factors in (self.zeros, self.shifts))
        codes = self.codes[start * width : stop * width]
        return self._replace(codes=codes, scales=self.scales[cut], zeros=zeros, shifts=shifts)


class LogicalTensor(NamedTuple):
    """What the unquantized model has in one place, and how its values are written here.

    `parts[0]` holds the codes (or the plain values). `decoder` is a module-level function, so that a tensor of a file
    can be sent to another process. `transposed` says that the unquantized model keeps the matrix the other way round
    (GPT-2's Conv1D). `paired_rows` and `shift` are undone by `decode` (see `Origin`). `floor_db` is the SQNR under
    which this encoding is broken, whatever the weights; `rounding` tells what these weights can be expected to keep.
    `cells(tensor, row, start, stop)` gives a few values without torch, where the scheme can. `copy_of` names the tensor
    that a `tied` one repeats, where its values told so. `flat`: blocks run on across rows.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    role: Role
    parts: tuple[Part, ...]
    decoder: Decoder | None
    layout: object = None
    block: int | None = None
    transposed: bool = False
    floor_db: float | None = None
    paired_rows: int | None = None
    shift: float = 0.0
    rounding: Rounding | None = None
    cells: Cells | None = None
    copy_of: str | None = None
    flat: bool = False

    @property
    def params(self) -> int:
        """The number of logical values."""
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        """Whether the values are encoded, as opposed to written as plain numbers."""
        return self.scheme != "plain"

    @property
    def stored(self) -> StoredTensor:
        """The stored tensor that stands where the unquantized weight stood."""
        return self.parts[0].stored

    @property
    def trainable(self) -> bool | None:
        """Whether the optimizer sees it; None for files, which do not say."""
        return self.stored.requires_grad

    @property
    def nbytes(self) -> int:
        """All bytes that belong to this tensor: codes, scales and bookkeeping."""
        size = 0  # a loop: a generator costs more than the sum, and this is asked for every tensor of a model
        for part in self.parts:
            size += part.stored.nbytes
        return size

    @property
    def bytes(self) -> dict[ByteClass, int]:
        """The bytes by class, empty classes left out."""
        found: dict[ByteClass, int] = {}
        for part in self.parts:
            for kind, size in part.bytes:
                found[kind] = found.get(kind, 0) + size
        return {kind: size for kind, size in found.items() if size}

    @property
    def bits_per_weight(self) -> float:
        """All bits of this tensor per logical value."""
        return 8 * self.nbytes / self.params if self.params else 0.0

    @property
    def rows(self) -> int:
        """The number of windows of one row: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """The length of one row: the last dimension."""
        return self.shape[-1] if self.shape else 1

    def part(self, name: str) -> StoredTensor:
        """Return the stored tensor of a part, by its name in the format."""
        for part in self.parts:
            if part.name == name:
                return part.stored
        raise KeyError(name)

    def has(self, name: str) -> bool:
        """Whether the part is there."""
        return any(part.name == name for part in self.parts)

    def decode(self, start: int = 0, stop: int | None = None, device: str = "cpu") -> torch.Tensor:
        """Return rows `start` up to `stop` as float32 `[stop - start, columns]` on `device`.

        All leading dimensions count as rows, so a stack of experts is read in windows too.
        Raises `NotDecodable` where the values cannot be reached.
        """
        if self.decoder is None:
            raise NotDecodable(f"{self.scheme} is counted and weighed, but not decoded here", tensor=self.name)
        stop = self.rows if stop is None else stop
        if self.paired_rows is None:
            values = self.decoder(self, start, stop, device)
        else:
            values = self._unpaired(self.decoder, self.paired_rows, start, stop, device)
        return values - self.shift if self.shift else values

    def _unpaired(self, decoder: Decoder, head: int, start: int, stop: int, device: str) -> torch.Tensor:
        """Whole heads are decoded, their rows put back as two halves, and the window cut out of them."""
        if len(self.shape) == 1:  # a bias: its values are the rows
            whole = decoder(self, 0, 1, device).view(-1, head // 2, 2)
            return whole.transpose(1, 2).reshape(1, -1)[start:stop]
        first, last = start // head * head, -(-stop // head) * head
        pairs = decoder(self, first, last, device).view(-1, head // 2, 2, self.columns)
        return pairs.transpose(1, 2).reshape(last - first, self.columns)[start - first : stop - first]

    def windows(self, elements: int = 1 << 20) -> Iterator[tuple[int, int]]:
        """Yield row ranges of about `elements` values each."""
        step = max(1, elements // max(1, self.columns))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class SideFile(NamedTuple):
    """A file of the folder that holds no tensor of the artifact, and the class its bytes are in: metadata or dead."""

    name: str
    kind: ByteClass
    nbytes: int


@dataclass(frozen=True)
class Container:
    """Everything a container knows: names, dtypes, stored shapes, byte ranges, and what lies around them."""

    kind: str
    source: str
    tensors: Mapping[str, StoredTensor]
    file_bytes: int
    overhead: Mapping[ByteClass, int] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)  # by stored name
    beside: tuple[SideFile, ...] = ()  # their bytes are in `overhead`
