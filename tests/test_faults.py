"""Every fault of the table fails with its check and is named, and the same artifact without the fault passes."""

from __future__ import annotations

import re

import pytest

from tests import faults
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
