"""Files of a checkpoint: opened beneath their folder, read with pread, never mapped.

A mapped file that shrinks kills the process; a link out of the folder reads what the checkpoint has no business with.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pytest_quantcheck import strict_json
from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.errors import FormatError, NotDecodable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_quantcheck.tensor import Source, StoredTensor

JSON_LIMIT = 64 << 20


class Readable(Protocol):
    """One file of bytes, here or on a server: a `Source` that knows its size, and its name in errors."""

    @property
    def path(self) -> str:
        """Its name in errors."""

    @property
    def size(self) -> int:
        """The size in bytes when it was opened first."""

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes `start` up to `stop`."""

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        """Return the bytes of many small ranges."""

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` as a flat torch tensor on `device`."""


class Stamp(NamedTuple):
    """What tells whether a file is still the one that was opened; device and inode are None on another machine."""

    device: int | None
    inode: int | None
    size: int
    modified: int

    def is_of(self, status: os.stat_result) -> bool:
        """Whether a file with this status is the one that was opened."""
        found = _stamp(status)
        here = self.device is None or self[:2] == found[:2]
        return here and self[2:] == found[2:]


class File(NamedTuple):
    """One regular file of a checkpoint: a `Source` that opens it anew for each read.

    Nothing stays open between reads, so ten thousand shards need one descriptor, and a file can be sent to
    another process.
    """

    path: str
    stamp: Stamp

    def __reduce__(self) -> tuple[type[File], tuple[str, Stamp]]:
        # Another machine has its own numbers for the same file on a shared disk.
        return File, (self.path, self.stamp._replace(device=None, inode=None))

    @property
    def size(self) -> int:
        """The size in bytes when it was opened first."""
        return self.stamp.size

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes `start` up to `stop`; a file that changed since it was opened is a `FormatError`."""
        return self.read_each([(start, stop)])[0]

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        """Return the bytes of many small ranges, the file opened once for all of them."""
        descriptor = _open(self.path)
        try:
            self._check(descriptor)
            found = [self._read(descriptor, start, stop) for start, stop in ranges]
            self._check(descriptor)
        finally:
            os.close(descriptor)
        return found

    def _read(self, descriptor: int, start: int, stop: int) -> bytearray:
        buffer = bytearray(stop - start)
        view = memoryview(buffer)
        while view:
            count = os.preadv(descriptor, [view], start)
            if not count:
                raise FormatError("changed while being read", file=self.path)
            start += count
            view = view[count:]
        return buffer

    def _check(self, descriptor: int) -> None:
        if not self.stamp.is_of(os.fstat(descriptor)):
            raise FormatError("changed while being read", file=self.path)

    def expect(self, start: int, stop: int) -> None:
        """Have the kernel read ahead bytes that will be wanted soon."""
        descriptor = _open(self.path)
        try:
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` as a flat torch tensor on `device`."""
        return load(self, stored, start, stop, device)

    def load_each(self, stored: StoredTensor, ranges: Sequence[tuple[int, int]], device: str) -> torch.Tensor:
        """Return elements of many small ranges, one behind the other, the file opened once for all of them."""
        width = BITS[stored.dtype] // 8
        places = [(stored.offset + start * width, stored.offset + stop * width) for start, stop in ranges]
        content = bytearray().join(self.read_each(places))
        return load(Held(content), stored._replace(offset=0), 0, len(content) // width, device)


class Held(NamedTuple):
    """A `Source` over bytes of another that were read once; offsets count from the start of what was read."""

    content: bytearray

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes."""
        return self.content[start:stop]

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements as a flat torch tensor on `device`."""
        return load(self, stored, start, stop, device)


def held(stored: StoredTensor, *, limit: int) -> StoredTensor:
    """Return a stored tensor of a file with its bytes in memory, unless it has more than `limit` of them."""
    if not isinstance(stored.source, File) or stored.nbytes > limit:
        return stored
    content = stored.source.read(stored.offset, stored.offset + stored.nbytes)
    return stored._replace(source=Held(content), offset=0)


def expect(stored: StoredTensor, start: int, stop: int, rows: int) -> None:
    """Have the kernel read ahead the bytes of rows `start` up to `stop` of `rows`, where they are in a file."""
    if not isinstance(stored.source, File) or not rows or not hasattr(os, "posix_fadvise"):
        return
    first, last = stored.nbytes * start // rows, -(-stored.nbytes * stop // rows)
    stored.source.expect(stored.offset + first, stored.offset + last)


def load(source: Source, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return elements `start` up to `stop` of what a source reads as bytes, as a flat torch tensor on `device`."""
    import torch

    attribute = DTYPES[stored.dtype].torch
    dtype = getattr(torch, attribute, None) if attribute else None
    if dtype is None:
        raise NotDecodable(f"torch {torch.__version__} has no dtype for {stored.dtype}", tensor=stored.name)
    if stop <= start:
        return torch.empty(0, dtype=dtype, device=device)
    width = BITS[stored.dtype] // 8
    raw = source.read(stored.offset + start * width, stored.offset + stop * width)
    return torch.frombuffer(raw, dtype=dtype).to(device)


def open_file(path: str | os.PathLike[str]) -> File:
    """Return the file that the user named, links followed; anything but a regular file is refused."""
    return _opened(os.path.realpath(path), shown=os.fspath(path))


def open_beneath(folder: str, name: str) -> File:
    """Return a file of a checkpoint folder, as named by its index or listing.

    Refused: absolute names, `..`, NUL, and links that leave the folder; the one exception is a hub cache, where
    `snapshots/<revision>/<file>` links to `blobs/<hash>` of the same repository.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise FormatError(f"names the file `{name}` (only files beneath the folder are read)", file=folder)
    shown = os.path.join(folder, name)
    root, real = os.path.realpath(folder), os.path.realpath(shown)
    for allowed in (root, _hub_blobs(root)):
        if allowed and os.path.commonpath([allowed, real]) == allowed:
            return _opened(real, shown=shown)
    raise FormatError(f"links to `{real}`, outside its folder (only files beneath the folder are read)", file=shown)


def links_elsewhere(file: File, folder: str) -> int:
    """Return how many names a file has that are not in its own folder, nor in `folder`: hard links out of it."""
    inside = 0
    for place in {os.path.dirname(file.path), os.path.realpath(folder)}:
        with os.scandir(place) as entries:
            inside += sum(entry.inode() == file.stamp.inode and not entry.is_symlink() for entry in entries)
    return os.stat(file.path).st_nlink - inside


def read_json(folder: str, name: str) -> dict[str, object] | None:
    """Return a JSON object of the folder, or None where there is no such file."""
    if not os.path.lexists(os.path.join(folder, name)):
        return None
    file = open_beneath(folder, name)
    if file.size > JSON_LIMIT:
        raise FormatError(f"JSON of {file.size:,} bytes (limit {JSON_LIMIT:,})", file=file.path)
    try:
        return strict_json.parse_object(file.read(0, file.size), limit=JSON_LIMIT)
    except FormatError as error:
        raise error.at(file=os.path.join(folder, name)) from None


def listing(folder: str) -> dict[str, int]:
    """Return the regular files directly in a folder and their sizes, links followed, by name."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # a dangling link has no bytes
            if stat.S_ISREG(status.st_mode):
                found[entry.name] = status.st_size
    return dict(sorted(found.items()))


def _hub_blobs(root: str) -> str | None:
    """The `blobs` folder of the hub cache that `root` is a snapshot of."""
    snapshot = Path(root)
    if snapshot.parent.name != "snapshots" or not snapshot.parent.parent.name.startswith(("models--", "datasets--")):
        return None
    return str(snapshot.parent.parent / "blobs")


def _opened(real: str, *, shown: str) -> File:
    try:
        descriptor = _open(real)
    except FileNotFoundError:
        raise FormatError("no such file", file=shown) from None
    except OSError as error:
        raise FormatError(f"cannot be opened: {error.strerror}", file=shown) from None
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("not a regular file", file=shown)
    return File(real, _stamp(status))


def _open(path: str) -> int:
    # The path is resolved: a link here was put in its place since. A FIFO must not make us wait.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
