"""Torch checkpoints: `.bin`, `.pt`, `.pth`, `.ckpt`; zip files and those before torch 1.6; one, or a folder of shards.

    zip     <root>/data.pkl      the pickle of a state dict; tensors name storages by key
            <root>/data/<key>    one storage
            <root>/byteorder     `little` or `big`; little where it is missing
            <root>/version, .format_version, .storage_alignment, .data/serialization_id
    legacy  five pickles: a magic number, the protocol 1001, the writer's sizes, the state dict, the storage keys;
            then for every key its number of elements (8 bytes) and the storage, always little-endian

Source: torch 2.13, torch/serialization.py; torch/csrc/serialization.cpp for the byte order of legacy files.

The pickle is not run (`pickle_records`); what its tensors are is `state_dict`'s business.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping

from pytest_quantcheck.containers import files, folders, pickle_records, state_dict, zip_archive
from pytest_quantcheck.containers.pickle_records import PICKLE_LIMIT
from pytest_quantcheck.containers.state_dict import Checkpoint
from pytest_quantcheck.containers.storages import Storage
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import ByteClass, Container

ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
# What trainers leave beside the weights.
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|trainer_state|rng_state|random_states)[-.\w]*\.(bin|pt|pth|ckpt)"
)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")  # after the protocol and, from 4 on, a frame
LEGACY_PROTOCOL = 1001
BOOKKEEPING = ("data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
BIGGEST_RECORD = 1 << 10


def accepts(path: str) -> bool:
    """Whether this container reads the path."""
    if os.path.isdir(path):
        return any(FOLDER.holds(name) or FOLDER.is_index(name) for name in os.listdir(path))
    return path.endswith(ENDINGS) or FOLDER.is_index(path)


def open_container(path: str) -> Container:
    """Return the tensors of a torch checkpoint, of an index, or of a folder that holds either."""
    return folders.open_container(path, FOLDER)


def read_file(file: files.Readable, path: str) -> Container:
    """Return the tensors of one file, here or on a server; `path` is its name."""
    return folders.read_file(file, path, FOLDER)


def read_checkpoint(file: files.Readable) -> Checkpoint:
    """Return what a torch file holds, nothing of it run; raises `FormatError` for anything else."""
    start = bytes(file.read(0, min(24, file.size)))
    if start[:2] == b"PK":
        return _read_zip(file)
    if start[:1] == b"\x80" and LEGACY_START in start:
        return _read_legacy(file)
    raise FormatError("neither a zip file nor a legacy torch file (that is how torch.save writes)")


def _read_zip(file: files.Readable) -> Checkpoint:
    archive = zip_archive.read_archive(file)
    root = _root(archive.members)
    members = {name.removeprefix(f"{root}/"): member for name, member in archive.members.items()}
    _refuse_programs(members)
    records = {name: _record(file, members[name]) for name in BOOKKEEPING if name in members}
    pickle = pickle_records.run(records["data.pkl"])
    if pickle.stop != len(records["data.pkl"]):
        raise FormatError(f"{len(records['data.pkl']) - pickle.stop:,} bytes follow the pickle")
    storages = {}
    for key, wanted in pickle.storages.items():
        member = members.get(f"data/{key}")
        if member is None or member.size != wanted.nbytes:
            there = "is not there" if member is None else f"has {member.size:,} bytes"
            raise FormatError(f"storage `{key[:200]}` {there} (the pickle says {wanted.nbytes:,})")
        storages[key] = Storage(file, key, member.start, member.size, member.crc or None)
    unused = [
        m for name, m in members.items() if name not in BOOKKEEPING and name.removeprefix("data/") not in storages
    ]
    dead = sum(member.size for member in unused)
    overhead: dict[ByteClass, int] = {
        "metadata": archive.metadata + sum(len(record) for record in records.values()),
        "padding": archive.padding,
        "dead": dead,
    }
    findings = [
        Finding("orphan-member", "warning", None, f"zip member `{m.name}` ({m.size:,} bytes) belongs to no tensor")
        for m in unused[:10]
    ]
    if any(member.size and not member.crc for member in members.values()):
        findings.append(Finding("no-checksum", "note", None, "the zip file was written without checksums"))
    return Checkpoint(pickle.value, storages, overhead, _is_big_endian(records.get("byteorder")), tuple(findings))


def _root(members: Mapping[str, zip_archive.Member]) -> str:
    roots = {name.partition("/")[0] for name in members}
    root = min(roots, default="")
    if len(roots) != 1 or f"{root}/data.pkl" not in members:
        raise FormatError("a zip file, but no torch checkpoint: it has no `data.pkl` in its one folder")
    return root


def _refuse_programs(members: Mapping[str, zip_archive.Member]) -> None:
    for name in members:
        if name == "constants.pkl" or name.startswith("code/"):
            raise FormatError("is a TorchScript program (it has `code/`), not a checkpoint: not read")
        if name == "archive_format" or name.startswith("models/"):
            raise FormatError("is an exported program (.pt2), not a checkpoint: not read")


def _record(file: files.Readable, member: zip_archive.Member) -> bytes:
    """A small member as a whole, its checksum verified."""
    limit = PICKLE_LIMIT if member.name.endswith("/data.pkl") else BIGGEST_RECORD
    if member.size > limit:
        raise FormatError(f"`{member.name[:200]}` has {member.size:,} bytes (limit {limit:,})")
    content = bytes(file.read(member.start, member.start + member.size))
    if member.crc and zlib.crc32(content) != member.crc:
        raise FormatError(f"`{member.name[:200]}` has the checksum {zlib.crc32(content):08x}, not {member.crc:08x}")
    return content


def _is_big_endian(record: bytes | None) -> bool:
    if record not in (None, b"little", b"big"):
        raise FormatError("`byteorder` is neither `little` nor `big`")
    return record == b"big"


def _read_legacy(file: files.Readable) -> Checkpoint:
    raw = bytes(file.read(0, min(file.size, PICKLE_LIMIT)))
    at, values = 0, []
    for _ in range(5):
        if at >= len(raw) == PICKLE_LIMIT < file.size:
            raise FormatError(f"pickle of more than {PICKLE_LIMIT:,} bytes (limit)")
        values.append(pickle_records.run(raw, at))
        at = values[-1].stop
    magic, protocol, _, content, keys = values
    if (magic.value, protocol.value) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise FormatError("a legacy torch file of another protocol than 1001")
    if not isinstance(keys.value, list) or not all(isinstance(key, str) for key in keys.value):
        raise FormatError("the storage keys of a legacy torch file are no list of names")
    if len(set(keys.value)) != len(keys.value) or set(keys.value) != set(content.storages):
        raise FormatError("the storage keys of a legacy torch file are not those of its tensors")
    storages, pickles = {}, at
    for key in keys.value:
        wanted = content.storages[key]
        if at + 8 + wanted.nbytes > file.size:
            raise FormatError(f"storage `{key[:200]}` reaches behind the end: truncated")
        elements = int.from_bytes(file.read(at, at + 8), "little")
        if elements != wanted.elements:
            raise FormatError(f"storage `{key[:200]}` has {elements:,} elements (the pickle says {wanted.elements:,})")
        storages[key] = Storage(file, key, at + 8, wanted.nbytes)
        at += 8 + wanted.nbytes
    if at != file.size:
        raise FormatError(f"{file.size - at:,} bytes follow the last storage (nothing may)")
    return Checkpoint(content.value, storages, {"metadata": pickles + 8 * len(storages)})


def read_shard(file: files.Readable, *, shown: str) -> folders.Shard:
    """Return the stored tensors of one torch file."""
    try:
        return state_dict.shard(read_checkpoint(file))
    except FormatError as error:
        raise error.at(file=shown) from None


FOLDER = folders.Layout("torch", ENDINGS, "pytorch_model.bin", read_shard, NOT_WEIGHTS)
