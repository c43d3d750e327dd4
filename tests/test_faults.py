"""Every fault of the table fails with its check and is named, and the same artifact without the fault passes."""

from __future__ import annotations

import re

import pytest
import torch

from pytest_quantcheck import assert_checkpoint_intact
from tests import encoders, faults
from tests.faults import CHECKS, FAULTS

IDS = [f"{fault.row}-{fault.what[:40].replace(' ', '-')}" for fault in FAULTS]


@pytest.fixture(params=FAULTS, ids=IDS)
def fault(request):
    found = request.param
    if found.make is None or found.check not in CHECKS:
        pytest.skip(f"row {found.row}, {found.check}: {found.reason}")
    return found


def test_the_fault_is_seen_by_its_check_and_named(fault, tmp_path):
    said = faults.outcome(fault, tmp_path / "broken", broken=True)
    if not fault.seen:
        assert said is None, "a false alarm"
        return
    assert said is not None, "the fault passes"
    assert re.search(fault.seen, said), said
    named = re.search(r"likely ([\w-]+)", said)
    assert (named and named[1]) == fault.diagnosis, said
    assert without_numbers(said) in without_numbers(faults.PAGE.read_text()), "`python -m tests.faults` writes the page"


def test_without_the_fault_it_passes(fault, tmp_path):
    assert faults.outcome(fault, tmp_path / "healthy", broken=False) is None


def test_every_row_that_tiny_tensors_can_carry_is_in_the_table():
    assert {fault.row for fault in FAULTS} == set(range(35, 81))


def test_the_page_has_every_row():
    page = faults.PAGE.read_text()
    assert [line for line in faults.table() if line not in page] == []
    assert len(re.findall(r"^## ", page, re.MULTILINE)) == len(FAULTS)


def without_numbers(text: str) -> str:
    """They may differ by the last digit from one CPU to the next."""
    return re.sub(r"0x[0-9a-f]+|-?\d[\d,]*(\.\d+)?(e[-+]\d+)?", "#", text)


def test_a_block_of_zeros_may_have_a_scale_of_zero(tmp_path):
    weight = encoders.gaussian(40, 96)
    weight[5] = 0
    tensors = encoders.bnb_4bit(weight).state_dict()
    assert (tensors["layer.weight.absmax"] == 0).any()
    assert_checkpoint_intact(encoders.folder(tmp_path, tensors, encoders.BNB_CONFIG))


def test_a_zero_point_has_to_be_in_reach_of_its_codes(tmp_path):
    options = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "tensor"}
    _, tensors, config = encoders.compressed_tensors("pack-quantized", 12, 96, **options)
    assert_checkpoint_intact(encoders.folder(tmp_path / "healthy", tensors, config))
    tensors["layer.weight_zero_point"] = torch.full_like(tensors["layer.weight_zero_point"], 100)
    with pytest.raises(AssertionError, match=r"1 of 1 zero points are out of reach of 4-bit codes \(-8 to 15\)"):
        assert_checkpoint_intact(encoders.folder(tmp_path / "broken", tensors, config))
