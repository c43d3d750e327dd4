"""The SQNR under which an encoding is broken: below what its own quantizer keeps of the worst weights, and not far."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.checks.fidelity import sqnr_db
from tests import gguf_files
from tests.golden import file as golden

SHAPE = (256, 1024)


def weights() -> dict[str, np.ndarray]:
    """Gaussian weights, heavy tails, and one value of a thousand ten times as large."""
    random = np.random.default_rng(0)
    gaussian = random.standard_normal(SHAPE)
    outliers = gaussian * np.where(random.random(SHAPE) < 1e-3, 10, 1)
    return {"gaussian": gaussian, "student": random.standard_t(5, SHAPE), "outliers": outliers}


def onnx_model(values: np.ndarray):
    onnx = pytest.importorskip("onnx", reason="onnxruntime quantizes these")
    from tests.cases.onnx import model_of

    weight = onnx.numpy_helper.from_array(np.ascontiguousarray(values.T.astype(np.float32)), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "node")
    return model_of([node], [weight], [("x", 1, ["n", SHAPE[1]])], [("y", 1, None)])


def nbits(bits: int, block: int):
    def write(values: np.ndarray, folder):
        pytest.importorskip("onnxruntime", reason="onnxruntime quantizes these")
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

        made = quantizer.MatMulNBitsQuantizer(onnx_model(values), bits=bits, block_size=block, is_symmetric=True)
        made.process()
        (folder / "m.onnx").write_bytes(made.model.model.SerializeToString())
        return folder / "m.onnx"

    return write


def block_type(kind: str):
    def write(values: np.ndarray, folder):
        package = pytest.importorskip("gguf", reason="the gguf package quantizes these")
        raw = package.quants.quantize(values.astype(np.float32), package.GGMLQuantizationType[kind])
        path = folder / "m.gguf"
        path.write_bytes(gguf_files.gguf([gguf_files.Tensor("blk.0.ffn_up.weight", kind, SHAPE, raw.tobytes())]))
        return path

    return write


ROWS = [
    ("matmulnbits-8-b128", nbits(8, 128)),
    ("matmulnbits-4-b32", nbits(4, 32)),
    ("matmulnbits-4-b128", nbits(4, 128)),
    *((kind, block_type(kind)) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")),
]


@pytest.mark.parametrize("write", [row[1] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_floor_is_just_below_what_the_worst_weights_keep(tmp_path, write):
    kept = {}
    for name, values in weights().items():
        (tensor,) = inspect(write(values, tmp_path)).tensors
        reference = torch.from_numpy(values.astype(np.float32))
        noise = float((tensor.decode() - reference).double().square().sum())
        kept[name] = sqnr_db(float(reference.double().square().sum()), noise)
    worst = min(kept.values())
    assert worst - 3 < tensor.floor_db < worst - 0.5, kept


CODEBOOKS = golden.read("ggml_codebook")


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_the_floor_of_a_codebook_is_below_what_ggml_keeps_under_a_steep_importance_matrix(kind):
    from pytest_quantcheck.schemes import ggml_codebook

    case = CODEBOOKS[kind]
    reference = case.tensors["reference"].double()
    noise = (case.values.double() - reference).square().sum()
    kept = sqnr_db(float(reference.square().sum()), float(noise))
    assert kept - 4 < ggml_codebook.TYPES[kind].floor_db < kept - 0.5


def test_every_type_of_ggml_that_has_scales_has_a_floor(tmp_path):
    from pytest_quantcheck.schemes import ggml_codebook, ggml_fp4, ggml_iq4, ggml_k, ggml_legacy

    for scheme in (ggml_codebook, ggml_fp4, ggml_iq4, ggml_k, ggml_legacy):
        assert {name: kind for name, kind in scheme.TYPES.items() if not kind.floor_db} == {}
