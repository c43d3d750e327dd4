"""What is left of a merged adapter: by hand, on real PEFT models, and where nothing can be said."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from pytest_quantcheck import assert_delta_preserved, assert_dequant_fidelity
from pytest_quantcheck.checks import delta
from tests import models


def plain(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return model


def test_by_hand():
    base = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    merged = base + torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, -1.0]])
    stored = merged + torch.tensor([[0.25, 0.0, 0.0], [0.0, 0.0, 0.5]])
    deltas = assert_delta_preserved(plain(w=base), plain(w=merged), plain(w=stored), min_db=6)
    (row,) = deltas.tensors
    assert row.db == pytest.approx(10 * math.log10(1.25 / 0.3125))
    assert row.gain == pytest.approx((0.5 * 0.5 + -1.0 * -0.5) / 1.25)
    assert row.share == pytest.approx(math.sqrt(1.25 / 91))
    assert deltas.db == row.db


def nf4(values: torch.Tensor) -> nn.Module:
    rows, columns = values.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight.data = values.clone()
    return layer.to("cpu")


def low_rank(rows: int, columns: int, share: float, base: torch.Tensor) -> torch.Tensor:
    """A delta of rank 8 whose norm is that share of the base's."""
    values = torch.randn(rows, 8) @ torch.randn(8, columns)
    return values * (share * base.norm() / values.norm())


# NF4 keeps 20.7 dB of the weights; an adapter of 10 % of them is 20 dB below them, so 0.7 dB of it are left.
@pytest.mark.parametrize(("share", "db"), [(0.1, 0.76), (0.01, -19.3), (1.0, 17.7)])
def test_a_healthy_quantization_keeps_as_much_as_its_noise_allows(share, db):
    torch.manual_seed(0)
    base = 0.02 * torch.randn(256, 512)
    merged = base + low_rank(256, 512, share, base)
    quantized = nf4(merged)
    assert_dequant_fidelity(quantized, plain(weight=merged))
    deltas = assert_delta_preserved(plain(weight=base), plain(weight=merged), quantized, min_db=-99)
    assert deltas.db == pytest.approx(db, abs=0.3)


def test_a_lost_adapter_is_seen_where_the_weights_look_healthy():
    """The quantized base instead of the quantized merge: 18 dB of the weights, and nothing of the adapter."""
    torch.manual_seed(0)
    base = 0.02 * torch.randn(256, 512)
    merged = base + low_rank(256, 512, 0.1, base)
    with pytest.raises(AssertionError) as caught:
        assert_delta_preserved(plain(weight=base), plain(weight=merged), nf4(base), min_db=0)
    message = str(caught.value)
    assert "under the allowed min 0 dB" in message
    assert "weight: -2." in message
    assert "(gain 0.0" in message or "(gain -0.0" in message
    assert "the adapter is 10.00 % of the weight, bnb-nf4): the noise is larger than the adapter" in message


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    base = models.save("llama", folder / "base")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(models.load(base), config)
    model.merge_and_unload().save_pretrained(folder / "merged")
    models.load(folder / "merged", **models.NF4).save_pretrained(folder / "nf4")
    models.load(folder / "merged", **models.INT8).save_pretrained(folder / "int8")
    models.load(base, **models.NF4).save_pretrained(folder / "lost")
    return folder


def test_an_adapter_of_peft_survives_eight_bits_better_than_four(merged):
    four, eight = (
        assert_delta_preserved(merged / "base", merged / "merged", merged / kind, min_db=-50)
        for kind in ("nf4", "int8")
    )
    assert len(four.tensors) == len(eight.tensors) == 6
    assert {row.name.split(".")[-2] for row in four.tensors} == {"q_proj", "up_proj"}
    assert eight.db > four.db + 10
    with pytest.raises(AssertionError, match="6 under the allowed min"):
        assert_delta_preserved(merged / "base", merged / "merged", merged / "lost", min_db=four.db - 1)


def test_windows_do_not_change_the_result(merged, monkeypatch):
    whole = assert_delta_preserved(merged / "base", merged / "merged", merged / "nf4", min_db=-50)
    monkeypatch.setattr(delta, "WINDOW", 640)
    windowed = assert_delta_preserved(merged / "base", merged / "merged", merged / "nf4", min_db=-50)
    assert windowed.db == pytest.approx(whole.db, abs=1e-9)


ONE, TWO = torch.ones(3, 5), 2 * torch.ones(3, 5)
FAILS = [
    ("nothing-merged", plain(w=ONE), plain(w=ONE), plain(w=ONE), "nothing was merged"),
    ("not-in-the-base", plain(v=ONE), plain(w=TWO), plain(w=TWO), "w: is not in the base"),
    ("not-in-the-quantized", plain(w=ONE), plain(w=TWO), plain(v=TWO), "w: is in the merged model only"),
    ("shape", plain(w=ONE), plain(w=TWO), plain(w=TWO.t().clone()), "w: is 5 x 3, the base has 3 x 5"),
    ("nan", plain(w=ONE), plain(w=TWO), plain(w=TWO * float("nan")), "w: nan dB"),
    ("nan-in-the-merged", plain(w=ONE), plain(w=TWO * float("nan")), plain(w=TWO), "w: nan dB"),
]


@pytest.mark.parametrize(
    ("base", "merged_one", "quantized", "message"), [row[1:] for row in FAILS], ids=[row[0] for row in FAILS]
)
def test_what_must_fail_fails(base, merged_one, quantized, message):
    with pytest.raises(AssertionError, match=message):
        assert_delta_preserved(base, merged_one, quantized, min_db=-99)


def test_an_adapter_that_was_not_merged_says_so():
    base = nn.ModuleDict({"q": nn.Linear(64, 24, bias=False)})
    reference = nn.ModuleDict({"q": nn.Linear(64, 24, bias=False)})
    reference.load_state_dict(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(AssertionError, match="is an adapter: merge it first"):
        assert_delta_preserved(reference, model, reference, min_db=0)
