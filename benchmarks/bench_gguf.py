"""GGUF: listing a file with a vocabulary of 256k tokens, decoding on one core; the gguf package beside it."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import measure
from tests import gguf_files
from tests.gguf_files import SIZES, Tensor, architecture, key

TOKENS = 256_000
ROWS, COLUMNS = 4096, 4096
ROUNDS = 7
WINDOWS = "ours, from the file, in windows"

OURS = "from pytest_quantcheck import inspect; assert len(inspect({path!r}).tensors) == 300"
PACKAGE = "import gguf; assert len(gguf.GGUFReader({path!r}).tensors) == 300"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _listing(str(_with_vocabulary(Path(folder) / "vocabulary.gguf")))
        for kind in ("Q4_K", "Q6_K"):
            _decoding(Path(folder) / f"{kind}.gguf", kind)


def _with_vocabulary(path: Path) -> Path:
    tokens = [f"token-{number}" for number in range(TOKENS)]
    keys = [
        *architecture("llama", head_count=32, head_count_kv=8),
        key("tokenizer.ggml.tokens", "[string]", tokens),
        key("tokenizer.ggml.scores", "[f32]", [0.0] * TOKENS),
        key("tokenizer.ggml.token_type", "[i32]", [1] * TOKENS),
    ]
    tensors = [Tensor(f"blk.{number}.ffn_up.weight", "Q4_K", (256, 256)) for number in range(300)]
    return gguf_files.write_sparse(path, tensors, keys)


def _listing(path: str) -> None:
    results = measure.in_turns(
        {
            "list with a 256k vocabulary": measure.python(OURS.format(path=path)),
            "quantcheck inspect --json": [sys.executable, "-m", "pytest_quantcheck", "inspect", "--json", path],
            "gguf.GGUFReader": measure.python(PACKAGE.format(path=path)),
        },
        rounds=3,
    )
    measure.table(results)


def _decoding(path: Path, kind: str) -> None:
    """Both decode the same bytes of one matrix, in turns, on one core each; ours reads them from the file as well."""
    # Here, so that the processes above start from a small one: what a process inherits counts as its peak memory.
    import gguf
    import numpy as np
    import torch

    from pytest_quantcheck import inspect

    torch.set_num_threads(1)
    values, width = SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 120, (ROWS, COLUMNS // values * width), dtype=np.uint8)
    path.write_bytes(gguf_files.gguf([Tensor("layer.weight", kind, (ROWS, COLUMNS), raw.tobytes())]))
    tensor = inspect(path).tensor("layer.weight")
    number = gguf.GGMLQuantizationType[kind]
    assert torch.equal(tensor.decode(), torch.from_numpy(gguf.quants.dequantize(raw, number).copy()))

    def in_windows() -> None:
        for start, stop in tensor.windows():
            tensor.decode(start, stop)

    rows = {
        WINDOWS: in_windows,
        "ours, from the file, whole": tensor.decode,
        "gguf.quants.dequantize": lambda: gguf.quants.dequantize(raw, number),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, run in rows.items():
            times[name].append(_seconds(run))
    first = statistics.median(times[WINDOWS])
    print(f"\n{kind}, {ROWS} x {COLUMNS}{'':22}  {'seconds':>8}  {'times':>6}  {'M values/s':>10}")
    for name, taken in times.items():
        seconds = statistics.median(taken)
        print(f"{name:40}  {seconds:8.3f}  {seconds / first:6.1f}  {ROWS * COLUMNS / seconds / 1e6:10.0f}", flush=True)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
