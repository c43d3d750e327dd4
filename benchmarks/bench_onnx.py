"""ONNX: SmolLM2-135M in its four files, and listing one whose weights lie beside it; the onnx package beside it."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import onnx

from benchmarks import measure
from pytest_quantcheck import inspect
from pytest_quantcheck.checks.tree import tree
from pytest_quantcheck.checks.why import explain
from pytest_quantcheck.report.sizes import print_explanation
from tests import smollm2

OURS = "from pytest_quantcheck import inspect; assert inspect({path!r}).logical_params == {params}"
PACKAGE = """
import math, onnx
model = onnx.load({path!r})
assert sum(math.prod(tensor.dims) for tensor in model.graph.initializer) > {params}
"""
WITHOUT = PACKAGE.replace("{path!r}", "{path!r}, load_external_data=False")


def main() -> None:
    sizes = smollm2.Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _puzzle(folder, sizes)
        for kind in ("fp32", "q4"):
            _listing(folder / f"model_{kind}.onnx", sizes.params)


def _puzzle(folder: Path, sizes: smollm2.Sizes) -> None:
    """The sizes that are published, and what is said about the one that people ask about."""
    print(f"{'':6}  {'bytes':>11}  {'published MB':>12}  {'times':>7}  {'parameters':>11}  {'duplicated':>10}")
    for kind, model in smollm2.all_four(sizes):
        path = folder / f"model_{kind}.onnx"
        path.write_bytes(model.SerializeToString())
        published, artifact = smollm2.PUBLISHED_MB[kind], inspect(path)
        counts = f"{artifact.logical_params:>11,}  {artifact.tied_params:>10,}"
        ratio = artifact.file_bytes / published / 1e6
        print(f"{kind:6}  {artifact.file_bytes:>11,}  {published:>12}  {ratio:>7.4f}  {counts}", flush=True)
        assert abs(ratio - 1) < 0.005
        assert (artifact.logical_params, artifact.tied_params) == (sizes.params, sizes.table)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        artifact = inspect(folder / "model_q4.onnx")
        print_explanation(explain(artifact), tree(artifact, 0))
    print("", *shown.getvalue().splitlines()[1:21], sep="\n")


def _listing(path: Path, params: int) -> None:
    """List a model with all weights in a file beside it."""
    beside = path.with_name(f"beside_{path.name}")
    data = f"{beside.name}.data"
    onnx.save_model(onnx.load(path), beside, save_as_external_data=True, location=data, size_threshold=0)
    codes = {
        f"list {path.stem}, its weights beside it": OURS,
        "onnx.load": PACKAGE,
        "onnx.load, weights left out": WITHOUT,
    }
    commands = {name: measure.python(code.format(path=str(beside), params=params)) for name, code in codes.items()}
    print()
    measure.table(measure.in_turns(commands, rounds=3))
