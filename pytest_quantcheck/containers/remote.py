"""One file on an HTTP server, read by ranges: its header and what decides a shape, never the whole of it.

    GET      Range: bytes=FIRST-LAST, Accept-Encoding: identity
    206      Content-Range: bytes FIRST-LAST/SIZE; ETag or Last-Modified, which every answer has to repeat
    30x      Location: at most 5, http or https, never from https down to http

Source: RFC 9110, 8.8 (validators), 14 (ranges), 15.3.7 (206), 15.4 (redirects).

An answer that is not exactly what was asked is a `FormatError`: nothing is guessed, nothing is asked a second time but
where the server closed an idle connection or the address that it had sent us to ran out. Nothing is sent that would
identify anyone, and what follows the path of a URL is not shown, since signatures and tokens are there.
"""

from __future__ import annotations

import http
import http.client
import io
import re
import ssl
import string
import time
from collections import OrderedDict
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit, urlunsplit

from pytest_quantcheck.containers import files
from pytest_quantcheck.errors import FormatError

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any

    import torch

    from pytest_quantcheck.tensor import StoredTensor

BLOCK = 1 << 14
BLOCKS = 512  # are kept, 8 MiB of them
FIRST_READ = 1 << 18
DIRECT = 1 << 22  # reads from this size on are not kept
MOST_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
STALL_SECONDS = 20.0  # without a byte
ANSWER_SECONDS = 120.0  # of one answer, and for every MiB of it a second more

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AUTHORITY = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def is_url(path: str) -> bool:
    """Whether this is a URL, of whatever scheme, and no path."""
    return _SCHEME.match(path) is not None


def shown(path: str) -> str:
    """Return a URL without what may be secret in it; a path as it is.

    >>> shown("https://you:secret@example.org/a/model.gguf?token=abc"), shown("models/a?.gguf")
    ('https://example.org/a/model.gguf', 'models/a?.gguf')
    """
    if not is_url(path):
        return path
    scheme, _, rest = path.partition("://")
    authority, slash, place = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{place}" if not host or _AUTHORITY.fullmatch(host) else f"{scheme}://..."


def checked(url: str) -> SplitResult:
    """Return the parts of a URL that can be asked; anything else is a `FormatError`."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises where it is none)
    except ValueError:
        raise FormatError("is not a URL", file=shown(url)) from None
    if parts.scheme not in ("http", "https"):
        raise FormatError(f"is a URL of the scheme `{parts.scheme}` (https and http are read)", file=shown(url))
    if "@" in parts.netloc:
        what = "is a URL with a user name or password in it (they would end up in logs): refused"
        raise FormatError(what, file=shown(url))
    if not _AUTHORITY.fullmatch(parts.netloc) or not re.fullmatch("[!-~]+", url):
        raise FormatError("is not a URL (what is not ASCII, and spaces, are written as %20)", file=shown(url))
    return parts


class Version(NamedTuple):
    """What tells whether the file of a server is still the one that was opened."""

    size: int
    etag: str | None
    modified: str | None

    @property
    def is_firm(self) -> bool:
        """Whether another content would be told from this one."""
        return self.modified is not None or (self.etag is not None and not self.etag.startswith("W/"))


class RemoteFile:
    """One file of a server: a `Source`, read in blocks, of which the last ones are kept.

    Threads take turns; in another process it connects anew, and the file has to be the same one still.
    """

    def __init__(self, url: str, version: Version | None = None) -> None:
        self.url = url
        self.path = shown(url)
        self._connection = _Connection(url)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = Lock()
        self.version = version or self._opened()

    def __reduce__(self) -> tuple[type[RemoteFile], tuple[str, Version]]:
        return RemoteFile, (self.url, self.version)

    @property
    def size(self) -> int:
        """The size in bytes when it was opened first."""
        return self.version.size

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes `start` up to `stop`; whatever else the server answers is a `FormatError`."""
        if not 0 <= start <= stop <= self.size:
            what = f"bytes {start:,} to {stop:,} were wanted, the file has {self.size:,}"
            raise FormatError(what, file=self.path)
        with self._lock:
            return self._asked(start, stop) if stop - start >= DIRECT else self._kept(start, stop)

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
        """Return the bytes of many small ranges."""
        return [self.read(start, stop) for start, stop in ranges]

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` as a flat torch tensor on `device`."""
        return files.load(self, stored, start, stop, device)

    def _opened(self) -> Version:
        answer = self._answer(0, FIRST_READ)
        self._keep(0, answer.content)
        return answer.version

    def _kept(self, start: int, stop: int) -> bytearray:
        """The bytes from the blocks; those that are missing are asked for together."""
        numbers = range(start // BLOCK, -(-stop // BLOCK))
        missing = [number for number in numbers if number not in self._blocks]
        if missing:
            first = missing[0] * BLOCK
            self._keep(first, self._asked(first, min((missing[-1] + 1) * BLOCK, self.size)))
        content = bytearray().join(self._blocks[number] for number in numbers)
        for number in numbers:
            self._blocks.move_to_end(number)
        while len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        return content[start - numbers.start * BLOCK :][: stop - start]

    def _keep(self, first: int, content: bytearray) -> None:
        for at in range(0, len(content), BLOCK):
            self._blocks[(first + at) // BLOCK] = bytes(content[at : at + BLOCK])

    def _asked(self, start: int, stop: int) -> bytearray:
        if not self.version.is_firm:
            what = "has neither a strong ETag nor Last-Modified, so a change would not be seen: download the file"
            raise FormatError(what, file=self.path)
        answer = self._answer(start, stop)
        if answer.version != self.version:
            raise FormatError("changed while being read", file=self.path)
        return answer.content

    def _answer(self, start: int, stop: int) -> Answer:
        try:
            return self._connection.get(start, stop)
        except FormatError as error:
            self._connection.close()
            raise error.at(file=self.path) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # no IDNA: `a..b`
            self._connection.close()
            raise FormatError(_said(error), file=self.path) from None


class Answer(NamedTuple):
    """The bytes of a range, and which file they are of."""

    version: Version
    content: bytearray


class _Connection:
    """A connection to where a URL leads, kept open from one range to the next."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.target = url
        self._line: http.client.HTTPConnection | None = None

    def get(self, start: int, stop: int) -> Answer:
        """Return bytes `start` up to `stop`, or up to the end of the file, redirects followed."""
        if self.target != self.url:
            response = self._send(start, stop)
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                return _read(response, start, stop)
            self._go(self.url)  # signed addresses run out
        for _ in range(MOST_REDIRECTS + 1):
            response = self._send(start, stop)
            if response.status not in REDIRECTS:
                return _read(response, start, stop)
            self._go(_next(self.target, response.getheader("Location")))
        raise FormatError(f"is redirected more than {MOST_REDIRECTS} times (limit)")

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _go(self, url: str) -> None:
        self.close()
        self.target = url

    def _send(self, start: int, stop: int) -> http.client.HTTPResponse:
        parts = checked(self.target)
        self._line = self._line or _line(parts)
        was_open = self._line.sock is not None
        if was_open:
            self._line.sock.settimeout(STALL_SECONDS)
        until = time.monotonic() + ANSWER_SECONDS + (stop - start) / (1 << 20)
        self._line.response_class = partial(_Response, until=until)  # type: ignore[assignment]  # it is called, no more
        try:
            self._line.request("GET", _place(parts), headers=_wanted(start, stop))
            return self._line.getresponse()
        except ConnectionError:
            self.close()
            if not was_open:
                raise
        return self._send(start, stop)


class _Response(http.client.HTTPResponse):
    """A response that has to be there, head and body, at a time."""

    def __init__(self, sock: socket.socket, *given: Any, until: float, **named: Any) -> None:
        super().__init__(sock, *given, **named)
        self.fp = io.BufferedReader(_Paced(self.fp.detach(), sock, until))


class _Paced(io.RawIOBase):
    """The bytes of a socket up to a time: a timeout of the socket alone would start anew with every byte."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float) -> None:
        self.raw, self.sock, self.until = raw, sock, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(min(left, STALL_SECONDS))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _line(parts: SplitResult) -> http.client.HTTPConnection:
    """A connection to a server, not yet made."""
    host = str(parts.hostname)
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, parts.port, timeout=STALL_SECONDS)
    context = ssl.create_default_context()
    return http.client.HTTPSConnection(host, parts.port, timeout=STALL_SECONDS, context=context)


def _place(parts: SplitResult) -> str:
    return urlunsplit(("", "", parts.path or "/", parts.query, ""))


def _wanted(start: int, stop: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", "User-Agent": "pytest-quantcheck"}


def _next(url: str, location: str | None) -> str:
    """Where a redirect leads."""
    if not location:
        raise FormatError("is redirected without saying where to")
    target = urljoin(url, quote(location, safe=string.punctuation, encoding="iso-8859-1"))
    try:
        parts = checked(target)
    except FormatError as error:
        raise FormatError(f"is redirected to `{shown(target)}`, which {error.what}") from None
    if urlsplit(url).scheme == "https" and parts.scheme != "https":
        raise FormatError(f"is redirected from https down to `{shown(target)}`: refused")
    return target


def _read(response: http.client.HTTPResponse, start: int, stop: int) -> Answer:
    """The bytes of an answer, which has to be the range that was asked for, no byte less and none more."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        raise FormatError(_refusal(response.status, response.reason))
    coding = response.getheader("Content-Encoding", "identity")
    if coding != "identity":
        raise FormatError(f"is sent as `{coding}`, where the bytes themselves were asked for")
    match = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", ""))
    if match is None:
        raise FormatError("answers with a range that does not say which one, or of what size the file is")
    first, last, size = map(int, match.groups())
    if not first == start <= last or last + 1 != min(stop, size):
        asked = f"bytes {start:,} to {stop:,} were asked for"
        raise FormatError(f"answers with bytes {first:,} to {last + 1:,} of {size:,} ({asked})")
    version = Version(size, response.getheader("ETag"), response.getheader("Last-Modified"))
    return Answer(version, _body(response, last + 1 - first))


def _body(response: http.client.HTTPResponse, size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = response.readinto(view)
        if not count:
            raise FormatError(f"the answer ends after {size - len(view):,} of {size:,} bytes")
        view = view[count:]
    if response.length or response.read(1):
        raise FormatError(f"the answer has more than the {size:,} bytes that were asked for")
    return content


def _refusal(status: int, reason: str) -> str:
    if status == http.HTTPStatus.OK:
        return "the server sends whole files only (200 where 206 belongs): download the file"
    if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return "the server has no such bytes (416): the file is empty, or shorter than it was"
    if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
        return f"the server answers {status} {reason} (no token is sent): download the file"
    return f"the server answers {status} {reason}"


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in time ({STALL_SECONDS:g} s without a byte, {ANSWER_SECONDS:g} s for a range)"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the server is not valid: {error.verify_message}"
    if isinstance(error, http.client.IncompleteRead):
        return f"the answer ends after {len(error.partial):,} bytes"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
        return f"the server does not answer as HTTP has it ({type(error).__name__})"
    return f"the server cannot be read: {getattr(error, 'strerror', None) or error}"
