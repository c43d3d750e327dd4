"""JSON from strangers, read so that no two parsers could disagree about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from pytest_quantcheck.errors import FormatError

MAX_DEPTH = 64


def parse_object(raw: bytes | bytearray, *, limit: int) -> dict[str, Any]:
    """Return the JSON object in `raw`.

    Refused: over `limit` bytes, not UTF-8, nested over 64 deep, duplicate keys, NaN and infinities, trailing text.
    """
    value = parse(raw, None, limit=limit)
    if not isinstance(value, dict):
        raise FormatError(f"JSON holds a {type(value).__name__} where an object belongs")
    refuse_duplicates(raw, _pairs(value), limit=limit)
    return value


def refuse_duplicates(raw: bytes | bytearray, pairs: int, *, limit: int) -> None:
    """Refuse JSON in which a key is repeated, given how many pairs of key and value came of it as dicts.

    Every pair that is written has a colon, so as many colons as pairs leave no room for one that was dropped. More may
    also lie in strings: then it is read again, pair by pair.
    """
    if raw.count(b":") != pairs:
        parse(raw, unique, limit=limit)


def parse(raw: bytes | bytearray, hook: Callable[[list[tuple[str, Any]]], Any] | None, *, limit: int) -> Any:
    """Return the JSON value in `raw`; `hook` makes each object from its pairs, duplicates included.

    Without a hook an object is a dict, which keeps the last of two equal keys: the caller must rule them out.
    """
    if len(raw) > limit:
        raise FormatError(f"JSON of {len(raw):,} bytes (limit {limit:,})")
    try:
        text = raw.decode("utf-8")
        return json.loads(text, object_pairs_hook=hook, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"JSON is not UTF-8 at byte {error.start:,}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: {error.msg} at character {error.pos:,}") from None
    except RecursionError:
        raise FormatError(f"JSON nested deeper than {MAX_DEPTH}") from None
    except FormatError:
        raise
    except ValueError as error:  # an integer of thousands of digits, which int() refuses
        raise FormatError(f"not JSON: {error}") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of one JSON object as a dict, refusing duplicate keys."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError(f"duplicate key `{_first_repeated(pairs)}` (readers differ on which one wins)")
    return found


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise ValueError("no key is repeated")


def _refuse_constant(name: str) -> NoReturn:
    raise FormatError(f"`{name}` is not JSON")


def _pairs(value: dict[str, Any]) -> int:
    """The pairs of all objects in a value; nested deeper than 64 is a `FormatError`."""
    pairs, level = 0, [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for parent in level:
            children = parent.values() if type(parent) is dict else parent
            pairs += len(parent) if type(parent) is dict else 0
            below += [child for child in children if type(child) is dict or type(child) is list]
        if not below:
            return pairs
        level = below
    raise FormatError(f"JSON nested deeper than {MAX_DEPTH}")
