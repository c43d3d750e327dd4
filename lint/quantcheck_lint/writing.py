"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import zlib

STALE = 3600  # seconds: no writer takes that long


def write_whole(path: str, data: bytes) -> None:
    """Replace the file at `path` (what a link points at) by `data`: a killed process leaves the old file.

    It may leave a temporary file too, which a later write to the same path takes out.
    """
    folder, name = os.path.split(os.path.realpath(path))
    path = os.path.join(folder, name)
    prefix = f".quantcheck-{zlib.crc32(os.fsencode(name)):08x}-"
    _sweep(folder, prefix)
    descriptor, temporary = tempfile.mkstemp(prefix=prefix, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _sweep(folder: str, prefix: str) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.is_file(follow_symlinks=False):
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if age > STALE:
                    os.unlink(entry.path)


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode & 0o7777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
