"""Every row of the table of schemes that has a state dict, written by torch.save: read like its safetensors twin."""

from __future__ import annotations

import json

import pytest
import torch

from pytest_quantcheck import inspect
from tests.cases import all_cases
from tests.scheme_table import verify

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_a_torch_file_is_read_like_its_safetensors_twin(case, tmp_path):
    made = case.make()
    # torchao saves its tensors whole in torch files, and in parts with a record in safetensors.
    state = made.live.state_dict() if made.metadata and made.live is not None else made.tensors
    if state is None or (made.metadata and made.live is None):
        pytest.skip("this layout is not saved by torch.save")
    torch.save(state, tmp_path / "pytorch_model.bin")
    for name, content in {"config.json": made.config, **made.files}.items():
        (tmp_path / name).write_text(json.dumps(content))
    artifact = inspect(tmp_path)
    assert artifact.container == "torch"
    assert False not in verify(case, made, artifact)
