"""The command line: exit codes, one error line, tables that fit, JSON that keeps its schema."""

from __future__ import annotations

import json
import os
import pty
import struct
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import jsonschema
import pytest
import safetensors.torch
import torch

import pytest_quantcheck.report
from tests import layouts
from tests.test_safetensors import FOLDERS

REPORT = Path(pytest_quantcheck.report.__path__[0])
INSPECT, COMPARE = (json.loads((REPORT / f"{name}.schema.json").read_text()) for name in ("inspect", "compare"))


def quantcheck(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest_quantcheck", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A quantized checkpoint and its reference."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(128, 96), "norm": torch.nn.LayerNorm(96)})
    safetensors.torch.save_file(model.state_dict(), folder / "reference.safetensors")
    layer = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict(model["layer"].state_dict())
    model["layer"] = layer.to("cpu")
    safetensors.torch.save_file(model.state_dict(), folder / "nf4.safetensors")
    model["layer"].weight.quant_state.absmax[0] = 0
    safetensors.torch.save_file(model.state_dict(), folder / "broken.safetensors")
    return folder


def test_inspect_json_keeps_its_schema(mistral, pair):
    for path in (mistral, pair / "nf4.safetensors", pair / "reference.safetensors"):
        done = quantcheck("inspect", path, "--json")
        assert done.returncode == 0
        jsonschema.validate(json.loads(done.stdout), INSPECT)


def test_compare_json_keeps_its_schema_and_exits_with_the_verdict(pair):
    done = quantcheck("compare", pair / "nf4.safetensors", pair / "reference.safetensors", "--json")
    document = json.loads(done.stdout)
    jsonschema.validate(document, COMPARE)
    assert (done.returncode, document["compared"]) == (0, 4)
    assert document["sqnr_db"] > 20
    verdicts = {row["name"]: row["verdict"] for row in document["tensors"]}
    assert verdicts == {"layer.weight": "passed", "layer.bias": "equal", "norm.weight": "equal", "norm.bias": "equal"}

    done = quantcheck("compare", pair / "broken.safetensors", pair / "reference.safetensors", "--json")
    document = json.loads(done.stdout)
    jsonschema.validate(document, COMPARE)
    assert (done.returncode, document["tensors"][0]["verdict"]) == (1, "failed")


def test_compare_as_text_names_the_broken_tensor(pair):
    done = quantcheck("compare", pair / "broken.safetensors", pair / "reference.safetensors")
    assert done.returncode == 1
    error, likely, *rest = done.stdout.partition("error: ")[2].splitlines()
    assert error.startswith("layer.weight: SQNR 18.7 dB is under ")
    assert "; worst block has 0.0 dB" in error
    assert likely.startswith("  likely damaged-blocks: with 1 of 192 blocks left out")
    assert not rest
    assert "3 plain tensors are equal to the reference" in done.stdout


def test_warnings_fail_under_strict_only(pair, tmp_path):
    for name, source in (("model.safetensors", "nf4"), ("model-00001-of-00002.safetensors", "reference")):
        (tmp_path / name).write_bytes((pair / f"{source}.safetensors").read_bytes())
    assert quantcheck("inspect", tmp_path).returncode == 0
    done = quantcheck("inspect", tmp_path, "--strict")
    assert done.returncode == 1
    assert "warning: `model-00001-of-00002.safetensors`" in done.stdout


def bad_input(tmp_path):
    """Every way an input can be bad, as (arguments, what the one line says)."""
    for name, make, what in FOLDERS:
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "model")
        yield ["inspect", folder / "model"], what
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    yield ["inspect", huge], "header claims 9,223,372,036,854,775,808 bytes (limit 100,000,000)"
    yield ["inspect", tmp_path / "absent"], "no such file or folder"
    text = tmp_path / "model.txt"
    text.write_text("hello")
    yield ["inspect", text], "not a container we read"
    yield ["inspect"], "Missing argument 'PATH'"
    yield ["inspect", text, "--jsno"], "No such option"
    yield ["compare", huge, huge], "header claims"
    yield ["frobnicate"], "No such command"
    for missing in ("quant_state.bitsandbytes__nf4", "absmax", "quant_map"):
        folder = tmp_path / missing
        entries = [entry for entry in layouts.nf4("a.weight", (6, 64)) if not entry.name.endswith(missing)]
        config = {"quantization_config": layouts.BNB_CONFIG}
        yield ["inspect", layouts.write_folder(folder, entries, config, shards=1)], "a.weight: has no `a.weight."
    folder = tmp_path / "packed-alone"
    entries = [layouts.Entry("a.weight", "U8", (192, 1))]
    config = {"quantization_config": layouts.BNB_CONFIG}
    yield ["inspect", layouts.write_folder(folder, entries, config, shards=1)], "packed 4-bit, but has no"
    config = {"quantization_config": {"quant_method": "rot13"}}
    folder = layouts.write_folder(tmp_path / "unknown-method", entries, config, shards=1)
    yield ["inspect", folder], "quant_method `rot13` is not one we know"
    named = tmp_path / "escape.safetensors"
    layouts.write_file(named, [layouts.Entry("\x1b[31mred\n\u202ename", "U8", (3, 1))])
    yield ["inspect", named], r"\x1b[31mred\n\u202ename"


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    for arguments, what in bad_input(tmp_path):
        done = quantcheck(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr.startswith("quantcheck: error: ")
        assert done.stderr.count("\n") == 1
        assert what in done.stderr
        assert done.stderr[:-1].isprintable()


def on_a_terminal(columns: int, *arguments: object, **environment: str) -> str:
    pid, terminal = pty.fork()
    if not pid:
        os.environ.update({"COLUMNS": str(columns), "TERM": "xterm-256color"} | environment)
        os.execv(sys.executable, [sys.executable, "-m", "pytest_quantcheck", *map(str, arguments)])
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return shown.decode()


@pytest.mark.parametrize("columns", [80, 200])
def test_tables_fit_the_terminal(mistral, columns):
    shown = on_a_terminal(columns, "inspect", mistral, NO_COLOR="1")
    assert "\x1b" not in shown.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    lines = shown.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()
    assert max(map(len, lines)) <= columns
    assert any("model.layers.31.self_attn.q_proj.weight" in line for line in lines)


def test_piped_output_is_plain_and_one_line_a_tensor(mistral):
    done = quantcheck("inspect", mistral, FORCE_COLOR="1")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert sum(line.startswith("model.layers.") for line in done.stdout.splitlines()) == 32 * 9


def test_a_reader_that_leaves_early_is_no_error(mistral):
    command = f"{sys.executable} -m pytest_quantcheck inspect {mistral} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_names_from_a_checkpoint_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "a.safetensors"
    layouts.write_file(path, [layouts.Entry("\x1b[2Jx\r\n\u202e", "F32", (3, 1))])
    done = quantcheck("inspect", path)
    assert done.returncode == 0
    assert r"\x1b[2Jx\r\n\u202e" in done.stdout
    assert "\x1b" not in done.stdout


def test_version_and_help():
    assert quantcheck("--version").stdout.startswith("quantcheck, version ")
    assert "inspect" in quantcheck("--help").stdout
    assert quantcheck("inspect", "--help").returncode == 0
