"""Does the checkpoint hold the model that its configuration describes: every tensor against the unquantized model.

transformers builds the model on the meta device and loads the logical tensors, as shapes, into it. A wrong bit width
that no header contradicts (2 bits in groups of 64 read as 4 bits in groups of 32) shows here: its shape does not fit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted
from pytest_quantcheck.tensor import LogicalTensor

CHECK = "architecture"
SECONDS = 300
SHOWN = 3
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert
PROGRAM = Path(__file__).with_name("unquantized_model.py")


def disagreements(
    source: str, configs: Mapping[str, Mapping[str, object]], tensors: Iterable[LogicalTensor]
) -> list[Finding]:
    """Return a finding for every logical tensor whose shape is not the one of the unquantized model.

    A tensor that the model has and the artifact lacks is a warning; what the model does not have is one note, and an
    error where that is everything. Raises `FormatError` where config.json describes no model that transformers has,
    and `ValueError` where transformers is not installed.
    """
    _require_transformers("verifying the architecture")
    config = configs.get("config.json")
    if not config:
        raise FormatError("has no config.json, so no architecture to verify", file=source)
    by_name = {tensor.name: tensor for tensor in tensors if tensor.role in ("parameter", "tied", "buffer")}
    answer = _ask(source, config, {name: _shape(tensor) for name, tensor in by_name.items()})
    return list(_findings(answer, by_name))


def described(source: str, config: Mapping[str, object]) -> dict[str, Any]:
    """Return the tensors that a checkpoint of the model holds, see `unquantized_model.described`.

    Raises `FormatError` where the configuration describes no model that transformers has, and `ValueError` where
    transformers is not installed.
    """
    _require_transformers("predicting from a configuration")
    return _ask(source, config, None)


def _require_transformers(what: str) -> None:
    if find_spec("transformers") is None:
        raise ValueError(f"{what} needs transformers: pip install pytest-quantcheck[hf]")


def _shape(tensor: LogicalTensor) -> list[int]:
    """The shape as the unquantized model keeps it."""
    shape = list(tensor.shape)
    return [*shape[:-2], shape[-1], shape[-2]] if tensor.transposed else shape


def _ask(source: str, config: Mapping[str, object], shapes: Mapping[str, list[int]] | None) -> dict[str, Any]:
    """Run the loader in a process of its own and return its answer."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        process = subprocess.run(
            [sys.executable, "-P", str(PROGRAM)],
            input=json.dumps({"config": config, "shapes": shapes}).encode(),
            capture_output=True,
            timeout=SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FormatError(f"its model is not built after {SECONDS} seconds", file=source) from None
    if process.returncode:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        raise FormatError(f"its model cannot be built: {lines[-1] if lines else process.returncode}", file=source)
    answer: dict[str, Any] = json.loads(process.stdout)
    if "unknown" in answer:
        raise FormatError(f"its architecture is not known: {answer['unknown']}", file=source)
    return answer


def _findings(answer: Mapping[str, Any], tensors: Mapping[str, LogicalTensor]) -> Iterator[Finding]:
    model = f"{answer['model']} of transformers {answer['transformers']}"
    unexpected = answer["unexpected"]
    if len(unexpected) == len(tensors):
        yield Finding(CHECK, "error", None, f"none of {counted(len(tensors), 'name')} is one of {model}")
        return
    for name, measured, expected in sorted(answer["mismatched"]):
        how = f" (read as {tensors[name].scheme})" if name in tensors else ""
        yield Finding(CHECK, "error", name, f"has the shape {measured}{how}, {model} has {expected}")
    unmerged = set(answer.get("unmerged", ()))
    for target in sorted(unmerged):
        yield Finding(CHECK, "error", target, f"cannot be made for {model}: {_odd_ones(target, tensors)}")
    for name, shape in sorted(answer["missing"].items()):
        if name not in unmerged:
            yield Finding(CHECK, "warning", name, f"is missing: {model} has it with the shape {shape}")
    if unexpected:
        shown = ", ".join(f"`{name}`" for name in unexpected[:SHOWN])
        more = f" and {len(unexpected) - SHOWN:,} more" if len(unexpected) > SHOWN else ""
        yield Finding(CHECK, "note", None, f"{model} has no {shown}{more}")


def _odd_ones(target: str, tensors: Mapping[str, LogicalTensor]) -> str:
    """Which of the tensors that are merged into one has another shape than its siblings."""
    groups: dict[str, list[LogicalTensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_NUMBER.sub("*", name), []).append(tensor)
    layer = _NUMBER.findall(target)[:1]
    for group in groups.values():
        usual = Counter(tensor.shape for tensor in group).most_common(1)[0][0]
        odd = [tensor for tensor in group if tensor.shape != usual and _NUMBER.findall(tensor.name)[:1] == layer]
        if odd and len(_NUMBER.findall(odd[0].name)) > 1:
            return f"`{odd[0].name}` has the shape {list(odd[0].shape)}, its siblings {list(usual)}"
    return "the tensors it is merged from do not fit together"
