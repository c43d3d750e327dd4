"""`quantcheck why` and `quantcheck diff`: every byte has one reason, and savings are arithmetic on measured bytes."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import pytest_quantcheck.report
from pytest_quantcheck import inspect
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.diff import difference
from pytest_quantcheck.checks.tree import tree
from pytest_quantcheck.checks.why import explain
from pytest_quantcheck.report import sizes
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor
from tests import gguf_files, layouts
from tests.layouts import Entry
from tests.test_cli import on_a_terminal, quantcheck

REPORT = Path(pytest_quantcheck.report.__path__[0])
WHY, DIFF = (json.loads((REPORT / f"{name}.schema.json").read_text()) for name in ("why", "diff"))
MATRIX = (128, 640)  # 81,920 values
BF16 = 2 * 81_920
NF4 = 81_920 // 2 + 4 * 1_280 + 64  # codes, absmax, quant_map; the record of the state is extra


def noise(seed: int, size: int = BF16) -> bytes:
    return random.Random(seed).randbytes(size)


def plain(name: str, dtype: str = "BF16", shape: tuple[int, ...] = MATRIX) -> Entry:
    return Entry(name, dtype, shape)


def layer(index: int, *, quantized: bool = True) -> list[Entry]:
    name = f"model.layers.{index}.mlp.down_proj.weight"
    return layouts.nf4(name, MATRIX) if quantized else [plain(name)]


def checkpoint(folder: Path, entries: list[Entry], **config: object) -> Path:
    """A folder with one file: NF4 where an entry has its parts."""
    quantized = any(entry.name.endswith("quant_map") for entry in entries)
    method = {"quantization_config": layouts.BNB_CONFIG} if quantized else {}
    return layouts.write_folder(folder, entries, method | config, shards=1)


def record(entries: list[Entry]) -> int:
    return sum(entry.nbytes for entry in entries if ".quant_state." in entry.name)


def embedding(name: str = "model.embed_tokens.weight", seed: int = 0) -> Entry:
    return Entry(name, "BF16", MATRIX, noise(seed))


AT_NF4 = BF16 - (NF4 + record(layer(0)))
NESTED = 4 * 1_280 - (1_280 + 4 * 5 + 1_024)

# id, entries, config, files beside, kind, bytes, the best saving
REASONS = [
    ("codes", layer(0), {}, {}, "codes", 40_960, 0),
    ("an embedding at the bits of the rest", [embedding(), *layer(0)], {}, {}, "embedding", BF16, AT_NF4),
    ("a head is told by its name", [plain("lm_head.weight"), *layer(0)], {}, {}, "head", BF16, AT_NF4),
    ("GPT-NeoX calls its head embed_out", [plain("embed_out.weight"), *layer(0)], {}, {}, "head", BF16, AT_NF4),
    ("a linear that was left out", [plain("model.proj.weight"), *layer(0)], {}, {}, "matrices", BF16, AT_NF4),
    ("norms stay, but not in 32 bit", [plain("norm.weight", "F32", (640,)), *layer(0)], {}, {},
     "vectors", 2_560, 1_280),
    ("norms in 16 bit stay", [plain("norm.weight", "BF16", (640,)), *layer(0)], {}, {}, "vectors", 1_280, 0),
    ("32 bit in an unquantized model", [plain("fc.weight", "F32")], {}, {}, "matrices", 2 * BF16, BF16),
    ("a scale for every 64 weights", layer(0), {}, {}, "scales", 4 * 1_280, NESTED),
    ("nested scales are what they are", layouts.nf4("fc.weight", MATRIX, double_quant=True), {}, {},
     "scales", 1_300, 0),
    ("code tables", layer(0), {}, {}, "codebooks", 64, 0),
    ("a tied head stored twice", [embedding(), embedding("lm_head.weight")], {"tie_word_embeddings": True}, {},
     "tied_head", BF16, BF16),
    ("a copy that no config admits", [embedding(), embedding("lm_head.weight")], {}, {}, "tied_head", BF16, BF16),
    ("a head of its own is no copy", [embedding(), embedding("lm_head.weight", 1)], {}, {}, "head", BF16, 0),
    ("rope tables", [embedding(), plain("rotary_emb.inv_freq", "F32", (64,))], {}, {}, "rope_tables", 256, 256),
    ("masks", [embedding(), plain("attn.causal_mask", "BF16", (64, 64))], {}, {}, "masks", 8_192, 8_192),
    ("running statistics cannot be computed", [embedding(), plain("bn.running_mean", "F32", (64,))], {}, {},
     "buffers", 256, 0),
    ("tokenizer files", layer(0), {}, {"tokenizer.json": 700, "vocab.txt": 11}, "tokenizer", 711, 0),
    ("other files", layer(0), {}, {"README.md": 90_000}, "files", None, 0),
    ("a stale file", layer(0), {}, {"pytorch_model.bin": 5_000}, "stale_files", 5_000, 5_000),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "config", "beside", "kind", "size", "saves"), [r[1:] for r in REASONS],
                         ids=[r[0] for r in REASONS])  # fmt: skip
def test_a_reason_has_its_bytes_and_what_they_could_be(tmp_path, entries, config, beside, kind, size, saves):
    folder = checkpoint(tmp_path / "model", entries, **config)
    for name, length in beside.items():
        (folder / name).write_bytes(bytes(length))
    explanation = explain(inspect(folder))
    reasons = {reason.kind: reason for reason in explanation.reasons}
    assert size is None or reasons[kind].bytes == size
    assert reasons[kind].could_save == saves
    assert sum(reason.bytes for reason in explanation.reasons) == explanation.file_bytes
    assert explanation.file_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert [reason.bytes for reason in explanation.reasons] == sorted((r.bytes for r in reasons.values()), reverse=True)


def test_the_lines_account_for_mistral(mistral):
    explanation = explain(inspect(mistral))
    assert sum(reason.bytes for reason in explanation.reasons) == explanation.file_bytes
    assert (explanation.bits, explanation.expected_bytes) == (4, 7_241_732_096 // 2)
    assert explanation.bytes_in_16_bit * 4 // 16 == explanation.bytes_in_32_bit * 4 // 32 == explanation.expected_bytes
    assert explanation.code_bytes == 6_979_321_856 // 2


def with_content(name: str, codes: int, scales: int) -> list[Entry]:
    """An NF4 weight whose codes and scales come from these seeds."""
    packed, absmax, *rest = layouts.nf4(name, (256, 640))
    return [
        packed._replace(content=noise(codes, packed.nbytes)),
        absmax._replace(content=noise(scales, absmax.nbytes)),
        *rest,
    ]


def test_equal_codes_under_other_scales_are_no_copy(tmp_path):
    weights = {"first.weight": (0, 0), "scaled.weight": (0, 1), "copy.weight": (0, 0)}
    entries = [entry for name, seeds in weights.items() for entry in with_content(name, *seeds)]
    (copies,) = (r for r in explain(inspect(checkpoint(tmp_path / "model", entries))).reasons if r.kind == "copies")
    assert copies.names == ("copy.weight",)


def test_bits_above_the_most_common_are_weighed_apart(tmp_path):
    """As llama.cpp mixes: Q4_K has 128 bytes of codes in 256 values, Q6_K 192."""
    tensors = [
        gguf_files.Tensor("blk.0.ffn_down.weight", "Q4_K", (4, 256)),
        gguf_files.Tensor("blk.0.attn_v.weight", "Q6_K", (2, 256)),
    ]
    artifact = inspect(gguf_files.write_sparse(tmp_path / "a.gguf", tensors))
    reasons = {reason.kind: reason for reason in explain(artifact).reasons}
    assert explain(artifact).bits == 4
    assert reasons["codes"].bytes == 4 * 128 + 2 * 128
    assert (reasons["higher_bits"].bytes, reasons["higher_bits"].could_save) == (2 * 64, 2 * 64)
    assert reasons["higher_bits"].names == ("blk.0.attn_v.weight",)
    assert reasons["scales"].savings == reasons["zero_points"].savings == ()


def test_a_copy_names_what_it_repeats(tmp_path, capsys):
    folder = checkpoint(tmp_path / "model", [embedding(), embedding("lm_head.weight")])
    explanation = explain(inspect(folder))
    (head,) = (reason for reason in explanation.reasons if reason.kind == "tied_head")
    assert (head.names, head.originals) == (("lm_head.weight",), ("model.embed_tokens.weight",))
    sizes.print_explanation(explanation, tree(inspect(folder), 0))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("lm_head.weight") + 1] == "repeats model.embed_tokens.weight"


def typed(kind: int, values: list[float], name: str):
    """An ONNX model whose matrix is in a typed field, and one like it in raw_data."""
    onnx = pytest.importorskip("onnx", reason="the onnx package makes these models")
    from tests.cases.onnx import model_of

    matrix = onnx.helper.make_tensor(name, kind, [len(values) // 4, 4], values)
    scale = onnx.helper.make_tensor("scale", 1, [], [0.5])
    decoded = [onnx.helper.make_node("DequantizeLinear", [name, "scale"], ["w"])] if kind == 3 else []
    product = onnx.helper.make_node("MatMul", ["x", "w" if decoded else name], ["y"])
    return model_of([*decoded, product], [matrix, scale], [("x", kind if kind != 3 else 1, None)], [("y", 1, None)])


# id, type, values, bytes beyond two (one) for each: a varint has 7 bits a byte, and 10 bytes where it is negative
TYPED = [
    ("negative-int8", 3, [-1] * 400, 400 * 9),
    ("positive-int8", 3, [1] * 400, 0),
    ("16-bit-floats", 10, [-1.0] * 400, 400 * 1),
    ("32-bit-floats", 1, [-1.0] * 400, 0),
]


@pytest.mark.parametrize(("kind", "values", "surplus"), [row[1:] for row in TYPED], ids=[row[0] for row in TYPED])
def test_values_in_typed_fields_are_weighed_apart(tmp_path, kind, values, surplus):
    (tmp_path / "m.onnx").write_bytes(typed(kind, values, "fc.weight").SerializeToString())
    explanation = explain(inspect(tmp_path / "m.onnx"))
    found = {reason.kind: (reason.bytes, reason.savings) for reason in explanation.reasons}
    assert found.get("typed_fields") == ((surplus, ((surplus, "in raw_data"),)) if surplus else None)
    assert sum(reason.bytes for reason in explanation.reasons) == explanation.file_bytes
    assert kind != 3 or explanation.bits == 8


def test_rope_tables_and_masks_of_an_onnx_model_have_their_reasons(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the onnx package makes this model")
    from tests.cases.onnx import model_of

    def zeros(name: str, shape: list[int]):
        return onnx.helper.make_tensor(name, 1, shape, bytes(4 * math.prod(shape)), raw=True)

    tensors = [zeros("fc.weight", [8, 8]), zeros("cos_cache", [64, 4]), zeros("h.0.causal_mask", [1, 1, 16, 16])]
    node = onnx.helper.make_node("Sum", [tensor.name for tensor in tensors], ["y"])
    (tmp_path / "m.onnx").write_bytes(model_of([node], tensors, [], [("y", 1, None)]).SerializeToString())
    reasons = {reason.kind: reason for reason in explain(inspect(tmp_path / "m.onnx")).reasons}
    assert (reasons["rope_tables"].bytes, reasons["masks"].bytes, reasons["matrices"].bytes) == (1024, 1024, 256)
    assert reasons["rope_tables"].savings == ((1024, "computed at load"),)


class Zeros:
    """Where tensors are that weigh, and that nobody reads."""

    def read(self, start: int, stop: int) -> bytearray:
        return bytearray(stop - start)


def logical(name: str, shape: tuple[int, ...], parts: dict[str, tuple[str, int]], role: str = "parameter"):
    """A tensor whose parts weigh what they should: class -> (dtype, bytes)."""
    stored = [
        Part(kind, kind, StoredTensor(name, dtype, shape, size, Zeros())) for kind, (dtype, size) in parts.items()
    ]
    scheme = "onnx-matmul-nbits" if "codes" in parts else "plain"
    return LogicalTensor(name, shape, scheme, role, tuple(stored), None, block=32)


def smollm2(scale: str = "F32") -> Artifact:
    """SmolLM2-135M as onnxruntime quantizes it in blocks of 32: what people ask about (file-formats, 2.5)."""
    width = {"F32": 4, "F16": 2}[scale]
    vocab, linears = 28_311_552, 106_168_320

    def four_bits(name: str, shape: tuple[int, int], role: str = "parameter") -> LogicalTensor:
        values = shape[0] * shape[1]
        return logical(name, shape, {"codes": ("U8", values // 2), "scales": (scale, values // 32 * width)}, role)

    tensors = (
        logical("model.embed_tokens.weight", (49_152, 576), {"unquantized": (scale, vocab * width)}),
        four_bits("model.layers.0.weight", (linears // 576, 576)),
        four_bits("lm_head.weight", (49_152, 576), "tied"),
        logical("cos_cache", (8192, 32), {"buffers": (scale, 262_144 * width)}, "buffer"),
        logical("sin_cache", (8192, 32), {"buffers": (scale, 262_144 * width)}, "buffer"),
        logical("model.norm.weight", (35_136,), {"unquantized": (scale, 35_136 * width)}),
    )
    rest = 126_108
    return Artifact("model_q4.onnx", "onnx", tensors, sum(t.nbytes for t in tensors) + rest, {"metadata": rest})


@pytest.mark.parametrize(("scale", "codes", "embedding"), [("F32", 0.337, 0.567), ("F16", 0.504, 0.424)])
def test_the_puzzle_is_answered_in_the_first_lines(scale, codes, embedding, capsys):
    artifact = smollm2(scale)
    explanation = explain(artifact)
    assert artifact.logical_params == 134_515_008
    assert explanation.code_bytes == 67_239_936
    assert explanation.code_bytes / explanation.file_bytes == pytest.approx(codes, abs=1e-3)
    reasons = {reason.kind: reason for reason in explanation.reasons}
    assert reasons["embedding"].share == pytest.approx(embedding, abs=1e-3)
    assert reasons["tied_head"].could_save == 28_311_552 // 2 + 28_311_552 // 32 * (4 if scale == "F32" else 2)
    assert sum(reason.bytes for reason in explanation.reasons) == explanation.file_bytes
    sizes.print_explanation(explanation, tree(artifact, 0))
    first = capsys.readouterr().out.splitlines()[:10]
    assert f"codes       {codes:.1%} of the file" in first


# scheme, block, part, class, dtype, what could be saved of 64 bytes
PARTS = [
    ("gptq", 32, "scales", "scales", "F16", {"blocks twice as long": 32}),
    ("hqq", 32, "scale", "scales", "F32", {"blocks twice as long": 32, "in 16 bit": 32}),
    ("gptq", 128, "scales", "scales", "F16", {}),  # one block is the row
    ("gptq", 32, "qzeros", "zero_points", "I32", {"symmetric codes": 64}),
    ("gptq", 32, "g_idx", "index", "I32", {"without act-order": 64}),
    ("vptq", 32, "perm", "index", "I16", {}),
    ("mxfp4", 32, "scales", "scales", "U8", {}),
    ("bnb-int8", None, "SCB", "scales", "F32", {}),
]


@pytest.mark.parametrize(("scheme", "block", "name", "kind", "dtype", "saved"), PARTS)
def test_only_what_the_format_leaves_open_could_be_saved(scheme, block, name, kind, dtype, saved):
    weight = StoredTensor("fc.weight", "U8", (4, 64), 256, Zeros())
    part = Part(name, kind, StoredTensor(f"fc.{name}", dtype, (16,), 64, Zeros()))
    parts = (Part("weight", "codes", weight), part)
    tensor = LogicalTensor("fc.weight", (4, 128), scheme, "parameter", parts, None, block=block)
    reasons = {reason.kind: reason for reason in explain(Artifact("a", "safetensors", (tensor,), 320)).reasons}
    assert {saving.how: saving.bytes for saving in reasons[kind].savings} == saved


def test_padding_of_blocks_is_told_from_alignment():
    """K=576 in blocks of 128 is written as 640."""
    weight = logical("fc.weight", (4, 576), {"codes": ("U8", 4 * 288), "padding": ("U8", 4 * 32)})
    explanation = explain(Artifact("a.onnx", "onnx", (weight,), weight.nbytes + 20, {"padding": 20}))
    assert [(reason.kind, reason.bytes, reason.could_save) for reason in explanation.reasons] == [
        ("codes", 4 * 288, 0),
        ("block_padding", 4 * 32, 4 * 32),
        ("alignment", 20, 0),
    ]


def test_layers_that_look_alike_are_one_branch(tmp_path):
    entries = [
        plain("embed_tokens.weight"),
        *(plain(f"layers.{index}.experts.{expert}.up.weight") for index in range(5) for expert in range(3)),
        plain("layers.3.extra.weight"),
    ]
    root = tree(inspect(checkpoint(tmp_path / "model", entries)), 3)
    layers = root.children[0]
    assert [(node.name, node.number, node.bytes) for node in layers.children] == [
        ("layers.0 to 2, 4", 4, 12 * BF16),
        ("layers.3", 1, 4 * BF16),
    ]
    assert [(node.name, node.number) for node in layers.children[0].children] == [("experts.*.up.weight", 12)]
    assert all(node.bytes == sum(child.bytes for child in node.children) for node in (root, layers, *layers.children))


def test_a_mixture_that_alternates_is_told_in_one_line_each(tmp_path, capsys):
    entries = [plain(f"layers.{at}.up.weight", "F32" if at % 3 else "BF16") for at in range(94)]
    artifact = inspect(checkpoint(tmp_path / "model", entries))
    sizes.print_explanation(explain(artifact), tree(artifact, 2))
    branches = [line.split(None, 5)[-1] for line in capsys.readouterr().out.splitlines() if "  layers." in line]
    assert branches == ["layers.1 to 2, 4 to 5, 7 to 8 ... x 62", "layers.0, 3, 6 ... x 32"]


def changes(old: Path, new: Path) -> list[tuple[str, str, int]]:
    return [(row.name, row.change, row.growth) for row in difference(inspect(old), inspect(new)).tensors]


def test_a_difference_is_sorted_by_growth_and_names_what_happened(tmp_path):
    nf4 = NF4 + record(layer(0))
    old = checkpoint(tmp_path / "old", [plain("gone.weight"), plain("same.weight"), plain("wide.weight"), *layer(0)])
    new = checkpoint(
        tmp_path / "new",
        [
            plain("same.weight"),
            plain("wide.weight", "F32"),
            plain("new.weight", "BF16", (3, 5)),
            *layer(0, quantized=False),
            plain("norm.weight", "BF16", (6,)),
        ],
    )
    assert changes(old, new) == [
        ("wide.weight", "re-encoded", BF16),
        ("model.layers.0.mlp.down_proj.weight", "re-encoded", BF16 - nf4),
        ("new.weight", "added", 30),
        ("norm.weight", "added", 12),
        ("gone.weight", "removed", -BF16),
    ]
    assert changes(old, old) == []


def test_growth_adds_up_to_that_of_the_files(tmp_path, mistral):
    full = layouts.write_folder(tmp_path / "full", layouts.mistral_7b(quantized=False), {})
    found = difference(inspect(full), inspect(mistral))
    tensors = sum(change.growth for change in found.tensors)
    assert tensors + found.outside.growth == found.file_bytes.growth
    assert sum(total.growth for total in found.classes.values()) == found.file_bytes.growth
    assert (len(found.tensors), found.unchanged) == (224, 67)
    assert found.logical_params == (7_241_732_096, 7_241_732_096)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    old = checkpoint(tmp_path / "old", [plain("a.weight", "BF16", (4, 6))])
    new = checkpoint(tmp_path / "new", [plain("a.weight", "BF16", (6, 4))])
    assert changes(old, new) == [("a.weight", "reshaped", 0)]
    document = json.loads(quantcheck("diff", old, new, "--json").stdout)
    assert (document["changed"], document["unchanged"]) == (1, 0)


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_why_json_keeps_its_schema(mistral, depth):
    done = quantcheck("why", mistral, "--json", "--depth", depth)
    document = json.loads(done.stdout)
    jsonschema.validate(document, WHY)
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(reason["bytes"] for reason in document["reasons"]) == document["tree"]["bytes"] == document["file_bytes"]
    assert bool(document["tree"]["children"]) == bool(depth)


@pytest.mark.parametrize("limit", [0, 1, 300])
def test_diff_json_keeps_its_schema_and_sums_the_rest(tmp_path, mistral, limit):
    short = layouts.write_folder(tmp_path / "short", layouts.mistral_7b(layers=range(30)), layouts.MISTRAL_CONFIG)
    done = quantcheck("diff", short, mistral, "--json", "--limit", limit)
    document = json.loads(done.stdout)
    jsonschema.validate(document, DIFF)
    assert (done.returncode, document["changed"], len(document["tensors"])) == (0, 18, min(limit, 18))
    grown = sum(row["growth"] for row in document["tensors"]) + document["rest"]["growth"]
    assert grown + document["outside_tensors"]["growth"] == document["file_bytes"]["growth"]
    assert document["logical_params"]["growth"] == 2 * 218_112_000


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, mistral):
    (tmp_path / "model.txt").write_text("hello")
    for arguments in (
        ["why", tmp_path / "absent"],
        ["why", tmp_path / "model.txt"],
        ["why", mistral, "--depth", 5],
        ["diff", mistral],
        ["diff", mistral, tmp_path / "model.txt"],
        ["diff", mistral, mistral, "--limit", -1],
    ):
        done = quantcheck(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), arguments
        assert done.stderr.startswith("quantcheck: error: ")


def test_names_from_a_checkpoint_cannot_write_to_the_terminal(tmp_path):
    entries = [plain("\x1b[2Jx\r\n\u202e.embed_tokens.weight"), plain("b")]
    old, new = checkpoint(tmp_path / "old", entries), checkpoint(tmp_path / "new", entries[1:])
    for done in (quantcheck("why", old, "--depth", 4), quantcheck("diff", old, new)):
        assert done.returncode == 0
        assert r"\x1b[2Jx" in done.stdout
        assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", [80, 200])
def test_lines_fit_the_terminal(mistral, columns, tmp_path):
    full = layouts.write_folder(tmp_path / "full", layouts.mistral_7b(quantized=False), {})
    for arguments in (["why", mistral, "--depth", "4"], ["diff", full, mistral]):
        shown = on_a_terminal(columns, *arguments, NO_COLOR="1", TERM="dumb")
        lines = shown.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
        assert max(map(len, lines[1:])) <= 80  # the first line has the paths
        assert len(lines) > 20


def test_neither_torch_nor_numpy_is_imported(mistral):
    code = (
        "import sys; from click.testing import CliRunner; from pytest_quantcheck.cli import cli;"
        f"runner = CliRunner(); path = {str(mistral)!r};"
        "results = [runner.invoke(cli, arguments) for arguments in (['why', path], ['diff', path, path])];"
        "assert all(result.exception is None or result.exit_code == 0 for result in results), results;"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
