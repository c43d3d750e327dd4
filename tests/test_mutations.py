"""Every layout with one thing wrong: an error of ours that names it, or an answer; never another exception."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import FormatError, inspect
from tests.cases import all_cases

SMALL = 200_000  # stored values of a row that is written many times over
OTHER_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.float32, torch.float16, torch.bool)
ODD_SETTINGS = (None, "x", -1, 0, True, 1.5, 10**30, [], [-1, -1], {}, {"a": 1})


def first_rows() -> list:
    """One row of each scheme."""
    found = {}
    for case in all_cases():
        found.setdefault(case.scheme, case)
    return list(found.values())


def mutants(tensors: dict, config: dict):
    for name, tensor in tensors.items():
        yield {other: content for other, content in tensors.items() if other != name}, config
        changed = [tensor.reshape(-1), tensor.unsqueeze(0), torch.zeros((), dtype=tensor.dtype)]
        if tensor.dim():
            changed += [tensor[:-1], tensor[:0], tensor.transpose(0, -1), tensor[..., :-1], tensor[..., :0]]
        changed += [torch.zeros(tensor.shape, dtype=dtype) for dtype in OTHER_DTYPES if dtype != tensor.dtype]
        yield from (({**tensors, name: other}, config) for other in changed)
    yield from ((tensors, other) for path in settings(config) for other in odd_settings(config, path))


def settings(config, path=()):
    if isinstance(config, dict):
        for key in config:
            yield (*path, key)
            yield from settings(config[key], (*path, key))


def odd_settings(config, path):
    for value in ODD_SETTINGS:
        changed = copy.deepcopy(config)
        level = changed
        for key in path[:-1]:
            level = level[key]
        level[path[-1]] = value
        yield changed


@pytest.mark.parametrize("case", first_rows(), ids=lambda case: case.id)
def test_one_thing_wrong(case, tmp_path):
    made = case.make()
    if made.tensors is None or made.files or sum(tensor.numel() for tensor in made.tensors.values()) > SMALL:
        pytest.skip("not saved, or too large to be written many times")
    for tensors, config in mutants(made.tensors, made.config):
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"} | made.metadata)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with contextlib.suppress(FormatError):
            look_at(tmp_path)


def look_at(path) -> None:
    artifact = inspect(path)
    assert sum(artifact.bytes.values()) == artifact.file_bytes
    for tensor in artifact.tensors:
        with contextlib.suppress(FormatError):
            assert tensor.decode(0, min(2, tensor.rows)).shape == (min(2, tensor.rows), tensor.columns)
