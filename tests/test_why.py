"""`quantcheck why` and `quantcheck diff`: every byte has one reason, and savings are arithmetic on measured bytes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_quantcheck.report
from pytest_quantcheck import inspect
from pytest_quantcheck.checks.why import explain
from tests import layouts
from tests.layouts import Entry

REPORT = Path(pytest_quantcheck.report.__path__[0])
WHY, DIFF = (json.loads((REPORT / f"{name}.schema.json").read_text()) for name in ("why", "diff"))
MATRIX = (128, 640)  # 81,920 values
BF16 = 2 * 81_920
NF4 = 81_920 // 2 + 4 * 1_280 + 64  # codes, absmax, quant_map; the record of the state is extra


def quantcheck(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest_quantcheck", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
     "copies", BF16, BF16),
    ("a copy that no config admits", [embedding(), embedding("lm_head.weight")], {}, {}, "copies", BF16, BF16),
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
