"""The zip files that `torch.save` writes, read so that no two readers could disagree about one.

    per member         local header (30 bytes and the name), extra field (alignment), the bytes as they are,
                       data descriptor (16 bytes; 24 with 64-bit sizes) where flag bit 3 says so
    central directory  46 bytes and name, extra field for every member
    end                zip64 record (56) and locator (20) where there are any, end record (22), nothing behind

Source: PKWARE APPNOTE 6.3.10; torch 2.13, caffe2/serialize/inline_container.cc (miniz).

Refused: compressed or encrypted members, two of one name, holes, overlaps, bytes before or behind, local headers that
say something else than the directory. A checksum of 0 is what `torch.serialization.set_crc32_options(False)` leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from pytest_quantcheck.containers.files import Readable
from pytest_quantcheck.errors import FormatError

MEMBER_LIMIT = 200_000
DIRECTORY_LIMIT = 64 << 20

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
DESCRIPTOR, UTF8 = 0x0008, 0x0800
FOLDER = 0x10  # of the external attributes
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF


class Member(NamedTuple):
    """One member: where its bytes are, and the checksum that they should have."""

    name: str
    start: int
    size: int
    crc: int


class Archive(NamedTuple):
    """All members, in the order of the directory, and the bytes that are no member's."""

    members: Mapping[str, Member]
    metadata: int
    padding: int


class _Entry(NamedTuple):
    name: str
    raw_name: bytes
    flags: int
    crc: int
    size: int
    header: int


def read_archive(file: Readable) -> Archive:
    """Return the members of a zip file; raises `FormatError` for everything two readers could read differently."""
    count, start, size, end = _read_end(file)
    if count > MEMBER_LIMIT or size > DIRECTORY_LIMIT:
        raise FormatError(
            f"zip of {count:,} members, directory of {size:,} bytes (limits {MEMBER_LIMIT:,}, {DIRECTORY_LIMIT:,})"
        )
    if start + size != end:
        raise FormatError(f"zip directory ends at byte {start + size:,}, its end record is at {end:,}")
    entries = sorted(_directory(file.read(start, end), count), key=lambda entry: entry.header)
    members, padding = _members(file, entries, start)
    used = sum(member.size for member in members)
    by_name = {member.name: member for member in members}
    return Archive(by_name, file.size - used - padding, padding)


def _read_end(file: Readable) -> tuple[int, int, int, int]:
    """The number of members, start and size of the directory, and the byte where the directory has to end."""
    at = file.size - END.size
    if at < 0:
        raise FormatError(f"{file.size} bytes is too short for a zip file")
    signature, disk, first_disk, here, count, size, start, comment = END.unpack(file.read(at, file.size))
    if signature != b"PK\5\6" or comment:
        raise FormatError("zip file does not end with its end record: truncated, or bytes follow it")
    if disk or first_disk or here != count:
        raise FormatError("zip file in several parts")
    if at < LOCATOR.size or file.read(at - LOCATOR.size, at - LOCATOR.size + 4) != b"PK\6\7":
        if FULL16 in (count,) or FULL32 in (size, start):
            raise FormatError("zip end record points to a zip64 record that is not there")
        return count, start, size, at
    return _read_end64(file, at - LOCATOR.size, (count, size, start))


def _read_end64(file: Readable, at: int, small: tuple[int, int, int]) -> tuple[int, int, int, int]:
    _, disk, place, disks = LOCATOR.unpack(file.read(at, at + LOCATOR.size))
    if disk or disks != 1 or place != at - END64.size:
        raise FormatError("zip64 locator does not point to the record before it")
    record = END64.unpack(file.read(place, at))
    signature, length, _, _, disk, first_disk, here, count, size, start = record
    if signature != b"PK\6\6" or length != END64.size - 12 or disk or first_disk or here != count:
        raise FormatError("zip64 end record is broken")
    for value, large, full in zip(small, (count, size, start), (FULL16, FULL32, FULL32), strict=True):
        if value not in (large, full):
            raise FormatError(f"zip end records disagree ({value:,} and {large:,})")
    return count, start, size, place


def _directory(raw: bytearray, count: int) -> list[_Entry]:
    entries, at, names = [], 0, set()
    for _ in range(count):
        entry, at = _entry(raw, at)
        if entry.name in names:
            raise FormatError(f"zip member `{entry.name[:200]}` is there twice (readers differ on which one wins)")
        names.add(entry.name)
        entries.append(entry)
    if at != len(raw):
        raise FormatError(f"zip directory has {len(raw) - at:,} bytes behind its {count:,} members")
    return entries


def _entry(raw: bytearray, at: int) -> tuple[_Entry, int]:
    """One entry of the directory, and where the next one starts."""
    if at + CENTRAL.size > len(raw):
        raise FormatError("zip directory is truncated")
    fields = CENTRAL.unpack_from(raw, at)
    (
        signature,
        _,
        _,
        flags,
        method,
        _,
        _,
        crc,
        stored,
        size,
        name_length,
        extra,
        comment,
        disk,
        _,
        attributes,
        header,
    ) = fields
    at += CENTRAL.size
    raw_name = bytes(raw[at : at + name_length])
    stop = at + name_length + extra + comment
    if signature != b"PK\1\2" or stop > len(raw) or disk or comment:
        raise FormatError("zip directory is broken")
    name = _name(raw_name)
    if attributes & FOLDER or name.endswith("/"):
        raise FormatError(f"zip member `{name[:200]}` is marked as a folder (torch would read nothing)")
    if method or flags & ~(DESCRIPTOR | UTF8):
        what = f"compressed (method {method})" if method else f"encrypted or odd (flags 0x{flags:04x})"
        raise FormatError(f"zip member `{name[:200]}` is {what}; torch stores members as they are")
    large = _zip64(raw[at + name_length : stop], [size, stored, header], name)
    if large[0] != large[1]:
        raise FormatError(f"zip member `{name[:200]}` has two sizes ({large[1]:,} and {large[0]:,})")
    return _Entry(name, raw_name, flags, crc, large[0], large[2]), stop


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("a zip member's name is not UTF-8") from None
    if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise FormatError(f"zip member is named `{name[:200]}`")
    return name


def _zip64(extra: bytearray, values: list[int], name: str) -> list[int]:
    """Replace the values that do not fit 32 bits by those of the zip64 field, in its order: size, stored, header."""
    at = 0
    field = b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = bytes(extra[at + 4 : at + 4 + length])
        at += 4 + length
    wanted = 8 * values.count(FULL32)
    if len(field) < wanted:
        raise FormatError(f"zip member `{name[:200]}` lacks its 64-bit sizes")
    large = iter(struct.unpack(f"<{wanted // 8}Q", field[:wanted]))
    return [next(large) if value == FULL32 else value for value in values]


def _members(file: Readable, entries: list[_Entry], directory: int) -> tuple[list[Member], int]:
    """The members, each following the one before it without a gap, and the bytes of their extra fields."""
    if (entries[0].header if entries else directory) != 0:
        raise FormatError("zip file does not start with its first member")
    headers = [(entry.header, entry.header + LOCAL.size + len(entry.raw_name)) for entry in entries]
    if any(stop > directory for _, stop in headers):
        raise FormatError("a zip member starts behind the directory")
    members, padding = [], 0
    for entry, (_, stop), raw in zip(entries, headers, file.read_each(headers), strict=True):
        extra = _check_local(entry, raw)
        members.append(Member(entry.name, stop + extra, entry.size, entry.crc))
        padding += extra
    follows = [entry.header for entry in entries[1:]] + [directory]
    gaps = [_gap(*each) for each in zip(entries, members, follows, strict=True)]
    for entry, gap, raw in zip(entries, gaps, file.read_each(gaps), strict=True):
        _check_descriptor(entry, raw, gap)
    return members, padding


def _check_local(entry: _Entry, header: bytearray) -> int:
    """Hold a local header to the directory; return the length of its extra field."""
    signature, _, flags, method, _, _, crc, stored, size, length, extra = LOCAL.unpack_from(header)
    if signature != b"PK\3\4" or (flags, method, length) != (entry.flags, 0, len(entry.raw_name)):
        raise FormatError(f"zip member `{entry.name[:200]}`: its local header says something else than the directory")
    for value, wanted in ((crc, entry.crc), (stored, entry.size), (size, entry.size)):
        if value != wanted and not (value == 0 and entry.flags & DESCRIPTOR) and not (value == FULL32 <= wanted):
            raise FormatError(
                f"zip member `{entry.name[:200]}`: its local header says {value:,}, the directory {wanted:,}"
            )
    if header[LOCAL.size :] != entry.raw_name:
        raise FormatError(f"zip member `{entry.name[:200]}` is named otherwise in its local header")
    return int(extra)


def _gap(entry: _Entry, member: Member, follow: int) -> tuple[int, int]:
    """What lies between a member and the next one: its data descriptor, or nothing."""
    stop = member.start + member.size
    gap = follow - stop
    if gap not in ((16, 24) if entry.flags & DESCRIPTOR else (0,)):
        what = f"overlaps what follows by {-gap:,} bytes" if gap < 0 else f"is followed by {gap:,} bytes of no member"
        raise FormatError(f"zip member `{entry.name[:200]}` {what}")
    return stop, follow


def _check_descriptor(entry: _Entry, raw: bytearray, gap: tuple[int, int]) -> None:
    if not raw:
        return
    sizes = struct.Struct("<4sI2Q" if len(raw) == 24 else "<4s3I").unpack(raw)
    if sizes != (b"PK\7\10", entry.crc, entry.size, entry.size):
        where = f"at byte {gap[0]:,} says something else than the directory"
        raise FormatError(f"zip member `{entry.name[:200]}`: its data descriptor {where}")
