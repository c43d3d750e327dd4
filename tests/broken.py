"""Checkpoints that are broken on purpose: what a row makes, with one tensor gone or replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from tests.cases import Made

Change = Callable[[dict[str, torch.Tensor]], object]


def saved(folder: Path, made: Made, change: Change | None = None) -> Path:
    """Write what a row makes, changed, as a checkpoint folder."""
    tensors = dict(made.tensors or {})
    if change:
        change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(made.config))
    return folder


def without(part: str) -> Change:
    """Return a change that takes a tensor of the layer away."""
    return lambda tensors: tensors.pop(f"layer.{part}")


def put(part: str, tensor: torch.Tensor) -> Change:
    """Return a change that puts another tensor in the place of one of the layer."""
    return lambda tensors: tensors.__setitem__(f"layer.{part}", tensor)
