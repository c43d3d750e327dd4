"""What to expect of each format: real quantizers reach what is published and what rounding to nearest predicts."""

from __future__ import annotations

import pytest
import torch

from pytest_quantcheck.checks.fidelity import sqnr_db
from pytest_quantcheck.tensor import LogicalTensor
from tests.quantizers import QUANTIZERS, Quantizer
from tests.test_fidelity import weights

each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=[quantizer.id for quantizer in QUANTIZERS])
DISTRIBUTIONS = ("gaussian", "student-t", "outliers")


def db(values: torch.Tensor, reference: torch.Tensor) -> float:
    error = (values - reference).double()
    return sqnr_db(float(reference.double().square().sum()), float(error.square().sum()))


def predicted(tensor: LogicalTensor, reference: torch.Tensor) -> torch.Tensor:
    """What the reference would be, its rows rounded in windows of any size that blocks allow."""
    rounding = tensor.rounding
    largest = float(reference.abs().max()) if rounding.whole else None
    step = rounding.rows * max(1, len(reference) // 3 // rounding.rows)
    windows = [rounding.nearest(tensor, rows, largest) for rows in reference.split(step)]
    return torch.cat(windows)


@each_quantizer
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rounding_to_nearest_predicts_what_the_library_reaches(quantizer: Quantizer, distribution):
    reference = weights(distribution, 128, 2048)
    tensor = quantizer.quantize(reference)
    measured = db(tensor.decode(), reference)
    expected = db(predicted(tensor, reference), reference)
    published = dict(zip(DISTRIBUTIONS, quantizer[2:5], strict=True))[distribution]
    print(f"{quantizer.id:22} {distribution:10} {measured:6.2f} predicted {expected:6.2f} published {published}")
    assert measured == pytest.approx(expected, abs=0.1)


# The strong invariant: no value is further from its reference than half of its step.


def beyond(tensor: LogicalTensor, reference: torch.Tensor) -> torch.Tensor:
    """Where the error is over half of the step."""
    gaps = tensor.rounding.steps(tensor, 0, tensor.rows, "cpu")
    assert gaps.dtype == torch.float32
    assert gaps.shape == reference.shape
    return (tensor.decode() - reference).abs() > gaps / 2


@each_quantizer
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_value_is_beyond_half_of_its_step(quantizer: Quantizer, distribution):
    reference = weights(distribution, 128, 384)
    tensor = quantizer.quantize(reference)
    if tensor.rounding.steps is None:
        pytest.skip("codes are not chosen one by one, or nothing says how")
    assert int(beyond(tensor, reference).sum()) == 0
    gaps = tensor.rounding.steps(tensor, 0, tensor.rows, "cpu")
    fraction = ((tensor.decode() - reference).abs() / gaps).amax()
    print(f"{quantizer.id:22} {distribution:10} max {fraction:.3f} of a step")
    assert fraction > 0.4, "steps this wide find nothing"
