"""Files as text: encodings, byte order marks, line ends, size limits."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass

from quantcheck_lint.finding import CannotRead

MAX_BYTES = 1 << 20
_COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_BLANK = re.compile(rb"^[ \t\f]*(?:#[^\r\n]*)?(?:\r?\n|\r|$)")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Source:
    """A source text. `prefix` is the byte order mark that is put back when the text is written."""

    path: str
    text: str
    encoding: str = "utf-8"
    prefix: bytes = b""

    @property
    def newline(self) -> str:
        """The line end of the first line."""
        found = re.search(r"\r\n?|\n", self.text)
        return found.group() if found else "\n"

    def encode(self, text: str) -> bytes:
        """`text` in the encoding of this source."""
        return self.prefix + text.encode(self.encoding)


def read(path: str) -> bytes:
    """The bytes of a regular file."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        return file.readall()


def decode(path: str, data: bytes, limit: int = MAX_BYTES) -> Source:
    """The text of a Python file, by its byte order mark or coding cookie; `CannotRead` says why there is none."""
    if len(data) > limit:
        raise CannotRead(f"{len(data)} bytes is too large", f"limit {limit} bytes")
    prefix = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    data = data.removeprefix(prefix)
    if b"\0" in data or data.startswith(_UTF16):
        raise CannotRead("source contains NUL bytes", "Python source", *_place(data, max(data.find(b"\0"), 0)))
    encoding = _encoding(data, prefix)
    try:
        return Source(path, data.decode(encoding), encoding, prefix)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} is not {encoding}"
        raise CannotRead(byte, "source encoding", *_place(data, error.start)) from None
    except (LookupError, ValueError, AssertionError):
        raise CannotRead(f"unknown encoding `{encoding}`", "coding cookie") from None


def _encoding(data: bytes, prefix: bytes) -> str:
    first, second = (*data.split(b"\n", 2), b"", b"")[:2]
    cookie = _COOKIE.match(first) or (_COOKIE.match(second) if _BLANK.fullmatch(first + b"\n") else None)
    if cookie is None:
        return "utf-8"
    name = cookie.group(1).decode("ascii", "replace").lower()
    try:
        found = codecs.lookup(name)
    except LookupError:
        raise CannotRead(f"unknown encoding `{name}`", "coding cookie") from None
    if not getattr(found, "_is_text_encoding", True):
        raise CannotRead(f"`{name}` is not a text encoding", "coding cookie")
    if prefix and found.name != "utf-8":
        raise CannotRead(f"byte order mark says utf-8, cookie says `{name}`", "coding cookie")
    return found.name


def _place(data: bytes, offset: int) -> tuple[int, int]:
    """Line and column (from 1, in bytes) of an offset."""
    before = data[:offset]
    return before.count(b"\n") + 1, offset - (before.rfind(b"\n") + 1) + 1
