"""The torch container: equal to torch.load where both read, strict where readers could differ, and nothing is run."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_quantcheck import FormatError, UnknownEncoding, inspect
from pytest_quantcheck.containers import open_path, pickle_records
from pytest_quantcheck.dtypes import DTYPES, SAFETENSORS
from pytest_quantcheck.tensor import StoredTensor
from tests import models


def save(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def value_of(stored: StoredTensor) -> torch.Tensor:
    return stored.load().view(stored.shape)


def whole_row_major(tensor: torch.Tensor) -> bytes:
    fresh = tensor.detach().clone(memory_format=torch.contiguous_format)
    return fresh.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def hold_to_torch(path: Path, key: str = "") -> None:
    """Names, dtypes, shapes, values and ties are torch's; every byte of the file is in one class."""
    theirs = torch.load(path, weights_only=True)
    for part in filter(None, key.split(".")):
        theirs = theirs[part]
    ours = open_path(path)
    assert ours.tensors.keys() | ours.aliases.keys() == theirs.keys()
    for name, expected in theirs.items():
        stored = ours.tensors[ours.aliases.get(name, name)]
        assert stored.shape == tuple(expected.shape)
        assert DTYPES[stored.dtype].torch == str(expected.dtype).removeprefix("torch.")
        assert bytes(stored.read(limit=1 << 30)) == whole_row_major(expected)
        if expected.numel():
            assert bytes(value_of(stored).view(-1).view(torch.uint8).numpy()) == whole_row_major(expected)
    weighed = sum(stored.nbytes for stored in ours.tensors.values()) + sum(ours.overhead.values())
    assert weighed == ours.file_bytes == path.stat().st_size


# Differential: what torch.save writes.

NUMBERS = [DTYPES[name].torch for name in sorted(SAFETENSORS) if DTYPES[name].torch] + ["complex128"]
OLD_NUMBERS = set(pickle_records.STORAGES.values())


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(48, dtype=torch.uint8)
    return {name: raw.clone().view(getattr(torch, name)) if name != "bool" else raw > 20 for name in NUMBERS}


def shared() -> dict[str, torch.Tensor]:
    big, other = torch.randn(31, 17), torch.randn(5, 6, 7, dtype=torch.float64)
    return {
        "embed.weight": big,
        "head.weight": big,
        "turned": big.t(),
        "row": big[3],
        "rows": big[2:9],
        "columns": big[:, 3:11],
        "permuted": other.permute(2, 0, 1),
        "steps": torch.arange(1000)[::3],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
    }


def parameters() -> dict[str, torch.Tensor]:
    return {"w": torch.nn.Parameter(torch.randn(7, 5)), "b": torch.nn.Parameter(torch.randn(5), requires_grad=False)}


def module() -> object:
    layer = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5))
    layer[2].weight = torch.nn.Parameter(layer[0].weight.t())
    return layer.state_dict()


def halves() -> dict[str, torch.Tensor]:
    fused = torch.randn(12, 8, dtype=torch.bfloat16)
    return {"q.weight": fused[:4], "k.weight": fused[4:8], "v.weight": fused[8:], "qkv.weight": fused}


MADE = [
    ("every-dtype", every_dtype),
    ("views-and-ties", shared),
    ("parameters", parameters),
    ("module", module),
    ("halves-of-a-fused-weight", halves),
    ("empty", dict),
    ("ordered", lambda: collections.OrderedDict(a=torch.ones(2, 3))),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("make", [row[1] for row in MADE], ids=[row[0] for row in MADE])
def test_reads_what_torch_reads(make, as_zip, protocol, tmp_path):
    value = make()
    if not as_zip:  # torch cannot read back what has no typed storage
        value = {name: t for name, t in value.items() if name not in NUMBERS or name in OLD_NUMBERS}
    path = tmp_path / "a.bin"
    save(path, value, _use_new_zipfile_serialization=as_zip, pickle_protocol=protocol)
    if protocol == 2:
        hold_to_torch(path)
    reference = save(tmp_path / "b.bin", value)  # torch reads protocol 2 only with weights_only
    ours, theirs = open_path(path), open_path(reference)
    shown = [[(s.name, s.dtype, s.shape, s.nbytes, s.role) for s in c.tensors.values()] for c in (ours, theirs)]
    assert shown[0] == shown[1]


tensors = st.builds(
    lambda shape, dtype, cut: (torch.randn(*shape).to(dtype), cut),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    st.tuples(st.permutations(range(4)), st.integers(0, 2), st.integers(1, 3)),
)


@given(st.lists(tensors, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_view_reads_as_torch_has_it(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("views") / "a.bin"
    state = {}
    for number, (tensor, (order, start, step)) in enumerate(made):
        view = tensor.permute([dim for dim in order if dim < tensor.dim()])
        state[f"t{number}"] = view[start::step]
    save(path, state)
    hold_to_torch(path)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "state_dict.model"])
def test_nested_state_dicts_are_found(key, tmp_path):
    value: object = {"w": torch.ones(3, 4)}
    for part in reversed(key.split(".")):
        value = {
            "epoch": 3,
            part: value,
            "optimizer": {"state": {0: {"m": torch.zeros(3, 4)}}, "groups": [{"lr": 0.1}]},
        }
    path = save(tmp_path / "a.ckpt", value)
    hold_to_torch(path, key)
    artifact = inspect(path)
    assert artifact.logical_params == 12
    assert artifact.bytes["dead"] == 48 * len(key.split("."))
    assert {finding.check for finding in artifact.findings} == {"state-dict-key", "dead-storage"}


def test_what_trainers_leave_beside_the_weights_stays_inert(tmp_path):
    """numpy scalars and arrays, devices, sizes, bytes and sets are records; nothing of them is made."""
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    beside = {
        "optimizer": optimizer.state_dict(),
        "best": numpy.float64(0.5),
        "random": numpy.random.default_rng(1).integers(9, size=7),
        "rng": torch.get_rng_state(),
        "device": torch.device("cpu"),
        "shape": torch.Size([1, 2]),
        "raw": b"abc\xff",
        "seen": {1, 2},
        "more": bytearray(b"x"),
        "dtype": torch.bfloat16,
        "z": complex(1, 2),
        "large": 2**80,
    }
    for protocol in (2, 4):
        path = save(
            tmp_path / f"{protocol}.ckpt", {"state_dict": layer.state_dict(), **beside}, pickle_protocol=protocol
        )
        artifact = inspect(path)
        assert artifact.logical_params == 15
        assert sum(artifact.bytes.values()) == artifact.file_bytes
    assert artifact.bytes["dead"] >= 2 * 60


REFUSED = [
    ("sparse", lambda: torch.eye(3).to_sparse(), "w: is a sparse_tensor of torch, which is not read"),
    ("on-meta", lambda: torch.ones(3, device="meta"), "w: is a meta_tensor_no_storage of torch"),
    ("conjugate", lambda: torch.ones(3, dtype=torch.complex64).conj(), "w: is stored, but its conjugate"),
    ("torch-ao-quantized", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch.ao quantized"),
]


@pytest.mark.parametrize(("make", "what"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_tensors_that_are_not_their_bytes_are_refused(make, what, tmp_path):
    path = save(tmp_path / "a.bin", {"w": make(), "v": torch.ones(2)})
    with pytest.raises(UnknownEncoding) as caught:
        inspect(path)
    assert what in str(caught.value)


def test_dead_storage_behind_a_view_is_found(tmp_path):
    artifact = inspect(save(tmp_path / "a.pt", {"v": torch.randn(1000)[:10], "w": torch.randn(5), "epoch": 3}))
    assert (artifact.logical_params, artifact.bytes["unquantized"], artifact.bytes["dead"]) == (15, 60, 3960)
    found = {finding.check: finding for finding in artifact.findings}
    assert found["dead-storage"].tensor == "v"
    assert "`epoch`" in found["not-a-tensor"].message


def test_what_shares_a_storage_counts_once(tmp_path):
    artifact = inspect(save(tmp_path / "a.bin", halves()))
    assert artifact.logical_params == 96
    assert artifact.tied_params == 96
    tied = torch.randn(7, 3)
    artifact = inspect(save(tmp_path / "b.bin", {"a.weight": tied, "b.weight": tied, "b.bias": torch.ones(7)}))
    assert (artifact.logical_params, artifact.tied_params) == (28, 21)
    artifact = inspect(save(tmp_path / "c.bin", {"a.weight": tied, "b.weight": tied}))
    assert (artifact.logical_params, artifact.tied_params, artifact.aliases) == (21, 21, {"b.weight": "a.weight"})


def test_views_that_overlap_in_part_are_refused(tmp_path):
    big = torch.randn(10)
    with pytest.raises(FormatError, match="shares a part of its bytes with `a`"):
        inspect(save(tmp_path / "a.bin", {"a": big[:6], "b": big[4:]}))
    with pytest.raises(FormatError, match="rows overlap"):
        inspect(save(tmp_path / "b.bin", {"a": big.as_strided((4, 4), (2, 1))}))


def big_endian(path: Path) -> Path:
    """The file as a big-endian machine writes it: every number of every storage turned round."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    root = path.stem
    value = torch.load(path, weights_only=True)
    for key, tensor in enumerate(value.values()):
        width = tensor.element_size() // (2 if tensor.is_complex() else 1)
        raw = members[f"{root}/data/{key}"]
        members[f"{root}/data/{key}"] = b"".join(raw[at : at + width][::-1] for at in range(0, len(raw), width))
    members[f"{root}/byteorder"] = b"big"
    turned = path.with_name("big.bin")
    with zipfile.ZipFile(turned, "w") as target:
        for name, content in members.items():
            target.writestr(zipfile.ZipInfo(name), content)
    return turned


def test_big_endian_storages_are_turned_round(tmp_path):
    names = ("float32", "bfloat16", "int64", "uint8", "complex64", "complex128", "float64")
    value = {name: torch.arange(8).to(getattr(torch, name)).view(2, 4) for name in names}
    value["scalar"] = torch.tensor(3.5)
    turned = big_endian(save(tmp_path / "a.bin", value))
    theirs = torch.load(turned, weights_only=True)
    for name, stored in open_path(turned).tensors.items():
        assert torch.equal(theirs[name], value[name])
        assert torch.equal(value_of(stored), value[name])


def test_large_views_are_read_in_windows(tmp_path):
    matrix = torch.randn(700, 3000)
    artifact = inspect(save(tmp_path / "a.bin", {"w": matrix.t(), "steps": torch.arange(200_000.0)[::5]}))
    tensor = artifact.tensor("w")
    assert torch.equal(torch.cat([tensor.decode(*window) for window in tensor.windows(1 << 16)]), matrix.t())
    assert torch.equal(artifact.tensor("steps").decode()[0], torch.arange(200_000.0)[::5])


# Real models.


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_counts_are_those_of_the_safetensors_twin(kind, tmp_path):
    models.save(kind, tmp_path / "safe")
    state = models.load(tmp_path / "safe").state_dict()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    save(tmp_path / "torch" / "pytorch_model.bin", state)
    hold_to_torch(tmp_path / "torch" / "pytorch_model.bin")
    safe, ours = inspect(tmp_path / "safe"), inspect(tmp_path / "torch")
    assert ours.logical_params == safe.logical_params == models.parameters(kind)
    assert ours.bytes["unquantized"] == safe.bytes["unquantized"]
    assert sum(ours.bytes.values()) == ours.file_bytes
    if kind != "mixtral":  # transformers fuses experts in memory and saves them one by one
        assert {t.name: t.shape for t in ours.parameters} == {t.name: t.shape for t in safe.parameters}


@pytest.mark.parametrize("options", [models.NF4, models.INT8], ids=["nf4", "int8"])
def test_bitsandbytes_state_dicts_reach_their_scheme(options, tmp_path):
    models.save("llama", tmp_path / "m")
    model = models.load(tmp_path / "m", **options)
    path = save(tmp_path / "q.bin", model.state_dict())
    hold_to_torch(path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "q.safetensors")
    ours, safe, live = inspect(path), inspect(tmp_path / "q.safetensors"), inspect(model)
    assert ours.logical_params == safe.logical_params == live.logical_params == models.parameters("llama")
    assert ours.quantized_params == safe.quantized_params > 0
    for tensor in safe.tensors:
        mine = ours.tensor(tensor.name)
        assert (mine.scheme, mine.shape) == (tensor.scheme, tensor.shape)
        assert torch.equal(mine.decode(), tensor.decode())
    assert sum(ours.bytes.values()) == ours.file_bytes


def test_nothing_is_imported_for_listing(tmp_path):
    path = save(tmp_path / "a.bin", {"w": torch.ones(3, 4).t()})
    code = (
        "import sys; from pytest_quantcheck import count_params; "
        f"assert count_params({str(path)!r}) == 12; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tied_head_with_a_bias_of_its_own_is_no_mismatch(tmp_path):
    weight = torch.randn(31, 8)
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight, "lm_head.bias": torch.ones(31)}
    save(tmp_path / "pytorch_model.bin", state)
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    artifact = inspect(tmp_path)
    assert (artifact.logical_params, artifact.tied_params, artifact.findings) == (31 * 8 + 31, 31 * 8, ())


def test_storages_over_4_gib_are_read_where_they_are(tmp_path):
    """Sparse: memory and disk that nobody touches. The zip records then have 64 bits."""
    path = tmp_path / "a.bin"
    with torch.serialization.skip_data():
        save(path, {"a": torch.empty(5 << 30, dtype=torch.uint8).view(torch.float16), "b": torch.empty(3, 4)})
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("a/data/1").header_offset
    raw = struct.pack("<12f", *range(12))
    with open(path, "r+b") as file:
        file.seek(at + 26)
        name, extra = struct.unpack("<2H", file.read(4))
        file.seek(at + 30 + name + extra)
        file.write(raw)
    artifact = inspect(path)
    assert artifact.logical_params == (5 << 29) + 12
    assert sum(artifact.bytes.values()) == artifact.file_bytes > 5 << 30
    assert torch.equal(artifact.tensor("b").decode(), torch.arange(12.0).view(3, 4))


def test_the_command_line_says_it_in_one_line(tmp_path):
    path = hostile(tmp_path / "evil.bin", pickle.dumps(Evil(os.system, f"touch {tmp_path}/pwned"), 2))
    command = [sys.executable, "-m", "pytest_quantcheck", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"quantcheck: error: {path}: pickle: names `posix.system`")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


# Strictness.


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def rezip(members: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            file.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def plain(tmp_path: Path) -> Path:
    return save(tmp_path / "a.bin", {"w": torch.arange(12.0).view(3, 4), "v": torch.ones(5)})


def patched(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def central(raw: bytes, name: bytes) -> int:
    return raw.rindex(name) - 46


def in_local_header(path: Path, at: int, new: bytes) -> bytes:
    raw = path.read_bytes()
    return patched(raw, raw.index(b"a/data/0") - 30 + at, new)


def twice(path: Path) -> bytes:
    return rezip([*members_of(path).items(), ("a/data/0", b"x" * 48)])


def overlapping(path: Path) -> bytes:
    raw = path.read_bytes()
    at = central(raw, b"a/data/1") + 42
    return patched(raw, at, raw[central(raw, b"a/data/0") + 42 :][:4])


def longer(path: Path) -> bytes:
    raw = path.read_bytes()
    return patched(raw, central(raw, b"a/data/0") + 20, struct.pack("<II", 148, 148))


def changed(path: Path, **members: bytes) -> bytes:
    return rezip(members_of(path) | {f"a/{name}": content for name, content in members.items()})


def without(path: Path, name: str) -> bytes:
    return rezip({key: content for key, content in members_of(path).items() if key != name})


def with_hole(path: Path) -> bytes:
    """A hole between the last member and the directory, every record moved accordingly."""
    raw = rezip(members_of(path))
    at = raw.index(b"PK\1\2")
    moved = raw[:at] + bytes(9) + raw[at:]
    return patched(moved, len(moved) - 6, struct.pack("<I", at + 9))


def marked_as_a_folder(path: Path) -> bytes:
    """torch 2.13 returns uninitialized memory for it."""
    raw = path.read_bytes()
    return patched(raw, central(raw, b"a/data/0") + 38, b"\x10")


def behind_the_pickle(path: Path) -> bytes:
    return changed(path, **{"data.pkl": members_of(path)["a/data.pkl"] + b"N."})


BROKEN = [
    ("empty-file", lambda p: b"", "neither a zip"),
    ("text", lambda p: b"hello world, this is no checkpoint", "neither a zip"),
    ("pickle-that-is-no-torch-file", lambda p: pickle.dumps({"a": 1}), "neither a zip"),
    ("deflated", lambda p: rezip(members_of(p), zipfile.ZIP_DEFLATED), "compressed (method 8)"),
    ("duplicate-member", twice, "twice"),
    ("two-members-in-one-place", overlapping, "named otherwise"),
    ("member-reaches-into-the-next", longer, "overlaps"),
    ("hole", with_hole, "of no member"),
    ("truncated", lambda p: p.read_bytes()[:-30], "truncated"),
    ("truncated-in-the-data", lambda p: p.read_bytes()[:600], "truncated"),
    ("trailing-bytes", lambda p: p.read_bytes() + b"MZ", "bytes follow"),
    ("bytes-before", lambda p: b"PK" + p.read_bytes(), "does not point to the record"),
    ("comment", lambda p: patched(p.read_bytes(), len(p.read_bytes()) - 2, b"\2\0") + b"hi", "bytes follow"),
    ("encrypted", lambda p: patched(p.read_bytes(), central(p.read_bytes(), b"a/data/0") + 8, b"\1"), "encrypted"),
    ("marked-as-a-folder", marked_as_a_folder, "marked as a folder"),
    ("name-differs", lambda p: in_local_header(p, 37, b"7"), "named otherwise"),
    ("flags-differ", lambda p: in_local_header(p, 6, b"\0"), "something else"),
    ("other-folder", lambda p: rezip(members_of(p) | {"b/c": b""}), "one folder"),
    ("parent-folder", lambda p: rezip(members_of(p) | {"a/../b": b""}), "named"),
    ("no-pickle", lambda p: without(p, "a/data.pkl"), "no torch checkpoint"),
    ("no-storage", lambda p: without(p, "a/data/0"), "is not there"),
    ("short-storage", lambda p: changed(p, **{"data/0": b"x" * 47}), "has 47 bytes (the pickle says 48)"),
    ("byteorder", lambda p: changed(p, byteorder=b"middle"), "`little` nor `big`"),
    ("torchscript", lambda p: changed(p, **{"constants.pkl": b""}), "TorchScript"),
    ("exported-program", lambda p: changed(p, archive_format=b"pt2"), "exported program"),
    ("bytes-behind-the-pickle", behind_the_pickle, "follow the pickle"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "what"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_what_readers_could_read_differently_is_refused(make, what, tmp_path):
    content = make(plain(tmp_path))
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        inspect(path)
    assert any(part in str(caught.value) for part in what.split("|")), str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_wrong_checksums_are_found_when_the_data_is_read(tmp_path):
    raw = plain(tmp_path).read_bytes()
    at = raw.index(struct.pack("<4f", 0, 1, 2, 3))
    path = tmp_path / "damaged.bin"
    path.write_bytes(patched(raw, at + 5, b"\x55"))
    artifact = inspect(path)  # listing reads no values
    assert artifact.logical_params == 17
    with pytest.raises(FormatError, match=r"storage `0` has the checksum .* damaged"):
        artifact.tensor("w").decode(1, 2)
    artifact.tensor("v").decode()
    path.write_bytes(raw.replace(b"X\x01\x00\x00\x00w", b"X\x01\x00\x00\x00x"))
    with pytest.raises(FormatError, match=r"data\.pkl` has the checksum"):
        inspect(path)


def test_files_without_checksums_are_read_and_say_so(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = plain(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    artifact = inspect(path)
    assert [finding.check for finding in artifact.findings] == ["no-checksum"]
    assert torch.equal(artifact.tensor("w").decode(), torch.arange(12.0).view(3, 4))


def test_members_that_no_tensor_uses_are_dead(tmp_path):
    path = tmp_path / "more.bin"
    path.write_bytes(changed(plain(tmp_path), **{"data/7": b"x" * 100, "evil.py": b"import os"}))
    artifact = inspect(path)
    assert artifact.bytes["dead"] == 109
    assert [finding.check for finding in artifact.findings] == ["orphan-member"] * 2
    assert sum(artifact.bytes.values()) == artifact.file_bytes


LEGACY = [
    ("truncated", lambda raw: raw[:-1], "truncated"),
    ("truncated-in-the-pickle", lambda raw: raw[:200], "truncated"),
    ("trailing-bytes", lambda raw: raw + b"x", "1 bytes follow the last storage"),
    ("other-protocol", lambda raw: raw.replace(b"M\xe9\x03", b"M\xea\x03", 1), "1001"),
    ("other-size", lambda raw: raw.replace(struct.pack("<Q", 12), struct.pack("<Q", 11)), "elements"),
]


@pytest.mark.parametrize(("change", "what"), [row[1:] for row in LEGACY], ids=[row[0] for row in LEGACY])
def test_broken_legacy_files_are_refused(change, what, tmp_path):
    path = tmp_path / "a.pt"
    save(path, {"w": torch.arange(12.0).view(3, 4)}, _use_new_zipfile_serialization=False)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError, match=what):
        inspect(path)


# Pickles from strangers.


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile(path: Path, program: bytes) -> Path:
    path.write_bytes(rezip({"a/data.pkl": program, "a/version": b"3\n", "a/byteorder": b"little"}))
    return path


def nested_key() -> bytes:
    """Nested tuples that share their halves, as the key of a dict: hashing them takes 2 to the 60th steps."""
    return b"\x80\x02}(N" + b"".join(b"q\x00h\x00h\x00\x86" for _ in range(60)) + b"Nu."


GLOBALS = [
    ("os.system", pickle.dumps(Evil(os.system, "touch pwned"), 2), f"{os.system.__module__}.system"),
    ("eval", pickle.dumps(Evil(eval, "1"), 2), "__builtin__.eval"),
    ("eval-protocol-4", pickle.dumps(Evil(eval, "1"), 4), "builtins.eval"),
    ("getattr", b"\x80\x02c__builtin__\ngetattr\n.", "__builtin__.getattr"),
    ("import-by-dotted-name", b"\x80\x04\x8c\x05torch\x8c\x0bhub.load_ur\x93.", "torch.hub.load_ur"),
    ("torch-load", b"\x80\x02ctorch\nload\n.", "torch.load"),
    ("code-in-torch", b"\x80\x02ctorch.jit._script\nScriptModule\n.", "torch.jit._script.ScriptModule"),
    ("indirect-through-numpy", b"\x80\x02cnumpy.testing._private.utils\nrunstring\n.", "numpy.testing._private.utils"),
    ("pickled-module", pickle.dumps(torch.nn.Linear(1, 1), 2), "torch.nn.modules.linear.Linear"),
    ("a-name-with-escapes", b"\x80\x02cos\x1b[31m\nsystem\n.", r"\x1b[31m.system"),
]

PROGRAMS = [
    ("nested-tuples-as-key", nested_key(), "key of a dict"),
    ("deep-recursion", b"\x80\x02N" + b"\x85" * 200_000 + b".", "holds a tuple"),
    ("huge-memo-index", b"\x80\x02Nr\xff\xff\xff\xff.", "holds a nonetype"),
    ("missing-memo", b"\x80\x02j\xff\xff\xff\xff.", "memo has no entry"),
    ("length-bomb", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.", "truncated"),
    ("bytes-length-bomb", b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.", "truncated"),
    ("bytearray-bomb", b"\x80\x05\x96" + b"\xff" * 8 + b"abc.", "truncated"),
    ("frame-bomb", b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "frame"),
    ("long-integer", b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\1" * (1 << 20) + b".", "limit 255"),
    ("colliding-integers", b"\x80\x02}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"Ns.", "key of a dict"),
    ("key-twice", b"\x80\x02}(U\x01aNU\x01aNu.", "set twice"),
    ("empty-stack", b"\x80\x02\x85.", "empty stack"),
    ("no-mark", b"\x80\x02}u.", "no mark"),
    ("below-the-mark", b"\x80\x02N(\x85.", "empty stack"),
    ("two-values", b"\x80\x02}}.", "2 values"),
    ("no-stop", b"\x80\x02}", "truncated"),
    ("opcode-of-old", b"\x80\x02(dI1\n.", "opcode 0x64"),
    ("extension-registry", b"\x80\x02\x82\x01.", "opcode 0x82"),
    ("protocol-9", b"\x80\x09}.", "protocol 9"),
    ("call-of-text", b"\x80\x02U\x01a)R.", "calls"),
    ("call-of-a-dtype", b"\x80\x02ctorch\nfloat32\n)R.", "calls `torch.float32`"),
    ("wrong-arguments", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "with 0 arguments"),
    ("object-of-a-class", b"\x80\x02ctorch\nTensor\n)\x81.", "makes an object of `torch.Tensor`"),
    ("list-as-state-dict", b"\x80\x02].", "holds a list"),
    ("endless-name", b"\x80\x02c" + b"a" * 100_000, "without an end"),
    ("state-dict-of-text", b"\x80\x02}U\x01aU\x01bs.", "no state dict"),
]


@pytest.mark.parametrize(("program", "name"), [row[1:] for row in GLOBALS], ids=[row[0] for row in GLOBALS])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_names_anything_else_is_refused_by_name(program, name, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = hostile(tmp_path / "evil.bin", program)
    if legacy:
        raw = save(tmp_path / "b.bin", {}, _use_new_zipfile_serialization=False).read_bytes()
        path.write_bytes(
            raw.replace(b"\x80\x02}q\x00.", program, 1) if b"\x80\x02}q\x00." in raw else raw[:40] + program
        )
    with pytest.raises(FormatError) as caught:
        inspect(path)
    assert name in str(caught.value) or legacy
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("program", "what"), [row[1:] for row in PROGRAMS], ids=[row[0] for row in PROGRAMS])
def test_a_hostile_pickle_is_an_error_soon(program, what, tmp_path):
    path = hostile(tmp_path / "evil.bin", program)
    started = time.process_time()
    with pytest.raises(FormatError) as caught:
        inspect(path)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 10


LIMITED = [
    ("objects", b"\x80\x02" + b"}" * 3_000_000 + b".", "more than 2,000,000 objects"),
    ("opcodes", b"\x80\x02Nq\0" + b"q\0" * 9_000_000 + b".", "more than 8,000,000 opcodes"),
    ("memo", b"\x80\x04N" + b"\x94" * 2_000_000 + b".", "memo of more than 1,000,000"),
    ("marks", b"\x80\x02" + b"(" * 3_000_000 + b".", "more than 2,000,000 marks"),
]

RESIDENT = """
import resource, sys
from pytest_quantcheck import FormatError
from pytest_quantcheck.containers import pickle_records
program = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    pickle_records.run(program)
except FormatError as error:
    print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
"""


@pytest.mark.parametrize(("program", "what"), [row[1:] for row in LIMITED], ids=[row[0] for row in LIMITED])
def test_a_hostile_pickle_stays_small(program, what, tmp_path):
    """The limits are named, and what fits under them fits in 256 MiB."""
    path = tmp_path / "program"
    path.write_bytes(program)
    command = [sys.executable, "-c", RESIDENT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert what in done.stdout


def test_a_pickle_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "big.bin"
    path.write_bytes(rezip({"a/data.pkl": bytes(pickle_records.PICKLE_LIMIT + 1)}))
    with pytest.raises(FormatError, match="limit 67,108,864"):
        inspect(path)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_never_reads_what_torch_reads_otherwise(tmp_path_factory, data):
    """Differential: one byte of a valid file changed. What we accept, torch reads with the same names and shapes."""
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(save(folder / "a.bin", {"w": torch.ones(3, 4), "b": torch.ones(12)[::2]}).read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    (folder / "b.bin").write_bytes(raw)
    try:
        ours = open_path(folder / "b.bin")
    except FormatError:
        return
    assert sum(t.nbytes for t in ours.tensors.values()) + sum(ours.overhead.values()) == ours.file_bytes
    theirs = torch.load(folder / "b.bin", weights_only=True)
    assert {n: t.shape for n, t in ours.tensors.items()} == {n: tuple(t.shape) for n, t in theirs.items()}


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_program_gives_an_error_or_a_value(program):
    with contextlib.suppress(FormatError):
        assert pickle_records.run(b"\x80\x02" + program).stop <= 2 + len(program)


# Folders.


def sharded(folder: Path) -> Path:
    folder.mkdir()
    save(folder / "pytorch_model-00001-of-00002.bin", {"a": torch.ones(3, 4)})
    tied = torch.ones(5)
    save(folder / "pytorch_model-00002-of-00002.bin", {"m.b": tied, "n.b": tied})
    shards = {"a": 1, "m.b": 2, "n.b": 2}
    weight_map = {name: f"pytorch_model-{number:05}-of-00002.bin" for name, number in shards.items()}
    index = {"metadata": {"total_size": 88}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    save(folder / "training_args.bin", {"lr": 0.1})
    save(folder / "optimizer.pt", {"state": {}})
    return folder


def test_a_sharded_folder_is_one_artifact(tmp_path):
    folder = sharded(tmp_path / "m")
    artifact = inspect(folder)
    assert (artifact.logical_params, artifact.tied_params, artifact.findings) == (17, 5, ())
    assert artifact.file_bytes == sum(file.stat().st_size for file in folder.iterdir()) == sum(artifact.bytes.values())
    assert inspect(folder / "pytorch_model.bin.index.json").logical_params == 17
    (folder / "pytorch_model.bin.index.json").unlink()
    assert inspect(folder).logical_params == 17


def test_safetensors_win_and_stale_torch_files_are_found(tmp_path):
    folder = sharded(tmp_path / "m")
    safetensors.torch.save_file({"a": torch.ones(2, 3)}, folder / "model.safetensors")
    artifact = inspect(folder)
    assert (artifact.container, artifact.logical_params) == ("safetensors", 6)
    stale = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    assert [finding.message.split("`")[1] for finding in artifact.findings] == stale
    assert artifact.bytes["dead"] == sum((folder / name).stat().st_size for name in stale)
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def test_an_index_never_leaves_its_folder(tmp_path):
    folder = sharded(tmp_path / "m")
    index = {"weight_map": {"a": "../x.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="only files beneath"):
        inspect(folder)


def test_checksums_are_those_of_zlib(tmp_path):
    """Worked by hand: the checksum that torch writes is the one we hold the bytes to."""
    path = plain(tmp_path)
    with zipfile.ZipFile(path) as file:
        assert zlib.crc32(struct.pack("<5f", *[1.0] * 5)) == file.getinfo("a/data/1").CRC
