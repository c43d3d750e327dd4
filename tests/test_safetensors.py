"""The safetensors container: equal to the library where both read, strict where two readers could differ."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_quantcheck import FormatError, inspect
from pytest_quantcheck.containers import files, open_path
from pytest_quantcheck.containers.live_tensor import Record
from pytest_quantcheck.containers.safetensors import read_header
from pytest_quantcheck.dtypes import DTYPES, SAFETENSORS


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="U8", shape=(2,), offsets=(0, 2), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def parse(raw: bytes):
    return read_header(Record(raw), len(raw))


ONE = {"a": entry()}

BAD = [
    ("empty-file", b"", "too short"),
    ("header-of-2-to-63-bytes", struct.pack("<Q", 2**63) + b"{}", "limit 100,000,000"),
    ("header-longer-than-file", struct.pack("<Q", 100) + b"{}", "truncated"),
    ("header-does-not-start-with-brace", raw_file(b" {}"), "does not start"),
    ("not-json", raw_file(b"{a}"), "not JSON"),
    ("not-utf-8", raw_file(b'{"\xff": 1}'), "UTF-8"),
    ("text-after-the-json", raw_file(json.dumps(ONE).encode() + b"{}", b"xx"), "not JSON"),
    ("nested-too-deep", raw_file(b'{"a":' + b"[" * 100_000), "nested"),
    ("nan-literal", raw_file(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', b"xx"), "NaN"),
    ("integer-of-5000-digits", raw_file(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"), "JSON"),
    ("unknown-dtype", raw_file({"a": entry("Q4")}, b"xx"), "unknown dtype `Q4`"),
    ("dtype-is-no-text", raw_file({"a": entry(["U8"])}, b"xx"), "unknown dtype"),
    ("field-missing", raw_file({"a": {"dtype": "U8", "shape": [2]}}, b"xx"), "exactly"),
    ("field-too-many", raw_file({"a": entry(extra=1)}, b"xx"), "exactly"),
    ("negative-dimension", raw_file({"a": entry(shape=(-1, -2))}, b"xx"), "`-1` is not a size"),
    ("float-dimension", raw_file({"a": entry(shape=(2.0,))}, b"xx"), "`2.0` is not a size"),
    ("boolean-dimension", raw_file({"a": entry(shape=(True, 2))}, b"xx"), "`True` is not a size"),
    ("dimension-over-2-to-63", raw_file({"a": entry(shape=(2**63, 0), offsets=(0, 0))}), "not a size"),
    ("product-that-wraps-64-bits", raw_file({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}), "needs"),
    ("three-offsets", raw_file({"a": entry(offsets=(0, 2, 2))}, b"xx"), "two offsets"),
    ("offsets-backwards", raw_file({"a": entry(shape=(0,), offsets=(2, 0))}, b"xx"), "range has -2"),
    ("range-too-short-for-shape", raw_file({"a": entry("F32", (2,), (0, 4))}, b"xxxx"), "needs 8 bytes"),
    ("half-a-byte", raw_file({"a": entry("F4", (3,), (0, 2))}, b"xx"), "whole bytes"),
    ("hole", raw_file({"a": entry(), "b": entry(offsets=(4, 6))}, b"xxxxxx"), "hole of 2 bytes"),
    ("overlap", raw_file({"a": entry(), "b": entry(offsets=(1, 3))}, b"xxx"), "overlaps"),
    ("same-range-twice", raw_file({"a": entry(), "b": entry()}, b"xx"), "overlaps"),
    ("truncated-data", raw_file(ONE, b"x"), "truncated"),
    ("trailing-bytes", raw_file(ONE, b"xxPK"), "2 bytes follow"),
    ("duplicate-tensor", raw_file(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],'
                                  b'"data_offsets":[0,2]}}', b"xx"), "duplicate key `a`"),
    ("duplicate-field", raw_file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}'),
     "duplicate key `dtype`"),
    ("metadata-of-numbers", raw_file({"__metadata__": {"a": 1}}), "strings"),
    ("metadata-twice", raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate key `__metadata__`"),
    ("metadata-null", raw_file({"__metadata__": None}), "strings"),
    ("duplicate-of-another-kind", raw_file(b'{"a":1,"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"xx"),
     "duplicate key `a`"),
    ("duplicate-written-with-escapes", raw_file(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"\\u0061":'
                                                b'{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"xx"),
     "duplicate key `a`"),
    ("duplicate-beside-a-colon", raw_file(b'{"a:":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{},"b":{"dtype":'
                                          b'"U8","shape":[1],"data_offsets":[1,2]}}', b"xx"), "duplicate key `b`"),
    ("metadata-key-twice", raw_file(b'{"__metadata__":{"a":"b","a":"c"}}'), "duplicate key `a`"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "what"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_readers_could_read_differently_is_refused(raw, what):
    with pytest.raises(FormatError) as caught:
        parse(raw)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = [
    ("no-tensors", raw_file({}), 0),
    ("scalar", raw_file({"a": entry("F32", (), (0, 4))}, b"xxxx"), 1),
    ("zero-elements", raw_file({"a": entry("F32", (0, 7), (0, 0))}), 0),
    ("padded-with-spaces", raw_file(json.dumps(ONE).encode() + b"     ", b"xx"), 2),
    ("empty-metadata", raw_file({"__metadata__": {}, **ONE}, b"xx"), 2),
    ("metadata-named-like-a-tensor", raw_file({"__metadata__": {"dtype": "a", "shape": "b", "data_offsets": "c"}}), 0),
    ("fields-in-another-order", raw_file(b'{"a":{"shape":[2],"data_offsets":[0,2],"dtype":"U8"}}', b"xx"), 2),
    ("unicode-name", raw_file({"gewicht-\u00fc\U0001f600": entry()}, b"xx"), 2),
    ("name-of-100-kB", raw_file({"a" * 100_000: entry()}, b"xx"), 2),
    ("tensors-out-of-order", raw_file({"b": entry(offsets=(2, 4)), "a": entry()}, b"xxxx"), 4),
    ("f4-counts-values", raw_file({"a": entry("F4", (3, 4), (0, 6))}, b"xxxxxx"), 12),
    ("f6-counts-values", raw_file({"a": entry("F6_E2M3", (8,), (0, 6))}, b"xxxxxx"), 8),
]


@pytest.mark.parametrize(("raw", "elements"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_odd_but_valid_is_read(raw, elements, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    tensors = open_path(path).tensors.values()
    assert sum(tensor.elements for tensor in tensors) == elements


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())
entries = st.tuples(st.sampled_from(sorted(SAFETENSORS)), st.lists(st.integers(0, 5), max_size=3))


@given(st.dictionaries(names, entries, max_size=6))
@settings(max_examples=60, deadline=None)
def test_reads_what_the_library_reads(tensors):
    """Differential: names, dtypes and shapes are the library's, whatever valid header comes."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        bits = DTYPES[dtype].bits
        shape = [8, *shape] if bits < 8 else shape
        size = torch.Size(shape).numel() * bits // 8
        header[name] = entry(dtype, shape, (at, at + size))
        at += size
    raw = raw_file(header, bytes(at))
    theirs = dict(safetensors.deserialize(raw))
    ours = parse(raw).tensors
    assert {name: (stored.dtype, list(stored.shape)) for name, stored in ours.items()} == {
        name: (content["dtype"], list(content["shape"])) for name, content in theirs.items()
    }


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_never_reads_what_the_library_refuses(data):
    """Differential: one byte of a valid file changed. What we accept, the library accepts and reads the same."""
    raw = bytearray(raw_file({"a": entry("F32", (2, 1), (0, 8)), "bb": entry("U8", (3,), (8, 11))}, b"x" * 11))
    at = data.draw(st.integers(0, len(raw) - 12))
    raw[at] = data.draw(st.integers(0, 255))
    try:
        ours = parse(bytes(raw)).tensors
    except FormatError:
        return
    theirs = dict(safetensors.deserialize(bytes(raw)))
    assert {name: list(stored.shape) for name, stored in ours.items()} == {
        n: list(c["shape"]) for n, c in theirs.items()
    }


@given(st.binary(max_size=200))
@example(struct.pack("<Q", 2) + b"{}")
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_an_error_or_a_header(raw):
    with contextlib.suppress(FormatError):
        assert parse(raw).data_start <= len(raw)


# Folders.


def save(path: Path, **tensors: torch.Tensor) -> None:
    safetensors.torch.save_file(tensors, path)


def sharded(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    save(folder / "model-00001-of-00002.safetensors", a=torch.ones(3, 4))
    save(folder / "model-00002-of-00002.safetensors", b=torch.ones(5))
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    weight_map |= changes
    index = {"metadata": {"total_size": 68}, "weight_map": {k: v for k, v in weight_map.items() if v is not None}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_sharded_folder_is_one_artifact(tmp_path):
    folder = sharded(tmp_path / "model")
    artifact = inspect(folder)
    assert artifact.logical_params == 17
    assert artifact.findings == ()
    assert artifact.file_bytes == sum(file.stat().st_size for file in folder.iterdir()) == sum(artifact.bytes.values())
    assert inspect(folder / "model.safetensors.index.json").logical_params == 17


def outside(folder: Path) -> None:
    save(folder.parent / "x.safetensors", a=torch.ones(3, 4))
    sharded(folder, a="../x.safetensors")


def linked_outside(folder: Path) -> None:
    sharded(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(folder.parent / "x.safetensors")
    shard.symlink_to(folder.parent / "x.safetensors")


def truncated(folder: Path) -> None:
    sharded(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def twice(folder: Path) -> None:
    sharded(folder)
    save(folder / "model-00002-of-00002.safetensors", a=torch.ones(3, 4), b=torch.ones(5))


def both(folder: Path) -> None:
    sharded(folder)
    save(folder / "model.safetensors", a=torch.ones(3, 4))


def no_index(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "other.safetensors")


def deep_config(folder: Path) -> None:
    sharded(folder)
    (folder / "config.json").write_text('{"a":' * 70 + "1" + "}" * 70)


def fifo(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    os.mkfifo(folder / "model-00002-of-00002.safetensors")


FOLDERS = [
    ("index-names-a-file-outside", outside, "only files beneath the folder"),
    ("index-names-an-absolute-path", lambda f: sharded(f, a="/etc/x.safetensors"), "only files beneath"),
    ("index-names-a-nul", lambda f: sharded(f, a="a\0.safetensors"), "only files beneath"),
    ("shard-links-outside", linked_outside, "outside its folder"),
    ("index-names-a-missing-shard", missing_shard, "no such file"),
    ("index-names-a-pickle", lambda f: sharded(f, a="pytorch_model.bin"), "not a safetensors file"),
    (
        "index-names-a-tensor-its-shard-lacks",
        lambda f: sharded(f, c="model-00002-of-00002.safetensors"),
        "not in its shard",
    ),
    (
        "index-leaves-a-tensor-out",
        lambda f: sharded(f, b=None, c="model-00002-of-00002.safetensors"),
        "puts it nowhere",
    ),
    ("tensor-in-two-shards", twice, "also in another shard"),
    ("truncated-shard", truncated, "truncated"),
    ("index-and-single-file", both, "name one"),
    ("several-files-and-no-index", no_index, "no index"),
    ("no-weights", lambda f: f.mkdir(), "no weights"),
    ("config-nested-too-deep", deep_config, "deeper than 64"),
    ("shard-is-a-fifo", fifo, "not a regular file"),
]


@pytest.mark.parametrize(("make", "what"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_a_broken_folder_is_refused_and_says_why(make, what, tmp_path):
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises(FormatError, match=what) as caught:
        inspect(folder)
    assert str(folder) in str(caught.value)


def test_stale_shards_and_totals_are_found(tmp_path):
    folder = sharded(tmp_path / "model")
    save(folder / "model-00001-of-00004.safetensors", a=torch.ones(3, 4))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = 1
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    artifact = inspect(folder)
    assert {finding.check for finding in artifact.findings} == {"orphan-file", "index-total-size"}
    assert artifact.bytes["dead"] == (folder / "model-00001-of-00004.safetensors").stat().st_size
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def test_shards_without_an_index_are_one_artifact_when_complete(tmp_path):
    folder = sharded(tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    assert inspect(folder).logical_params == 17


def test_a_hub_cache_snapshot_reaches_its_own_blobs_and_nothing_else(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save(repository / "blobs" / "1234", a=torch.ones(3, 4))
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert inspect(snapshot).logical_params == 12
    save(tmp_path / "secret", a=torch.ones(3, 4))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="outside its folder"):
        inspect(snapshot)


def test_a_file_that_changes_while_being_read_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, a=torch.ones(300, 40))
    tensor = inspect(path).tensor("a")
    os.truncate(path, 1000)
    with pytest.raises(FormatError, match="changed while being read"):
        tensor.decode()


def test_thousands_of_shards_need_few_descriptors(tmp_path):
    import resource

    weight_map = {}
    for number in range(200):
        name = f"model-{number:05}-of-00200.safetensors"
        (tmp_path / name).write_bytes(raw_file({f"t{number}": entry("F32", (2,), (0, 8))}, bytes(8)))
        weight_map[f"t{number}"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        artifact = inspect(tmp_path)
        assert artifact.logical_params == 400
        assert float(sum(tensor.decode().sum() for tensor in artifact.tensors)) == 0.0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../a", "parent"),
        ("/a", "absolute"),
        ("a/../../b", "parent-inside"),
        ("a\0b", "nul"),
        ("a\\b", "backslash"),
        ("", "empty"),
    ],
)
def test_names_that_leave_the_folder_are_never_opened(name, reason, tmp_path):
    with pytest.raises(FormatError, match="only files beneath"):
        files.open_beneath(str(tmp_path), name)
