"""ONNX: SmolLM2-135M in its four files, and listing one whose weights lie beside it; the onnx package beside it."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

from benchmarks import measure
from tests import smollm2

OURS = "from pytest_quantcheck import inspect; assert inspect({path!r}).logical_params == {params}"
PACKAGE = "import onnx; assert len(onnx.load({path!r}).graph.initializer) > 270"
WITHOUT = "import onnx; assert len(onnx.load({path!r}, load_external_data=False).graph.initializer) > 270"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own: what a process inherits counts as its peak memory.
        made = multiprocessing.get_context("spawn").Process(target=puzzle, args=(Path(folder),))
        made.start()
        made.join()
        assert made.exitcode == 0
        for kind in ("fp32", "q4"):
            _listing(Path(folder) / f"beside_{kind}.onnx")


def puzzle(folder: Path) -> None:
    """Print the sizes that are published beside ours, and what is said about the file that people ask about."""
    import onnx

    from pytest_quantcheck import inspect
    from pytest_quantcheck.checks.tree import tree
    from pytest_quantcheck.checks.why import explain
    from pytest_quantcheck.report.sizes import print_explanation

    sizes = smollm2.Sizes()
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
        beside = f"beside_{kind}.onnx"
        onnx.save_model(model, folder / beside, save_as_external_data=True, location=f"{beside}.data", size_threshold=0)
    artifact = inspect(folder / "model_q4.onnx")
    print()
    print_explanation(explain(artifact), tree(artifact, 0))


def _listing(path: Path) -> None:
    """List a model with all weights in a file beside it."""
    codes = {
        f"list {path.stem}": OURS.format(path=str(path), params=smollm2.Sizes().params),
        "onnx.load": PACKAGE.format(path=str(path)),
        "onnx.load, weights left out": WITHOUT.format(path=str(path)),
    }
    print()
    measure.table(measure.in_turns({name: measure.python(code) for name, code in codes.items()}, rounds=3))
