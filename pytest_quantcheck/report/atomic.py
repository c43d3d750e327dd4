"""Reports and baselines are whole or absent: a temporary sibling, fsync, `os.replace`."""

from __future__ import annotations

import os

from quantcheck_lint.writing import write_whole


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` (what a link points at) by `text` in UTF-8; an OSError leaves it as it was.

    The folder is made where it is not there.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        write_whole(path, text.encode())
    except OSError as error:
        # The temporary file is nobody's business.
        raise OSError(error.errno, f"cannot be written: {error.strerror}", path) from None
