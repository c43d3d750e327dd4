"""`quantcheck.lock`: what artifacts were when they were accepted.

    {"schema": 1,
     "artifacts": {NAME: {"by": "quantcheck.toml", "version": "0.1.0", "container": "safetensors",
                          "outside_tensors": {CLASS: N},
                          "tensors": {NAME: {"shape": [N], "scheme": "bnb-nf4", "role": "parameter",
                                             "bytes": {CLASS: N}, "sqnr_db": dB}}}}}

Sorted, one tensor a line and no totals, so that version control merges it. `sqnr_db` is there where a reference was
compared, and null where nothing differed from it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytest_quantcheck import strict_json
from pytest_quantcheck.checks.baseline import Record
from pytest_quantcheck.checks.diff import Outline, Stored
from pytest_quantcheck.checks.verdict import Verdict
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.report.atomic import write_text

NAME = "quantcheck.lock"
SCHEMA = 1
LIMIT = 256 << 20
UPDATE = "QUANTCHECK_UPDATE"  # set to 1, or to `force` in CI, it has baselines recorded anew


def updating() -> bool:
    """Return whether this process records baselines anew, as `pytest --quantcheck-update` says."""
    wanted = os.environ.get(UPDATE, "")
    if wanted:
        require_update_allowed(forced=wanted == "force")
    return bool(wanted)


def require_update_allowed(forced: bool) -> None:
    """Raise a ValueError in CI, which must not accept what it is there to refuse."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false") and not forced:
        raise ValueError("baselines are not updated in CI (CI is set): update where you can look at what changed")


def read(path: str) -> dict[str, Record]:
    """Return the records by name, none where there is no file; what is no lock of schema 1 is a `FormatError`."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LIMIT + 1)
    except FileNotFoundError:
        return {}
    try:
        document = strict_json.parse_object(raw, limit=LIMIT)
        if document.get("schema") != SCHEMA:
            raise FormatError(f"schema `{document.get('schema')}` is not {SCHEMA}: another version wrote it")
        return {name: _record(found) for name, found in document["artifacts"].items()}
    except FormatError as error:
        raise error.at(file=path) from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FormatError(
            "is not a lock of quantcheck (take it from version control, or delete it and record anew)", file=path
        ) from None


def store(path: str, changes: Mapping[str, Record | None]) -> None:
    """Add or replace records, and take out those that are None; the others stay, also those of concurrent runs."""
    with _alone(path):
        records: dict[str, Record | None] = {**read(path), **changes}
        write_text(path, render({name: record for name, record in records.items() if record}))


def update(path: str, name: str, new: Record) -> Verdict:
    """Record an artifact anew; passes only where nothing changed, so that no run both accepts and agrees."""
    old = read(path).get(name)
    if old is not None and _rendered(old._replace(by=new.by, version=new.version)) == _rendered(new):
        return Verdict("baseline", True, f"baseline: as recorded in {path}")
    store(path, {name: new})
    return Verdict("baseline", False, f"baseline: recorded in {path}: commit it, and run again without updating")


def render(records: Mapping[str, Record]) -> str:
    """Return the text of a lock."""
    artifacts = ",\n".join(f"  {json.dumps(name)}: {_rendered(record)}" for name, record in sorted(records.items()))
    return f'{{\n "schema": {SCHEMA},\n "artifacts": {{\n{artifacts}\n }}\n}}\n'


def _rendered(record: Record) -> str:
    outline = record.outline
    facts = {
        "by": record.by,
        "version": record.version,
        "container": outline.container,
        "outside_tensors": dict(sorted(outline.outside.items())),
    }
    lines = [f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    tensors = (f"    {json.dumps(name)}: {_line(name, stored)}" for name, stored in sorted(outline.tensors.items()))
    lines.append('   "tensors": {\n' + ",\n".join(tensors) + "\n   }")
    return "{\n" + ",\n".join(lines) + "\n  }"


def _line(name: str, stored: Stored) -> str:
    fields: dict[str, Any] = {
        "shape": list(stored.shape),
        "scheme": stored.scheme,
        "role": stored.role,
        "bytes": dict(sorted(stored.bytes.items())),
    }
    if stored.sqnr_db is not None:
        if math.isnan(stored.sqnr_db) or stored.sqnr_db == -math.inf:
            raise FormatError(f"has an SQNR of {stored.sqnr_db} dB: nothing to record", tensor=name)
        fields["sqnr_db"] = stored.sqnr_db if math.isfinite(stored.sqnr_db) else None
    return json.dumps(fields)


def _record(found: dict[str, Any]) -> Record:
    tensors = {name: _stored(fields) for name, fields in found["tensors"].items()}
    outside = {**found["outside_tensors"]}
    return Record(found["by"], found["version"], Outline("the baseline", found["container"], outside, tensors))


def _stored(fields: dict[str, Any]) -> Stored:
    known = fields.get("sqnr_db")
    if "sqnr_db" in fields and known is None:
        known = math.inf
    return Stored(tuple(fields["shape"]), fields["scheme"], fields["role"], fields["bytes"], known)


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Keep other runs from changing the same lock meanwhile; the system lets go of it however this process ends."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
