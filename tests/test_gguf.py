"""The GGUF container: llama.cpp's limits, every byte in one class, and the names of the unquantized model."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_quantcheck import FormatError, inspect
from pytest_quantcheck.checks.fidelity import compare
from pytest_quantcheck.checks.integrity import check_intact
from pytest_quantcheck.containers import gguf as container
from pytest_quantcheck.containers import gguf_names
from pytest_quantcheck.containers.gguf import REFUSED, TYPES, read_header
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import NotDecodable
from tests import gguf_files
from tests.gguf_files import SIZES, Tensor, architecture, gguf, key, text

A, B = Tensor("a.weight", "F32", (3, 2)), Tensor("b.weight", "Q4_0", (2, 64))


def parse(raw: bytes):
    return read_header(lambda start, stop: raw[start:stop], len(raw))


def with_counts(tensors: int, keys: int) -> bytes:
    return gguf([A], counts=(tensors, keys))


def with_key(raw: bytes) -> bytes:
    return gguf([], [raw])


def with_info(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    raw = b"GGUF" + struct.pack("<Iqq", 3, 1, 0) + text(name)
    raw += struct.pack(f"<I{len(dims)}q", len(dims), *dims) + struct.pack("<IQ", kind, offset)
    return raw + bytes(-len(raw) % 32) + bytes(1024)


BAD = [
    ("empty-file", b"", "truncated"),
    ("magic-alone", b"GGUF", "truncated"),
    ("bad-magic", b"GGML" + gguf([A])[4:], "starts with b'GGML'"),
    ("version-0", gguf([A], version=0), "version 0"),
    ("version-1", gguf([A], version=1), "version 1"),
    ("version-4", gguf([A], version=4), "version 4"),
    ("big-endian-version-before-little-endian-counts",
     b"GGUF" + struct.pack(">I", 3) + gguf([A])[8:], "claims"),
    ("little-endian-version-before-big-endian-counts",
     b"GGUF" + struct.pack("<I", 3) + gguf([A], order=">")[8:], "claims"),
    ("negative-tensors", with_counts(-1, 0), "claims -1 tensors"),
    ("2-to-62-tensors", with_counts(2**62, 0), "no room"),
    ("negative-keys", with_counts(1, -1), "claims -1 keys"),
    ("2-to-62-keys", with_counts(1, 2**62), "no room"),
    ("one-tensor-too-many", with_counts(2, 0), "overlaps"),
    ("empty-key", with_key(key("", "u32", 1)), "empty"),
    ("key-twice", gguf([], [key("a", "u32", 1), key("a", "u32", 2)]), "key `a` appears twice"),
    ("key-not-utf-8", with_key(text(b"\xff") + struct.pack("<II", 4, 1)), "UTF-8"),
    ("key-past-the-end", with_key(struct.pack("<Q", 2**63) + b"abcdef"), "truncated"),
    ("key-of-an-unknown-type", with_key(text("a") + struct.pack("<II", 13, 1)), "type 13"),
    ("text-past-the-end", with_key(text("a") + struct.pack("<IQ", 8, 1000) + b"xyz"), "truncated"),
    ("text-of-2-to-64-bytes", with_key(text("a") + struct.pack("<IQ", 8, 2**64 - 1) + b"xyz"), "truncated"),
    ("array-past-the-end", with_key(text("a") + struct.pack("<IIQ", 9, 4, 2**60)), "claims"),
    ("array-of-texts-past-the-end",
     with_key(text("a") + struct.pack("<IIQ", 9, 8, 2) + text("ok") + struct.pack("<Q", 99)), "truncated"),
    ("array-of-arrays", with_key(text("a") + struct.pack("<IIQIIQ", 9, 9, 1, 9, 4, 0)), "arrays of arrays"),
    ("array-of-an-unknown-type", with_key(text("a") + struct.pack("<IIQ", 9, 13, 0)), "type 13"),
    ("alignment-0", gguf([A], [key("general.alignment", "u32", 0)]), "power of two"),
    ("alignment-48", gguf([A], [key("general.alignment", "u32", 48)]), "power of two"),
    ("alignment-is-u64", gguf([A], [key("general.alignment", "u64", 32)]), "u32"),
    ("name-of-64-bytes", with_info("n" * 64, [4]), "at most 63"),
    ("name-of-32-two-byte-letters", with_info("é" * 32, [4]), "64 bytes"),
    ("name-with-nul", with_info("a\0b", [4]), "NUL"),
    ("name-not-utf-8", with_info(b"\xff", [4]), "UTF-8"),
    ("name-past-the-end", with_info("a", [4])[:24] + struct.pack("<Q", 2**40) + bytes(64), "truncated"),
    ("name-twice", gguf([A, A]), "appears twice"),
    ("five-dimensions", with_info("a", [1, 1, 1, 1, 4]), "5 dimensions"),
    ("2-to-32-dimensions", gguf([])[:8] + struct.pack("<qq", 1, 0) + text("a") + b"\xff" * 60, "dimensions"),
    ("negative-dimension", with_info("a", [-4, -1]), r"shape \[-1, -4\]"),
    ("product-that-wraps-64-bits", with_info("a", [2**32, 2**32]), "2\\^63"),
    ("product-that-wraps-to-4", with_info("a", [2**62 + 1, 4]), "2\\^63"),
    ("row-is-no-multiple-of-the-block", with_info("a", [48, 2], 2), "multiple of 32 for Q4_0"),
    ("row-is-no-multiple-of-256", with_info("a", [32, 8], 12), "multiple of 256 for Q4_K"),
    *((f"type-{name}", with_info("a", [256], number), f"{name}\\), which no file may")
      for number, name in REFUSED.items()),
    ("offset-that-wraps", gguf([A, B._replace(offset=2**64 - 32)]), "hole"),
    ("offset-into-the-header", gguf([A._replace(offset=2**64 - 64)]), "hole"),
    ("first-tensor-not-at-0", gguf([A._replace(offset=32)]), "hole of 32 bytes"),
    ("tensors-overlap", gguf([A, B._replace(offset=0)]), "overlaps"),
    ("offset-unaligned", gguf([A, B._replace(offset=24)]), "multiple of the alignment 32"),
    ("hole-between-tensors", gguf([A, B._replace(offset=64)]), "hole of 32 bytes"),
    ("tensors-out-of-order", gguf([A._replace(offset=96), B._replace(offset=0)]), "hole"),
    ("data-truncated", gguf([A, B])[:-100], "truncated"),
    ("data-missing", gguf([A])[:-32], "truncated"),
    ("trailing-bytes", gguf([A, B]) + b"PK", "2 bytes follow"),
    ("trailing-bytes-without-tensors", gguf([]) + bytes(64), "follow"),
    ("negative-type", with_info("a", [256], 2**32 - 1), "positive i32"),
    ("unknown-type-of-more-values-than-bits", with_info("a", [2**40], 99), "at most 8 in a byte"),
    ("unknown-type-overlaps", gguf([Tensor("a", 99, (4,), bytes(64)), B._replace(offset=32), A._replace(offset=32)]),
     "overlaps|hole|starts"),
    ("unknown-type-then-unaligned", gguf([Tensor("a", 99, (4,), bytes(64)), B._replace(offset=33)]), "alignment"),
    ("unknown-type-then-past-the-end", gguf([Tensor("a", 99, (4,), bytes(64)), B._replace(offset=2**40)]), "truncated"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "what"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_llama_cpp_refuses_is_refused(raw, what, tmp_path):
    with pytest.raises(FormatError, match=what) as caught:
        parse(raw)
    assert "\n" not in str(caught.value)
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(FormatError, match=r"m\.gguf"):
        inspect(tmp_path / "m.gguf")


GOOD = [
    ("no-tensors-no-padding", gguf([]), 0),
    ("no-tensors-and-keys", gguf([], [key("general.architecture", "string", "llama")]), 0),
    ("no-tensors-padded", gguf([]) + bytes(8), 0),
    ("version-2", gguf([A, B], version=2), 134),
    ("big-endian", gguf([A, B], order=">"), 134),
    ("big-endian-version-2", gguf([A, B], order=">", version=2), 134),
    ("alignment-1", gguf([A, B], [key("general.alignment", "u32", 1)], alignment=1), 134),
    ("alignment-4096", gguf([A, B], [key("general.alignment", "u32", 4096)], alignment=4096), 134),
    ("scalar", gguf([Tensor("a", "F32", ())]), 1),
    ("zero-elements", gguf([Tensor("a", "F32", (0, 4)), B]), 128),
    ("zero-rows-of-blocks", gguf([Tensor("a", "Q4_0", (0, 32))]), 0),
    ("four-dimensions", gguf([Tensor("a", "F16", (2, 3, 4, 5))]), 120),
    ("name-of-63-bytes", gguf([Tensor("n" * 63, "F32", (4,))]), 4),
    ("name-not-ascii", gguf([Tensor("gewicht.größe", "F32", (4,))]), 4),
    ("last-tensor-not-padded", gguf([A])[:-8], 6),
    ("empty-texts-and-arrays", gguf([A], [key("a", "string", ""), key("b", "[string]", []), key("c", "[u32]", [])]), 6),
    ("text-that-is-not-utf-8", gguf([A], [key("a", "string", b"\xff")]), 6),
    ("long-text-and-long-array", gguf([A], [key("a", "string", "x" * 9999), key("b", "[f32]", [0.5] * 9999)]), 6),
]


@pytest.mark.parametrize(("raw", "elements"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_odd_but_valid_is_read(raw, elements, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    artifact = inspect(path)
    assert artifact.logical_params == elements
    assert sum(artifact.bytes.values()) == artifact.file_bytes == len(raw)


def test_sizes_are_those_of_the_types():
    """Every type of the table, with the sizes of a second table, of the package, and of file-formats."""
    sizes = {name: (DTYPES[name].block, DTYPES[name].bits // 8) for name in TYPES.values()}
    assert sizes == SIZES
    package = pytest.importorskip("gguf")
    theirs = {kind.name: size for kind, size in package.GGML_QUANT_SIZES.items() if kind.value not in REFUSED}
    assert {name: size for name, size in sizes.items() if name != "Q2_0"} == theirs
    assert {kind.value: kind.name for kind in package.GGMLQuantizationType}.items() <= (TYPES | REFUSED).items()


kinds = st.sampled_from(sorted(SIZES))
names = st.text(max_size=8).filter(str.isprintable).map("{}.weight".format)
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(st.dictionaries(names, st.tuples(kinds, shapes), max_size=5), st.sampled_from([8, 32, 64]))
@settings(max_examples=80, deadline=None)
def test_every_byte_is_in_one_class(tmp_path_factory, tensors, alignment):
    made = [Tensor(name, kind, (*shape[:-1], shape[-1] * SIZES[kind][0])) for name, (kind, shape) in tensors.items()]
    raw = gguf(made, [key("general.alignment", "u32", alignment)], alignment=alignment)
    path = tmp_path_factory.mktemp("bytes") / "m.gguf"
    path.write_bytes(raw)
    artifact = inspect(path)
    assert sum(artifact.bytes.values()) == artifact.file_bytes == len(raw)
    assert sum(tensor.nbytes for tensor in artifact.tensors) == sum(tensor.size for tensor in made)
    assert {tensor.stored.name: tensor.shape for tensor in artifact.tensors} == {t.name: t.shape for t in made}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_one_changed_byte_is_refused_or_read(data):
    """Nothing but a FormatError, and what is read stays within the file."""
    raw = bytearray(gguf([A, B], [key("general.name", "string", "n"), key("tokens", "[string]", ["a", "b"])]))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        header = parse(bytes(raw))
        assert all(0 <= info.start <= info.stop <= len(raw) for info in header.infos)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_read_the_package_reads_the_same(tmp_path_factory, data):
    """Differential: bytes of a header changed. What we accept, GGUFReader reads the same, but for types it has not."""
    package = pytest.importorskip("gguf")
    raw = bytearray(gguf([A, B], [key("general.name", "string", "n"), key("tokens", "[string]", ["a", "b"])]))
    for _ in range(data.draw(st.integers(1, 2))):
        raw[data.draw(st.integers(8, 220))] = data.draw(st.integers(0, 255))
    try:
        ours = parse(bytes(raw)).infos
    except FormatError:
        return
    if any(info.type not in TYPES for info in ours):
        return
    path = tmp_path_factory.mktemp("same") / "m.gguf"
    path.write_bytes(raw)
    theirs = package.GGUFReader(path).tensors
    assert [(info.name, info.shape, info.start, info.stop) for info in ours] == [
        (t.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.data_offset + t.n_bytes) for t in theirs
    ]


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_give_an_answer(raw):
    with contextlib.suppress(FormatError):
        parse(b"GGUF" + struct.pack("<I", 3) + raw)


def test_reads_what_the_package_writes_and_reads(tmp_path):
    """Differential: names, shapes, types, offsets and bytes as GGUFReader has them."""
    package = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = package.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {number}" for number in range(1000)])
    writer.add_array("many", list(range(5000)))
    rng = np.random.default_rng(0)
    for number, kind in enumerate(package.GGML_QUANT_SIZES):
        if kind.value in REFUSED or kind.name.startswith(("F", "I8", "I16", "I32", "I64")):
            continue
        width = package.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor(f"t{number}", rng.integers(0, 256, (3, 2 * width), dtype=np.uint8), raw_dtype=kind)
    writer.add_tensor("f", rng.standard_normal((2, 3, 5)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = package.GGUFReader(path).tensors
    artifact = inspect(path)
    ours = [(t.name, t.stored.dtype, t.shape, t.stored.offset, t.nbytes) for t in artifact.tensors]
    assert ours == [
        (t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in theirs
    ]
    for tensor, other in zip(artifact.tensors, theirs, strict=True):
        assert bytes(tensor.stored.load_bytes().tolist()) == other.data.tobytes()


def test_listing_needs_neither_torch_nor_numpy(tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf([A, B], architecture("llama")))
    code = (
        "import sys; from pytest_quantcheck import inspect; print(inspect(sys.argv[1]).logical_params);"
        "assert not {'torch', 'numpy', 'gguf'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("134\n", "")


def test_a_vocabulary_is_stepped_over(tmp_path):
    """Only the header is read, and it is read once."""
    tokens = [f"token {number}" for number in range(100_000)]
    raw = gguf([A], [key("tokenizer.ggml.tokens", "[string]", tokens), key("general.architecture", "string", "llama")])
    read = []

    def count(start, stop):
        read.append(stop - start)
        return raw[start:stop]

    header = read_header(count, len(raw))
    assert dict(header.values) == {"general.architecture": "llama"}
    assert sum(read) <= len(raw)


def test_metadata_is_limited(monkeypatch):
    """Bytes, keys, tensors and the numbers that are kept: memory does not follow what a header claims."""
    monkeypatch.setattr(container, "KEY_LIMIT", 60)
    monkeypatch.setattr(container, "TENSOR_LIMIT", 60)
    monkeypatch.setattr(container, "KEPT_NUMBERS", 25)
    with pytest.raises(FormatError, match=r"has 61 keys \(limit 60\)"):
        parse(gguf([], [key(f"k{number}", "u8", 1) for number in range(61)]))
    with pytest.raises(FormatError, match=r"has 61 tensors \(limit 60\)"):
        parse(gguf([A._replace(name=f"t{number}") for number in range(61)]))
    lists = parse(gguf([], [key(f"k{number}", "[u8]", range(10)) for number in range(50)])).values
    assert list(lists) == ["k0", "k1"]
    monkeypatch.setattr(container, "METADATA_LIMIT", 4096)
    monkeypatch.setattr(container, "FIRST_READ", 64)
    with pytest.raises(FormatError, match=r"metadata of over 4,096 bytes \(limit 4,096\)"):
        parse(gguf([], [key("a", "string", "x" * 5000)]))
    assert parse(gguf([A], [key("a", "[string]", ["x" * 40] * 50)])).infos[0].name == "a.weight"


def test_unknown_types_are_counted_by_shape(tmp_path):
    """Forks have types of their own: the bytes follow from the next offset, the values cannot be reached."""
    fork = [Tensor(f"blk.{n}.ffn_up.weight", 139, (4, 256), bytes(range(128)) * 4) for n in range(2)]
    (tmp_path / "m.gguf").write_bytes(gguf([fork[0], A, fork[1]]))
    artifact = inspect(tmp_path)
    tensor = artifact.tensor("blk.0.ffn_up.weight")
    assert (tensor.scheme, tensor.shape, tensor.nbytes) == ("ggml-unknown", (4, 256), 512)
    assert artifact.logical_params == 2 * 1024 + 6
    assert sum(artifact.bytes.values()) == artifact.file_bytes
    (finding,) = artifact.findings
    assert (finding.check, finding.severity, finding.tensor) == ("unknown-type", "warning", "blk.0.ffn_up.weight")
    assert "ggml type 139" in finding.message
    assert "2 tensors" in finding.message
    with pytest.raises(NotDecodable):
        tensor.decode()


def test_what_is_no_weight_does_not_count(tmp_path):
    tensors = [
        Tensor("token_embd.weight", "Q8_0", (10, 32)),
        Tensor("rope_freqs.weight", "F32", (64,)),
        Tensor("rope_factors_long.weight", "F32", (48,)),
        Tensor("blk.0.exp_probs_b.bias", "F32", (8,)),
        Tensor("blk.0.ffn_gate_tid2eid.weight", "I32", (10, 2)),
        Tensor("blk.0.attn_q.input_scale", "F32", (1,)),
    ]
    (tmp_path / "m.gguf").write_bytes(gguf(tensors, architecture("llama")))
    artifact = inspect(tmp_path)
    assert (artifact.logical_params, artifact.buffers) == (320, 64 + 48 + 8 + 20 + 1)


@pytest.mark.parametrize(
    ("kind", "name", "params", "adapters", "buffers"),
    [
        ("adapter", "blk.0.attn_q.weight.lora_a", 6, 6, 0),
        ("imatrix", "blk.0.attn_q.weight.in_sum2", 0, 0, 6),
        ("mmproj", "v.blk.0.attn_q.weight", 6, 0, 0),
    ],
)
def test_files_that_are_no_model_say_so(tmp_path, kind, name, params, adapters, buffers):
    (tmp_path / "m.gguf").write_bytes(gguf([A._replace(name=name)], [key("general.type", "string", kind)]))
    artifact = inspect(tmp_path)
    assert (artifact.logical_params, artifact.adapter_params, artifact.buffers) == (params, adapters, buffers)
    assert [finding.severity for finding in artifact.findings] == ["note"]
    assert kind in artifact.findings[0].message


def split_files(folder: Path, count: int = 3, **wrong) -> Path:
    """Write the splits of a model; `wrong` replaces keys: `no1=5` is split.no of the second file."""
    for number in range(count):
        keys = [
            key("split.no", "u16", wrong.get(f"no{number}", number)),
            key("split.count", "u16", wrong.get(f"count{number}", count)),
            key("split.tensors.count", "i32", wrong.get(f"total{number}", count)),
        ]
        name = wrong.get(f"name{number}", f"t{number}")
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        path.write_bytes(gguf([A._replace(name=name)], keys))
    return folder / f"m-00001-of-{count:05}.gguf"


def test_splits_are_one_model(tmp_path):
    first = split_files(tmp_path)
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    for path in (first, tmp_path):
        artifact = inspect(path)
        assert (artifact.logical_params, artifact.file_bytes) == (18, whole)
        assert sum(artifact.bytes.values()) == whole


BAD_SPLITS = [
    ("number-of-another", {"no1": 2}, "split.no 2 of 3"),
    ("count-of-another", {"count2": 4}, "split.no 2 of 4"),
    ("total-is-wrong", {"total0": 4}, "split.tensors.count is 4"),
    ("a-tensor-in-two", {"name2": "t0"}, "is in two splits"),
    ("first-says-it-is-second", {"no0": 1}, "not the first split"),
]


@pytest.mark.parametrize(("wrong", "what"), [row[1:] for row in BAD_SPLITS], ids=[row[0] for row in BAD_SPLITS])
def test_splits_that_do_not_fit_are_refused(tmp_path, wrong, what):
    with pytest.raises(FormatError, match=what):
        inspect(split_files(tmp_path, **wrong))


def test_a_split_alone_is_refused(tmp_path):
    first = split_files(tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    with pytest.raises(FormatError, match=r"not the first split: name `m-00001-of-00003\.gguf`"):
        inspect(second)
    second.unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: no such file"):
        inspect(first)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(FormatError, match="one of 3 splits"):
        inspect(renamed)


def test_a_split_that_links_out_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    first = split_files(tmp_path / "in")
    second = tmp_path / "in" / "m-00002-of-00003.gguf"
    second.rename(tmp_path / "elsewhere.gguf")
    second.symlink_to(tmp_path / "elsewhere.gguf")
    with pytest.raises(FormatError, match="outside its folder"):
        inspect(first)


def test_a_folder_with_two_models_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf([A]))
    (tmp_path / "README.md").write_text("a model")
    artifact = inspect(tmp_path)
    assert artifact.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sum(artifact.bytes.values()) == artifact.file_bytes
    (tmp_path / "b.gguf").write_bytes(gguf([A]))
    with pytest.raises(FormatError, match=r"holds 2 GGUF models \(a.gguf, b.gguf"):
        inspect(tmp_path)


def test_a_file_that_shrinks_is_an_error(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([A, B]))
    tensor = inspect(path).tensor("b.weight")
    os.truncate(path, 100)
    with pytest.raises(FormatError, match="changed"):
        tensor.decode()


def test_a_terabyte_is_listed(tmp_path):
    path = gguf_files.write_sparse(tmp_path / "m.gguf", [Tensor("a.weight", "Q4_K", (8_000_000, 256_000))])
    assert inspect(path).logical_params == 8_000_000 * 256_000


def test_big_endian_blocks_without_a_rule_are_not_decoded(tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf([Tensor("a.weight", "Q5_0", (2, 32))], order=">"))
    artifact = inspect(tmp_path)
    assert artifact.logical_params == 64
    with pytest.raises(NotDecodable, match="big-endian Q5_0"):
        artifact.tensor("a.weight").decode()


BAD_SCALES = [
    ("not-f32", Tensor("a.scale", "F16", (1,)), "F16"),
    ("neither-one-nor-one-each", Tensor("a.scale", "F32", (2,)), r"\[2\] is no scale"),
]


@pytest.mark.parametrize(("scale", "what"), [row[1:] for row in BAD_SCALES], ids=[row[0] for row in BAD_SCALES])
def test_scales_that_do_not_fit_are_refused(tmp_path, scale, what):
    (tmp_path / "m.gguf").write_bytes(gguf([Tensor("a.weight", "NVFP4", (3, 2, 64)), scale]))
    with pytest.raises(FormatError, match=what):
        inspect(tmp_path)


def test_codebooks_need_the_package(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(gguf([Tensor("a.weight", "IQ2_XS", (2, 256))]))
    tensor = inspect(tmp_path).tensor("a.weight")
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(NotDecodable, match=r"pip install 'pytest-quantcheck\[gguf\]'"):
        tensor.decode()


def test_a_scale_that_is_not_finite_is_found(tmp_path):
    """Scales lie between the codes: no tensor of their own to look at."""
    good, bad = struct.pack("<e", 1.0) + bytes(16), struct.pack("<e", float("nan")) + bytes(16)
    (tmp_path / "m.gguf").write_bytes(gguf([Tensor("a.weight", "Q4_0", (3, 32), good + bad + good)]))
    verdict = check_intact(inspect(tmp_path))
    assert not verdict.passed
    assert "a.weight: 32 of 96 values are NaN or infinite" in "\n".join(verdict.details)
    (tmp_path / "m.gguf").write_bytes(gguf([Tensor("a.weight", "Q4_0", (3, 32), 3 * good)]))
    assert check_intact(inspect(tmp_path)).passed


# --- names ---


@pytest.mark.parametrize("name", sorted(gguf_names.ARCHITECTURES))
def test_names_are_those_of_the_package(name):
    """Every name of our table leads back, through the package's map, to the name it came from."""
    package = pytest.importorskip("gguf")
    number = {value: kind for kind, value in package.MODEL_ARCH_NAMES.items()}[name]
    theirs = package.get_tensor_name_map(number, 3)
    layers, modules = gguf_names.ARCHITECTURES[name]
    known = {kind: form for kind, form in package.TENSOR_NAMES.items() if kind in package.MODEL_TENSORS[number]}
    ours = {form.format(bid=1) for form in known.values()}
    for here, there in modules.items():
        full = f"blk.1.{here}" if f"blk.1.{here}" in ours else here
        if full not in ours:
            continue  # a row of the shared table that this architecture does not have
        place = f"{layers}.1.{there}" if full.startswith("blk.") else there
        assert theirs.get_name(place) == full
    assert {"token_embd", "output_norm", "blk.1.attn_norm", "blk.1.ffn_down"} & ours <= {
        *modules, *(f"blk.1.{module}" for module in modules)
    }  # fmt: skip


TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "command-r": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
}


def as_gguf(model, arch: str, kinds: dict[str, str]) -> list[Tensor]:
    """The tensors of a transformers model as llama.cpp's converter writes them; `kinds` says which are not F32."""
    package = pytest.importorskip("gguf")
    number = {value: kind for kind, value in package.MODEL_ARCH_NAMES.items()}[arch]
    names = package.get_tensor_name_map(number, 2)
    heads = {"q_proj": 4, "k_proj": 2}
    made = []
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        here = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert here, name
        module = name.split(".")[-2]
        if arch in gguf_names.PAIRED and module in heads:
            value = value.reshape(heads[module], 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if arch in gguf_names.SHIFTED and name.endswith("norm.weight"):
            value = value + 1
        if arch == "gpt2" and module in ("c_attn", "c_proj", "c_fc") and name.endswith(".weight"):
            value = value.t()
        kind = kinds.get(here.rpartition(".")[0].rpartition(".")[2], "F32") if value.ndim > 1 else "F32"
        raw = value.contiguous().numpy()
        if kind != "F32":
            raw = package.quants.quantize(raw, package.GGMLQuantizationType[kind])
        made.append(Tensor(here, kind, tuple(value.shape), raw.tobytes()))
    return made


def tiny_model(config: str, options: dict):
    import transformers

    torch.manual_seed(0)
    settings_ = {name: value for name, value in TINY.items() if config != "GPT2Config" or name == "vocab_size"}
    made = getattr(transformers, config)(**settings_ | options)
    model = transformers.AutoModelForCausalLM.from_config(made).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_that_of_the_transformers_model(tmp_path, name):
    """A model as its converter writes it: every name, shape and value is the model's, to the last bit."""
    arch = name.removesuffix("-biased")
    model = tiny_model(*MODELS[name])
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(as_gguf(model, arch, {}), architecture(arch, head_count=4, head_count_kv=2)))
    artifact = inspect(path)
    assert artifact.logical_params == sum(parameter.numel() for parameter in model.parameters())
    parameters = dict(model.named_parameters())
    assert {tensor.name for tensor in artifact.tensors} == set(parameters)
    for tensor in artifact.tensors:
        expected = parameters[tensor.name].detach()
        expected = expected.t() if tensor.transposed else expected
        assert tensor.shape == tuple(expected.shape)
        decoded = tensor.decode().view(expected.shape)
        assert torch.allclose(decoded, expected, rtol=0, atol=2e-7 if arch in gguf_names.SHIFTED else 0)


def test_fidelity_is_seen_through_names_and_rows(tmp_path):
    """A quantized file against the model it was made from: all tensors found, q and k included."""
    model = tiny_model("LlamaConfig", {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96})
    kinds = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), "Q8_0")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "m.gguf").write_bytes(
        gguf(as_gguf(model, "llama", kinds), architecture("llama", head_count=4, head_count_kv=2))
    )
    comparison = compare(inspect(tmp_path / "q"), inspect(model))
    assert comparison.passed, comparison.findings
    assert len(comparison.tensors) == len(list(model.parameters()))
    assert comparison.sqnr_db > 42


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_values_are_those_that_transformers_loads(tmp_path, arch):
    """Differential: transformers reads the file with the package's decode, its own names and its own row order."""
    import transformers

    model = tiny_model(MODELS[arch][0], {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96})
    numbers = {"head_count": 4, "head_count_kv": 2, "block_count": 2, "context_length": 128}
    keys = [
        *architecture(arch, **numbers, embedding_length=64, feed_forward_length=96, vocab_size=40),
        key(f"{arch}.attention.key_length", "u32", 16),
        key(f"{arch}.attention.layer_norm_rms_epsilon", "f32", 1e-6),
        key(f"{arch}.rope.freq_base", "f32", 10000.0),
        key("tokenizer.ggml.tokens", "[string]", [f"t{number}" for number in range(40)]),
    ]
    tensors = as_gguf(model, arch, {"attn_q": "Q8_0", "attn_k": "Q5_0", "ffn_up": "Q4_1", "token_embd": "F16"})
    (tmp_path / "m.gguf").write_bytes(gguf(tensors, keys))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    artifact = inspect(tmp_path)
    assert artifact.logical_params == sum(parameter.numel() for parameter in loaded.parameters())
    theirs = dict(loaded.named_parameters())
    assert {tensor.name for tensor in artifact.tensors} == set(theirs)
    for tensor in artifact.tensors:
        assert torch.equal(tensor.decode().view(tensor.shape), theirs[tensor.name].detach()), tensor.name


def test_names_of_unknown_architectures_are_kept(tmp_path):
    """So are those of q and k where the number of heads, and with it the order of the rows, is not known."""
    tensors = [Tensor("blk.0.attn_q.weight", "F32", (8, 4)), Tensor("blk.0.ffn_up.weight", "F32", (4, 4))]
    for keys, expected in (
        (architecture("mamba"), ["blk.0.attn_q.weight", "blk.0.ffn_up.weight"]),
        ([], ["blk.0.attn_q.weight", "blk.0.ffn_up.weight"]),
        (architecture("llama"), ["blk.0.attn_q.weight", "model.layers.0.mlp.up_proj.weight"]),
        (architecture("llama", head_count=3), ["blk.0.attn_q.weight", "model.layers.0.mlp.up_proj.weight"]),
        (architecture("qwen3"), ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]),
    ):
        (tmp_path / "m.gguf").write_bytes(gguf(tensors, keys))
        artifact = inspect(tmp_path)
        assert [tensor.name for tensor in artifact.tensors] == expected
        assert artifact.tensor("blk.0.attn_q.weight").shape == (8, 4)  # the name in the file finds it too


def test_a_name_is_given_once(tmp_path):
    """A file may hold a tensor under either name; both are there, and each has a name of its own."""
    tensors = [A._replace(name="output_norm.weight"), A._replace(name="model.norm.weight")]
    (tmp_path / "m.gguf").write_bytes(gguf(tensors, architecture("llama")))
    assert [tensor.name for tensor in inspect(tmp_path).tensors] == ["output_norm.weight", "model.norm.weight"]


def test_heads_may_differ_by_layer(tmp_path):
    tensors = [Tensor(f"blk.{layer}.attn_q.weight", "F32", (8, 4)) for layer in range(2)]
    keys = [*architecture("llama"), key("llama.attention.head_count", "[i32]", [2, 1])]
    (tmp_path / "m.gguf").write_bytes(gguf(tensors, keys))
    assert [tensor.paired_rows for tensor in inspect(tmp_path).tensors] == [4, 8]


def test_stacks_of_experts_are_named_like_their_matrices(tmp_path):
    tensors = [Tensor("blk.0.ffn_gate_exps.weight", "Q4_0", (8, 4, 32))]
    for keys, expected in (
        (architecture("llama", expert_count=8), "model.layers.0.block_sparse_moe.experts.w1.weight"),
        (architecture("qwen3moe", expert_count=8), "model.layers.0.mlp.experts.gate_proj.weight"),
    ):
        (tmp_path / "m.gguf").write_bytes(gguf(tensors, keys))
        (tensor,) = inspect(tmp_path).tensors
        assert (tensor.name, tensor.shape, tensor.params) == (expected, (8, 4, 32), 1024)


# --- one model in several types, and the sizes that are published ---


class Shape:
    """A decoder as GGUF has it: rows, columns and layers."""

    def __init__(self, vocab, hidden, intermediate, layers, kv, rope=False):
        self.vocab, self.hidden, self.intermediate, self.layers, self.kv = vocab, hidden, intermediate, layers, kv
        self.rope = rope

    def tensors(self, kind_of) -> list[Tensor]:
        """The tensors, the type of each matrix given by `kind_of(module, layer)`."""
        hidden, made = self.hidden, [Tensor("rope_freqs.weight", "F32", (64,))] if self.rope else []
        made += [
            Tensor("token_embd.weight", kind_of("token_embd", 0), (self.vocab, hidden)),
            Tensor("output.weight", kind_of("output", 0), (self.vocab, hidden)),
            Tensor("output_norm.weight", "F32", (hidden,)),
        ]
        matrices = {
            "attn_q": (hidden, hidden), "attn_k": (self.kv, hidden), "attn_v": (self.kv, hidden),
            "attn_output": (hidden, hidden), "ffn_gate": (self.intermediate, hidden),
            "ffn_up": (self.intermediate, hidden), "ffn_down": (hidden, self.intermediate),
        }  # fmt: skip
        for layer, (module, shape) in itertools.product(range(self.layers), matrices.items()):
            made.append(Tensor(f"blk.{layer}.{module}.weight", kind_of(module, layer), shape))
        for layer, module in itertools.product(range(self.layers), ("attn_norm", "ffn_norm")):
            made.append(Tensor(f"blk.{layer}.{module}.weight", "F32", (hidden,)))
        return made


MISTRAL = Shape(32000, 4096, 14336, 32, 1024)
LLAMA_3_1 = Shape(128256, 4096, 14336, 32, 1024, rope=True)


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth, and every third in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def q4_0(module: str, layer: int) -> str:
    return "Q6_K" if module == "output" else "Q4_0"


def q4_k_s(module: str, layer: int) -> str:
    early = module in ("attn_v", "ffn_down") and layer < 4
    return "Q6_K" if module == "output" else "Q5_K" if early else "Q4_K"


def q4_k_m(module: str, layer: int) -> str:
    six = module in ("attn_v", "ffn_down") and more_bits(layer, 32)
    return "Q6_K" if module == "output" or six else "Q4_K"


PUBLISHED = [
    ("mistral-7b-instruct-v0.1.Q4_0", MISTRAL, q4_0, 7_241_732_096, 4_108_181_504),
    ("mistral-7b-instruct-v0.1.Q4_K_S", MISTRAL, q4_k_s, 7_241_732_096, 4_139_638_784),
    ("Meta-Llama-3.1-8B-Instruct-Q4_K_M", LLAMA_3_1, q4_k_m, 8_030_261_248, 4_912_898_304),
]


@pytest.mark.parametrize(
    ("shape", "recipe", "params", "size"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED]
)
def test_published_sizes_to_the_byte(tmp_path, shape, recipe, params, size):
    path = gguf_files.write_sparse(
        tmp_path / "m.gguf", shape.tensors(recipe), architecture("llama", head_count=32, head_count_kv=8)
    )
    artifact = inspect(path)
    assert artifact.logical_params == params
    assert sum(tensor.nbytes for tensor in artifact.tensors) == size
    assert sum(artifact.bytes.values()) == artifact.file_bytes == path.stat().st_size


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_counts_do_not_depend_on_the_type(tmp_path, kind):
    """One model written in every type has one count, with or without a head of its own."""
    shape = Shape(300, 256, 512, 3, 128)
    tensors = shape.tensors(lambda module, layer: kind)
    (tmp_path / "m.gguf").write_bytes(gguf(tensors, architecture("llama", head_count=4, head_count_kv=2)))
    layer = 256 * (256 + 128 + 128 + 256 + 3 * 512) + 2 * 256
    assert inspect(tmp_path).logical_params == 2 * 300 * 256 + 256 + 3 * layer
    tied = [tensor for tensor in tensors if tensor.name != "output.weight"]
    (tmp_path / "m.gguf").write_bytes(gguf(tied))
    assert inspect(tmp_path).logical_params == 300 * 256 + 256 + 3 * layer
