"""What the bytes cost: downloads, memory and GPUs, by hand."""

from __future__ import annotations

import pytest

from pytest_quantcheck.artifact import Artifact, inspect
from pytest_quantcheck.checks.cost import GPUS, LINKS, felt
from pytest_quantcheck.checks.tree import tree
from pytest_quantcheck.checks.why import explain
from pytest_quantcheck.report import durations, sizes
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor


def tensor(name, shape, *, scheme="plain", role="parameter", nbytes=100):
    part = Part("weight", "codes", StoredTensor(name, "U8", (nbytes,), nbytes, source=None))
    return LogicalTensor(name, shape, scheme, role, (part,), None)


# what is in the artifact, weights, largest matrix decoded
LOADED = [
    ("nothing-quantized", [tensor("a", (10, 5))], 100, 0),
    ("largest-matrix", [tensor("a", (3, 5), scheme="gptq"), tensor("b", (7, 9), scheme="gptq")], 200, 2 * 63),
    ("one-expert-of-a-stack", [tensor("a", (8, 3, 5), scheme="mxfp4")], 100, 2 * 15),
    ("plain-is-not-decoded", [tensor("a", (90, 90)), tensor("b", (3, 5), scheme="gptq")], 200, 30),
    ("buffers-are-loaded", [tensor("a", (4,), role="buffer"), tensor("b", (3, 5), scheme="gptq")], 200, 30),
    (
        "copies-are-not",
        [tensor("a", (3, 5)), tensor("b", (3, 5), role="tied"), tensor("c", (9,), role="shadow")],
        100,
        0,
    ),
]


@pytest.mark.parametrize(("tensors", "weights", "decoded"), [row[1:] for row in LOADED], ids=[row[0] for row in LOADED])
def test_memory_is_what_is_loaded_and_one_matrix(tensors, weights, decoded):
    cost = felt(Artifact("x", "safetensors", tuple(tensors), 1000))
    assert (cost.weights, cost.largest_decoded, cost.load) == (weights, decoded, weights + decoded)
    assert [fit.left for fit in cost.gpus] == [fit.memory - cost.load for fit in cost.gpus]


@pytest.mark.parametrize("container", ["gguf", "onnx", "tflite"])
def test_runtimes_that_compute_on_codes_load_every_tensor_and_decode_none(container):
    tensors = (tensor("a", (3, 5), scheme="ggml-q4_k"), tensor("b", (3, 5), scheme="ggml-q4_k", role="tied"))
    cost = felt(Artifact("x", container, tensors, 1000))
    assert (cost.weights, cost.largest_decoded) == (200, 0)


def test_downloads_are_bits_over_bandwidth():
    cost = felt(Artifact("x", "safetensors", (), 4_450_923_649))
    assert [link.megabits for link in cost.downloads] == list(LINKS)
    assert cost.downloads[1].seconds == pytest.approx(4_450_923_649 * 8 / 100e6)
    assert felt(Artifact("x", "live", (), 4_450_923_649)).downloads == ()


def test_gpus_are_sorted_and_hold_less_than_is_on_their_box():
    sizes_in_mib = [mib for _, mib in GPUS]
    assert sizes_in_mib == sorted(sizes_in_mib)
    assert len({name for name, _ in GPUS}) == len(GPUS)
    for name, mib in GPUS:
        if name.endswith("GB"):
            assert mib <= int(name.split()[-2]) * 1024


@pytest.mark.parametrize(("gib", "fits", "lacks"), [(7.9, 13, 0), (8, 12, 1), (100, 1, 12), (200, 0, 13)])
def test_a_gpu_that_is_too_small_lacks_the_rest(gib, fits, lacks):
    cost = felt(Artifact("x", "gguf", (tensor("a", (3, 5), nbytes=int(gib * 2**30)),), 1))
    assert [fit.fits for fit in cost.gpus] == [False] * lacks + [True] * fits


def test_terminal_says_what_the_numbers_are(mistral, capsys):
    artifact = inspect(mistral)
    sizes.print_explanation(explain(artifact), tree(artifact, 0))
    shown = capsys.readouterr().out.split("\n\n")[-1]
    assert "5 min 56 s at 100 Mbit/s" in shown
    assert "fits        GeForce RTX 4060 and larger, with 3.74 GiB left for that" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_terminal_says_what_no_gpu_holds(capsys):
    artifact = Artifact("x", "gguf", (tensor("a", (3, 5), nbytes=700 * 2**30),), 700 * 2**30)
    sizes.print_explanation(explain(artifact), tree(artifact, 0))
    assert "fits        no single GPU: H200 lacks 559.60 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.99, "under 1 s"),
        (1.4, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_have_two_units(seconds, said):
    assert durations.duration(seconds) == said
