"""The diagnosis: a fault is named where it is, nothing where nothing is, and no more is decoded than a sample."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pytest_quantcheck import FormatError, inspect
from pytest_quantcheck.checks import sample
from pytest_quantcheck.checks.diagnosis import diagnose
from pytest_quantcheck.checks.hypotheses import HYPOTHESES
from pytest_quantcheck.schemes import SCHEMES, rewritten
from pytest_quantcheck.tensor import LogicalTensor
from tests import encoders, faults
from tests.broken import saved
from tests.cases import all_cases
from tests.encoders import gaussian
from tests.test_mutations import first_rows

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS = 96, 160


def tensor_of(subject) -> LogicalTensor:
    (tensor,) = inspect(subject).parameters
    return tensor


def diagnosed(subject, weight: torch.Tensor, **options):
    return diagnose(tensor_of(subject), tensor_of(faults.reference(weight)), **options)


def nf4(change=lambda weight: None, **options):
    """The weight in NF4, with `change` done to the live parameter."""

    def make(weight: torch.Tensor, folder) -> nn.Module:
        model = encoders.bnb_4bit(weight, **options)
        change(model.layer.weight)
        return model

    return make


def of(change):
    """NF4 of weights that were changed before."""
    return lambda weight, folder: encoders.bnb_4bit(change(weight))


def gptq(change=lambda tensors: None, **options):
    def make(weight: torch.Tensor, folder):
        tensors, config = encoders.gptq(weight, **options)
        change(tensors)
        return encoders.folder(folder, tensors, config)

    return make


def awq(weight: torch.Tensor, folder):
    """The nibbles of codes and of zero points both swapped."""
    tensors, config = encoders.awq(weight)
    for part in ("layer.qweight", "layer.qzeros"):
        raw = tensors[part].contiguous().view(torch.uint8)
        tensors[part] = (raw << 4 | raw >> 4).view(torch.int32)
    return encoders.folder(folder, tensors, config)


def swap_nibbles(weight) -> None:
    weight.data = weight.data >> 4 | weight.data << 4


def scale(factor: float):
    return lambda weight: weight.quant_state.absmax.mul_(factor)


def shift(weight) -> None:
    weight.quant_state.absmax = weight.quant_state.absmax.roll(1)


def kill_a_block(weight) -> None:
    weight.quant_state.absmax[17] = 0


def poison_a_block(weight) -> None:
    weight.quant_state.absmax[17] = float("nan")


def reverse_words(tensors) -> None:
    raw = tensors["layer.qweight"].contiguous().view(torch.uint8).view(-1, 4).flip(-1)
    tensors["layer.qweight"] = raw.reshape(-1).view(torch.int32).view(tensors["layer.qweight"].shape)


def bfloat16_as_float16(tensors) -> None:
    tensors["layer.scales"] = tensors["layer.scales"].to(torch.bfloat16).view(torch.float16)


def zeros_of_another(tensors) -> None:
    generator = torch.Generator().manual_seed(9)
    tensors["layer.qzeros"] = torch.randint(
        -(2**31), 2**31 - 1, tensors["layer.qzeros"].shape, generator=generator
    ).int()


def other_groups(tensors) -> None:
    tensors["layer.g_idx"] = torch.arange(COLUMNS, dtype=torch.int32) // 32


ACT_ORDER = torch.arange(COLUMNS)[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))] // 32


def back_into_halves(weight: torch.Tensor) -> torch.Tensor:
    """Heads of 16 rows, un-paired though they were never paired."""
    return weight.view(6, 8, 2, COLUMNS).transpose(1, 2).reshape(weight.shape)


def from_nf4(weight: torch.Tensor) -> torch.Tensor:
    return tensor_of(encoders.bnb_4bit(weight, blocksize=128)).decode()


NAMED = [
    ("nibbles-swapped", nf4(swap_nibbles), r"the two nibbles of each byte swapped: 20\.\d dB \(stored: -3\.\d dB\)"),
    ("nibbles-swapped", awq, "in `qzeros` too"),
    ("gain", nf4(scale(1.05)), r"every value divided by 1\.05: 20\.\d dB \(stored: 19\.\d dB\)"),
    ("gain", nf4(scale(1.5)), r"every value divided by 1\.5: "),
    ("scales-shifted", nf4(shift), "`absmax` taken from the next block"),
    ("damaged-blocks", nf4(kill_a_block), r"1 of 240 blocks left out \(row 6, column 128\)"),
    ("damaged-blocks", nf4(poison_a_block), r"1 of 240 blocks left out \(row 6, column 128\)"),
    ("byte-order", gptq(reverse_words), "the bytes of each I32 of `qweight` reversed"),
    ("float-format", gptq(bfloat16_as_float16), "`scales` read as BF16, not F16"),
    ("zero-points-not-meant", gptq(zeros_of_another, symmetric=True), "all zero points 8"),
    ("group-index", gptq(other_groups, g_idx=ACT_ORDER), "each column in the group that fits it best"),
    ("rotary-pairs", of(back_into_halves), "the rows of each head of 16 put into pairs"),
    ("columns-permuted", of(lambda weight: weight[:, ACT_ORDER.argsort(stable=True)]), "columns reordered throughout"),
    ("channel-scales", of(lambda weight: weight * torch.linspace(0.5, 2, COLUMNS)), "each column divided"),
    ("requantized", of(from_nf4), "the reference first rounded to NF4 in blocks of 128"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "words"), NAMED, ids=lambda value: str(value)[:24])
def test_what_is_true_is_named_and_proved(name, make, words, tmp_path):
    weight = gaussian(ROWS, COLUMNS)
    found = diagnosed(make(weight, tmp_path), weight)
    assert found is not None
    assert found.name == name, str(found)
    assert found.tried_db is not None
    assert not found.tried_db <= found.stored_db
    assert re.search(words, str(found)), str(found)


HEALTHY = [nf4(), nf4(kind="fp4"), nf4(nested=True), nf4(blocksize=256), gptq(), gptq(symmetric=True), gptq(bits=3),
           gptq(g_idx=ACT_ORDER)]  # fmt: skip


@pytest.mark.parametrize("make", HEALTHY)
@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "student-t"])
def test_nothing_is_named_where_nothing_is_wrong(make, heavy, tmp_path):
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(5.0).sample((ROWS, COLUMNS)) * 0.02 if heavy else gaussian(ROWS, COLUMNS)
    assert diagnosed(make(weight, tmp_path), weight) is None


def one_of_each_scheme() -> list:
    variants = {variant: scheme.name for scheme in SCHEMES for variant in scheme.variants}
    first = {variants[case.scheme]: case for case in reversed(first_rows())}
    pairs = [case for case in all_cases() if case.id == "fp4-float4-pairs"]  # half a byte is the width of its dtype
    return [*first.values(), *pairs]


def contents(tensor: LogicalTensor) -> list[bytes]:
    return [
        bytes(part.stored.source.read(part.stored.offset, part.stored.offset + part.stored.nbytes))
        for part in tensor.parts
        if part.stored.nbytes
    ]


@pytest.mark.parametrize("case", one_of_each_scheme(), ids=lambda case: case.id)
def test_no_scheme_is_given_a_fault_it_has_not(case, tmp_path):
    """Against its own values nothing is named; against values of no relation nothing is proved. No byte is touched."""
    made = case.make()
    for name, content in made.files.items():
        (tmp_path / name).write_text(json.dumps(content))
    artifact = inspect(made.live or (made.write(tmp_path) if made.write else saved(tmp_path, made)))
    for tensor in artifact.parameters:
        try:
            values = tensor.decode().reshape(tensor.shape)
        except FormatError:
            continue
        before = contents(tensor)
        other = torch.randn(values.shape, generator=torch.Generator().manual_seed(12345)) * values.float().std()
        assert diagnose(tensor, tensor_of(faults.reference(values.clone()))) is None
        unrelated = diagnose(tensor, tensor_of(faults.reference(other)))
        assert unrelated is None or unrelated.tried_db is None, str(unrelated)
        assert contents(tensor) == before


def test_a_lost_block_of_a_large_tensor_is_found_near_the_row_that_is_known():
    weight = gaussian(1024, 512)
    model = encoders.bnb_4bit(weight)
    model.layer.weight.quant_state.absmax[8 * 700 + 5] = 0
    found = diagnosed(model, weight, near=700)
    assert found is not None
    assert found.name == "damaged-blocks"
    assert "row 700, column 320" in found.words


def test_no_more_is_decoded_than_a_sample(monkeypatch):
    seen = []
    decode = LogicalTensor.decode

    def counting(tensor, start=0, stop=None, device="cpu"):
        seen.append((stop - start) * tensor.columns)
        return decode(tensor, start, stop, device)

    weight = gaussian(2048, 768)
    model = encoders.bnb_4bit(weight)
    swap_nibbles(model.layer.weight)
    monkeypatch.setattr(LogicalTensor, "decode", counting)
    assert diagnosed(model, weight).name == "nibbles-swapped"
    assert max(seen) <= sample.HEAD_VALUES
    assert sum(seen) < 16 * sample.HEAD_VALUES


def test_a_norm_that_multiplies_by_one_and_its_weight():
    weight = gaussian(1024) * 25
    found = diagnosed(faults.reference(weight + 1), weight)
    assert found is not None
    assert (found.name, found.words) == ("shifted", "-1 added to every value")


def test_a_reference_of_nothing_gives_no_diagnosis():
    weight = gaussian(ROWS, COLUMNS)
    for other in (torch.zeros_like(weight), torch.full_like(weight, float("nan"))):
        assert diagnosed(encoders.bnb_4bit(weight), other) is None


def test_rewritten_parts_read_like_any_other():
    """Any window, as bytes and as numbers, is that of the whole part changed at once."""
    from pytest_quantcheck.containers.live_tensor import LiveTensor
    from pytest_quantcheck.tensor import Part, StoredTensor

    values = torch.arange(1, 41, dtype=torch.float32)
    stored = StoredTensor("scale", "F32", (40,), 160, LiveTensor(values))
    tensor = LogicalTensor("w", (40,), "x", "parameter", (Part("scale", "scales", stored),), None)
    shifted = rewritten.part(tensor, "scale", unit=4, shift=1).part("scale")
    assert torch.equal(shifted.load(), values.roll(-1))
    assert torch.equal(shifted.load(38, 40), torch.tensor([40.0, 1.0]))
    assert shifted.read(limit=1000) == bytearray(values.roll(-1).numpy().tobytes())
    swapped = rewritten.part(tensor, "scale", rewritten.swap_nibbles).part("scale")
    whole = rewritten.swap_nibbles(values.view(torch.uint8))
    assert torch.equal(swapped.load_bytes(3, 9), whole[3:9])
    assert torch.equal(swapped.load(2, 5), whole.view(torch.float32)[2:5])


def test_every_name_has_one_spelling():
    names = [name for hypothesis in HYPOTHESES for name in hypothesis.names]
    assert len(names) == len(set(names))
    assert all(scheme.alternatives is None or callable(scheme.alternatives) for scheme in SCHEMES)


def test_every_name_is_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs/howto/failures.md").read_text()
    told = {name for hypothesis in HYPOTHESES for name in hypothesis.names} | {"bias", "unrelated", "zeros"}
    told |= {fault.diagnosis for fault in faults.FAULTS if fault.diagnosis}
    assert [name for name in sorted(told) if f"`{name}`" not in page] == []


def test_a_sound_weight_of_few_levels_has_no_damage():
    """Some blocks of 2 bits carry next to nothing: so they do after rounding to nearest."""
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((ROWS, COLUMNS)) * 0.02
    found = diagnosed(encoders.bnb_4bit(weight, blocksize=4096), weight)
    assert found is None
