"""Every row of the table of schemes, live and on disk, held to the same promises."""

from __future__ import annotations

import pickle
import re

import pytest
import torch

from pytest_quantcheck import NotDecodable, compiled, inspect
from pytest_quantcheck.checks.fidelity import sqnr_db
from pytest_quantcheck.checks.tree import tree
from pytest_quantcheck.checks.why import explain
from pytest_quantcheck.schemes import CODERS, packing
from tests.cases import Case, Made, all_cases
from tests.scheme_table import PAGE, lines, saved

CASES = all_cases()


@pytest.fixture(scope="module")
def made():
    cache: dict[str, Made] = {}

    def make(case: Case) -> Made:
        if case.id not in cache:
            cache[case.id] = case.make()
        return cache[case.id]

    return make


@pytest.fixture(params=["live", "disk"])
def artifact(request, made, case, tmp_path):
    content = made(case)
    if request.param == "live":
        if content.live is None:
            pytest.skip("this layout has no live form here")
        return inspect(content.live)
    if content.tensors is None and content.write is None:
        pytest.skip("this layout is not saved")
    return inspect(saved(content, tmp_path))


# ggml's searches choose among scales by sums of float32, whose order decides where two scales are as good.
SEARCHED = tuple(f"ggml-{kind}" for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"))

each_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


@each_case
def test_counts_exactly(case, artifact):
    tensor = artifact.tensor(case.name)
    assert (tensor.scheme, tensor.shape) == (case.scheme, case.shape)
    assert artifact.logical_params == (case.total or tensor.params)


@each_case
def test_bytes_add_up(case, artifact):
    assert sum(artifact.bytes.values()) == artifact.file_bytes
    assert sum(reason.bytes for reason in explain(artifact).reasons) == artifact.file_bytes
    assert tree(artifact).bytes == artifact.file_bytes
    if case.bytes is not None:
        measured = artifact.tensor(case.name).bytes
        assert {kind: measured.get(kind, 0) for kind in case.bytes} == case.bytes


@each_case
def test_decodes_what_the_library_decodes(case, artifact, made):
    if made(case).values is None:
        with pytest.raises(NotDecodable, match=re.escape(artifact.tensor(case.name).name)):
            artifact.tensor(case.name).decode()
        return
    expected = made(case).values.to(torch.float32).reshape(-1, case.shape[-1])
    decoded = artifact.tensor(case.name).decode()
    assert decoded.dtype == torch.float32
    same = torch.nan_to_num(decoded), torch.nan_to_num(expected)
    assert torch.equal(decoded.isnan(), expected.isnan())
    limit = made(case).tolerance * same[1].abs().max()
    assert (same[0] - same[1]).abs().max() <= limit


@each_case
def test_windows_equal_the_whole(case, artifact, made):
    if made(case).values is None:
        pytest.skip("counted and weighed only")
    tensor = artifact.tensor(case.name)
    windows = [tensor.decode(start, stop) for start, stop in tensor.windows(elements=5 * tensor.columns)]
    assert torch.equal(torch.cat(windows).nan_to_num(), tensor.decode().nan_to_num())
    assert tensor.decode(1, 1).shape == (0, tensor.columns)


@each_case
def test_rounding_and_steps_fit_what_is_decoded(case, artifact, made):
    """What was decoded rounds to values of the same shape, and every value has a step, in windows as in one piece."""
    tensor = artifact.tensor(case.name)
    if made(case).values is None or tensor.rounding is None:
        pytest.skip("nothing is expected of this encoding")
    rounding = pickle.loads(pickle.dumps(tensor.rounding))
    values = tensor.decode().nan_to_num(0.0, 1e4, -1e4).clamp_(-1e4, 1e4)
    largest = float(values.abs().max()) if rounding.whole else None
    rounded = rounding.nearest(tensor, values, largest)
    assert (rounded.shape, rounded.dtype) == (values.shape, torch.float32)
    assert rounded.isfinite().all()
    if rounding.steps is not None:
        steps = rounding.steps(tensor, 0, tensor.rows, "cpu")
        assert (steps.shape, steps.dtype) == (values.shape, torch.float32)
        assert not (steps < 0).any()
        first = rounding.steps(tensor, 0, 1, "cpu")
        assert torch.equal(first.nan_to_num(), steps[:1].nan_to_num())


@each_case
def test_compiled_loops_give_the_same_bits(case, artifact, made):
    """Decoded and rounded, and as codes where a scheme can say them."""
    tensor = artifact.tensor(case.name)
    if made(case).values is None:
        pytest.skip("counted and weighed only")
    values, rounding = tensor.decode(), tensor.rounding
    largest = float(values.abs().max())
    rounded = None if rounding is None else rounding.nearest(tensor, values, largest)
    with compiled.used(True):
        assert compiled.loops("windows") is not None
        assert same_bits(tensor.decode(), values)
        again = None if rounding is None else rounding.nearest(tensor, values, largest)
        if tensor.scheme in SEARCHED:
            assert kept_db(again, values) == pytest.approx(kept_db(rounded, values), abs=0.01)
        else:
            assert rounded is None or same_bits(again, rounded)
        coded = CODERS[tensor.decoder](tensor, 0, tensor.rows, "cpu") if tensor.decoder in CODERS else None
        assert coded is None or same_bits(packing.expand(coded), values)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all values are the same, -0.0 told from 0.0, and any NaN for another."""
    words = [values.masked_fill(values.isnan(), 0).contiguous().view(torch.int32) for values in (one, other)]
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(*words)


def kept_db(rounded: torch.Tensor, values: torch.Tensor) -> float:
    """The SQNR of what rounding made of values, those that are no numbers left out."""
    known = values.isfinite() & rounded.isfinite()
    error = (rounded - values)[known].double()
    return sqnr_db(float(values[known].double().square().sum()), float(error.square().sum()))


@each_case
def test_a_few_values_without_torch_are_those_that_are_decoded(case, artifact):
    tensor = artifact.tensor(case.name)
    if tensor.cells is None:
        pytest.skip("takes torch")
    for start, stop in ((0, tensor.columns), (1, min(7, tensor.columns)), (tensor.columns // 2, tensor.columns)):
        for row in (0, tensor.rows - 1):
            cells = torch.tensor(tensor.cells(tensor, row, start, stop))
            assert torch.equal(cells, tensor.decode(row, row + 1)[0, start:stop])


def test_the_table_in_the_docs_is_what_is_measured():
    """Printed for whoever runs it; schemes whose library is not installed here are left out of the comparison."""
    measured = lines(CASES)
    print(*measured.values(), sep="\n")
    documented = PAGE.read_text().splitlines()
    assert [line for line in measured.values() if line not in documented] == []
