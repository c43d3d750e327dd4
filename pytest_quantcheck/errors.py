"""The two ways a check can be unable to answer, told apart by whose fault it is.

A bad file is a `FormatError`. A bad call is a plain `ValueError` or `TypeError`.
"""

from __future__ import annotations


class FormatError(ValueError):
    """A container or an encoding that cannot be read exactly, so nothing is guessed about it.

    The message is one line: `FILE: [TENSOR:] WHAT (LIMIT OR RULE)`.
    """

    def __init__(self, what: str, *, file: str | None = None, tensor: str | None = None) -> None:
        self.what = what
        self.file = file
        self.tensor = tensor
        super().__init__(what)

    def __str__(self) -> str:
        where = [part for part in (self.file, self.tensor) if part]
        return printable(": ".join([*where, self.what]))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.file, self.tensor))

    def at(self, *, file: str | None = None, tensor: str | None = None) -> FormatError:
        """Return the same error with the places it did not know yet."""
        return type(self)(self.what, file=self.file or file, tensor=self.tensor or tensor)


class UnknownEncoding(FormatError):
    """A stored tensor that no scheme claims and that cannot be read as plain numbers."""


class NotDecodable(FormatError):
    """A tensor that is counted and weighed exactly, but whose values cannot be reached here."""


def _rebuild(kind: type[FormatError], what: str, file: str | None, tensor: str | None) -> FormatError:
    return kind(what, file=file, tensor=tensor)


# Text from a checkpoint may hold anything: terminal escapes, line breaks, text that turns around or cannot be seen.
_UNPRINTABLE = {
    *range(0x20),
    *range(0x7F, 0xA0),
    0xAD,
    0x034F,
    0x061C,
    0x180E,
    *range(0x200B, 0x2010),
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    *range(0xFE00, 0xFE10),
    0xFEFF,
    *range(0xFFF0, 0xFFFC),
    *range(0xFFFE, 0x10000),
    *range(0xE0000, 0xE1000),
}


def printable(text: str) -> str:
    r"""Return `text` on one line with control, invisible, bidirectional and lone surrogate characters escaped.

    So is what a CI runner would take for a command: `::` where the text begins, `##` anywhere.

    >>> print(printable("a\x1b[31mb\nc"), printable(" ::error::x"), printable("##[error]x"))
    a\x1b[31mb\nc  \x3a:error::x #\x23[error]x
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(map(_visible, text))
    if "##" in text:
        text = text.replace("##", "#\\x23")
    return text.replace("::", "\\x3a:", 1) if text.lstrip().startswith("::") else text


def _visible(char: str) -> str:
    code = ord(char)
    if code not in _UNPRINTABLE and not 0xD800 <= code < 0xE000:
        return char
    escaped = repr(char)[1:-1]
    return escaped if escaped != char else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
