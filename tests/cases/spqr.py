"""SpQR: golden layers packed and decoded by the library's host functions (tests/golden/make_spqr.py)."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from tests.cases import Case, Made

GOLDEN = Path(__file__).parents[1] / "golden" / "spqr.safetensors"
UP = "model.layers.0.mlp.up_proj"


def _golden(strategy: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    stored = safetensors.torch.load_file(GOLDEN)
    parts = {name: stored[f"{strategy}.{name}"] for name in ("dense_weights", "row_offsets", "col_vals")}
    return parts, stored[f"{strategy}.values"].float()


def _live(parts: dict[str, torch.Tensor], rows: int, columns: int) -> nn.Module:
    """As much of `spqr_quant.QuantizedLinear` as a layer holds: importing the real one builds a GPU kernel."""
    kind = type("QuantizedLinear", (nn.Module,), {"__module__": "spqr_quant.inference"})
    layer = kind()
    layer.m, layer.n = rows, columns
    for name, part in parts.items():
        layer.register_parameter(name, nn.Parameter(part, requires_grad=False))
    model = nn.Module()
    model.layer = layer
    return model


def csr() -> Made:
    """No permutation, so only the model's configuration knows K."""
    parts, values = _golden("csr")
    config = {
        "quantization_config": {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16},
        "hidden_size": 38,
        "intermediate_size": 32,
    }
    return Made(values, None, {f"{UP}.{name}": part for name, part in parts.items()}, config)


def ptcsr() -> Made:
    """Sixteen rows share an offset; the columns were quantized in another order."""
    parts, values = _golden("ptcsr")
    perm = torch.randperm(38, generator=torch.Generator().manual_seed(1))
    pairs = perm.view(-1, 2)
    parts["in_perm"] = (pairs[:, 1] << 16 | pairs[:, 0]).to(torch.int32)
    answer = torch.empty_like(values)
    for column, place in enumerate(perm.tolist()):
        answer[:, place] = values[:, column]
    live = _live(parts, 48, 38)
    return Made(answer, live, live.state_dict())


def by_hand(rows: int):
    """One column of tiles of scale codes 1 over one (s_s 1, s_z 0) and zero codes 0: w is the code, plus an outlier."""

    def make() -> Made:
        return _by_hand(rows)

    return make


def _by_hand(rows: int) -> Made:
    one = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float16).view(torch.uint8).tolist()  # s_s, z_s, s_z, z_z
    words = [1 | (row % 8) << 6 | 7 << 9 | one[row // 2] << 54 for row in range(16)]
    words = words * -(-rows // 16)  # rows beyond the last are padding
    values = torch.zeros(rows, 2)
    values[:, 0] = torch.arange(rows) % 16 % 8
    values[:, 1] = 7
    values[3, 1] += 0.5
    tensors = {
        "layer.dense_weights": torch.tensor(words),
        "layer.row_offsets": torch.tensor([0] * 4 + [1] * (rows - 3), dtype=torch.int32),
        "layer.col_vals": torch.tensor([0x3800 << 16 | 1], dtype=torch.int32),  # 0.5 in column 1
        "layer.in_perm": torch.tensor([1 << 16 | 0], dtype=torch.int32),
    }
    return Made(values, None, tensors)


CASES = [
    Case("spqr-by-hand", by_hand(16), "spqr", (16, 2), bytes={"codes": 128 + 4, "index": 68 + 4}),
    Case("spqr-by-hand-19-rows", by_hand(19), "spqr", (19, 2), bytes={"codes": 256 + 4, "index": 80 + 4}),
    Case("spqr-csr", csr, "spqr", (32, 38), f"{UP}.weight"),
    Case("spqr-ptcsr-permuted", ptcsr, "spqr", (48, 38)),
]  # fmt: skip
