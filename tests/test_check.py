"""`quantcheck check`, `check-size` and `init`, as users run them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import bitsandbytes as bnb
import jsonschema
import pytest
import safetensors.torch
import torch

import pytest_quantcheck.report
from pytest_quantcheck import inspect, keys, runner
from pytest_quantcheck.checks import params, size
from pytest_quantcheck.cli import main
from tests import layouts

SCHEMA = json.loads((Path(pytest_quantcheck.report.__path__[0]) / "check.schema.json").read_text())
PARAMS = 96 * 64 + 33 * 64 + 64  # of `small`
SIZE = 9121


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def quantcheck(*arguments: object, cwd: Path, **environment: str) -> Done:
    """Run the command line in this process: exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_:
            main(list(map(str, arguments)))
    return Done(exit_.value.code, out.getvalue(), err.getvalue())


def small(folder: Path, rows: int = 33) -> Path:
    """One NF4 matrix, one plain one, one vector."""
    entries = [
        *layouts.nf4("layers.0.up_proj.weight", (96, 64)),
        layouts.Entry("embed_tokens.weight", "BF16", (rows, 64)),
        layouts.Entry("norm.weight", "BF16", (64,)),
    ]
    return layouts.write_folder(folder, entries, {"quantization_config": layouts.BNB_CONFIG}, shards=1)


def write(folder: Path, text: str) -> None:
    (folder / "quantcheck.toml").write_text(text)


def artifact(path: str, **settings: object) -> str:
    lines = [f"{key} = {value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(["[[artifact]]", f'path = "{path}"', *lines, ""])


def test_of_ten_artifacts_it_names_exactly_the_two_that_are_broken(tmp_path):
    for number in range(10):
        small(tmp_path / f"model-{number}", rows=33 + 100 * (number == 3))
    (tmp_path / "model-7/config.json").write_text("{")
    write(tmp_path, artifact("model-*", logical_params=PARAMS, size='"10 KB"'))
    done = quantcheck("check", "--json", cwd=tmp_path)
    run = json.loads(done.stdout)
    jsonschema.validate(run, SCHEMA)
    statuses = {entry["name"]: {check["status"] for check in entry["checks"]} for entry in run["artifacts"]}
    assert {name for name, found in statuses.items() if found != {"passed"}} == {"model-3", "model-7"}
    assert (statuses["model-3"], statuses["model-7"]) == ({"failed"}, {"error"})
    assert "model-7/config.json" in run["artifacts"][7]["error"]
    assert (done.returncode, run["exit_code"]) == (2, 2)
    text = quantcheck("check", cwd=tmp_path).stdout
    assert [number for number in range(10) if f"model-{number}" in text] == [3, 7]


MESSAGES = {
    "missing-file": (artifact("absent", size=1), 2, "absent: no such file or folder (quantcheck.toml:2)"),
    "missing-reference": (
        artifact("model", reference='"absent"'),
        2,
        "fidelity: the reference cannot be read: absent: no such file or folder",
    ),
    "over-budget": (
        artifact("model", size='"8 KB"'),
        1,
        "file size: 9.12 KB (9,121 bytes) exceeds the budget of 8.00 KB (8,000 bytes) by 1.12 KB (14.0%)",
    ),
    "glob-of-nothing": (artifact("absent-*", size=1), 2, "`absent-*` matches nothing (quantcheck.toml:2)"),
    "over-a-host": (artifact("model", size_per_class="{ scales = 3 }"), 1, "scales: 384 B (384 bytes) exceeds"),
    "good": (artifact("model", host='["github", "huggingface"]'), 0, "all good"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_each_failure_has_its_own_message_and_exit_code(tmp_path, case):
    text, code, said = MESSAGES[case]
    small(tmp_path / "model")
    write(tmp_path, text)
    done = quantcheck("check", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (code, "")
    assert said in done.stdout


def test_an_exceeded_budget_says_all_that_is_needed_to_fix_it(tmp_path):
    small(tmp_path / "model")
    write(tmp_path, artifact("model", baseline="true"))
    quantcheck("check", "--update", cwd=tmp_path)
    small(tmp_path / "model", rows=133)
    write(tmp_path, artifact("model", size='"9 KB"', message='"ask the release team"'))
    out = quantcheck("check", cwd=tmp_path).stdout.splitlines()
    said = "\n".join(line.strip() for line in out)
    assert "exceeds the budget of 9.00 KB (9,000 bytes) by 12.93 KB (143.7%)" in said
    for line in (
        "the limit is in quantcheck.toml:3",
        "ask the release team",
        "measured: all files of the folder",
        "grown since the baseline: unquantized +12.80 KB",
        "+12.80 KB  embed_tokens.weight  plain BF16 4.22 KB -> 17.02 KB",
        "up to 12.04 KB (11.76 KiB)  embed_tokens.weight: quantized like the rest, 4.685 bits a weight",
    ):
        assert line in said, said


def test_one_check_that_cannot_be_made_leaves_the_others(tmp_path):
    small(tmp_path / "model")
    write(tmp_path, artifact("model", logical_params=PARAMS, reference='"absent"', size=1))
    run = json.loads(quantcheck("check", "--json", cwd=tmp_path).stdout)
    statuses = {check["check"]: check["status"] for check in run["artifacts"][0]["checks"]}
    assert statuses == {"logical_params": "passed", "size": "failed", "fidelity": "error"}


@pytest.mark.parametrize("broken", ["check_size_budget", "check_logical_params"])
def test_a_bug_in_one_check_is_one_line_and_leaves_the_others(tmp_path, monkeypatch, broken):
    def bug(*_: object, **__: object) -> None:
        raise KeyError("weight\x1b[31m\nTraceback")

    monkeypatch.setattr(size if broken == "check_size_budget" else params, broken, bug)
    small(tmp_path / "model")
    write(tmp_path, artifact("model", logical_params=PARAMS, size='"1 MB"', host='"github"'))
    done = quantcheck("check", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    assert re.search(r"KeyError: .* \(a bug, in test_check.py:\d+\)$", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout
    assert "Traceback (most" not in done.stdout
    run = json.loads(quantcheck("check", "--json", cwd=tmp_path).stdout)
    statuses = [check["status"] for check in run["artifacts"][0]["checks"]]
    assert sorted(statuses) == ["error", "passed", "passed"]


def test_what_cannot_even_be_opened_for_a_bug_leaves_the_other_artifacts(tmp_path, monkeypatch):
    def bug(path: str) -> object:
        if path == "model-1":
            raise IndexError("list index out of range")
        return inspect(path)

    monkeypatch.setattr(keys, "inspect", bug)
    for number in (1, 2):
        small(tmp_path / f"model-{number}")
    write(tmp_path, artifact("model-*", logical_params=PARAMS))
    done = quantcheck("check", cwd=tmp_path)
    assert done.returncode == 2
    assert "IndexError: list index out of range (a bug, in test_check.py:" in done.stdout
    assert done.stdout.endswith("1 could not be checked of 2 artifacts\n")


def test_checks_are_chosen_by_their_id(tmp_path):
    small(tmp_path / "model")
    write(tmp_path, artifact("model", logical_params=PARAMS, size=1))
    assert quantcheck("check", "-k", "model::logical", cwd=tmp_path).returncode == 0
    done = quantcheck("check", "-k", "nothing", cwd=tmp_path)
    assert (done.returncode, "nothing was checked" in done.stdout) == (2, True)


def test_numbers_come_with_their_unit(tmp_path):
    small(tmp_path / "model")
    settings = {"logical_params": PARAMS, "size": 9000, "bits_per_weight": 5, "quantized_fraction": 0.7}
    write(tmp_path, artifact("model", **settings, host='"github"'))
    run = json.loads(quantcheck("check", "--json", cwd=tmp_path).stdout)
    found = {
        check["check"]: (check["measured"], check["allowed"], check["unit"]) for check in run["artifacts"][0]["checks"]
    }
    assert found["logical_params"] == (PARAMS, PARAMS, "parameters")
    assert found["size"] == (SIZE, 9000, "bytes")
    assert found["bits_per_weight"] == (pytest.approx(8 * 3598 / 6144), 5, "bits")
    assert found["quantized_fraction"] == (pytest.approx(6144 / PARAMS), 0.7, "share")
    assert found["host"][1:] == (100 << 20, "bytes")


def test_bad_usage_is_one_line_and_exit_code_2(tmp_path):
    small(tmp_path / "model")
    for arguments, said in (
        (["check"], "no quantcheck.toml here"),
        (["check", "absent.toml"], "absent.toml: No such file"),
        (["init", "model"], None),
        (["init", "model"], "quantcheck.toml: is there already (--force overwrites it)"),
        (["check", "--update"], "no artifact has `baseline`"),
        (["init", "absent", "--output", "x.toml"], "absent: no such file or folder"),
    ):
        done = quantcheck(*arguments, cwd=tmp_path)
        assert done.returncode == (2 if said else 0)
        assert (said or "") in done.stderr
        assert done.stderr.count("\n") == (1 if said else 0)
    assert not (tmp_path / "x.toml").exists()


@pytest.mark.parametrize("layout", ["nf4", "plain", "stale", "mistral"])
def test_what_init_writes_is_green_and_guards(tmp_path, layout, request):
    path = request.getfixturevalue("mistral") if layout == "mistral" else small(tmp_path / "model")
    if layout == "plain":
        layouts.write_folder(tmp_path / "model", [layouts.Entry("a.weight", "BF16", (33, 65))], {}, shards=1)
    if layout == "stale":
        layouts.write_file(tmp_path / "model/model-00001-of-00002.safetensors", [layouts.Entry("b", "F32", (3, 5))])
    assert quantcheck("init", path, cwd=tmp_path).returncode == 0
    text = (tmp_path / "quantcheck.toml").read_text()
    assert ("quantized_fraction" in text) == (layout != "plain")
    assert ('allow = ["orphan-file"]' in text) == (layout == "stale")
    done = quantcheck("check", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("all good")) == (0, 1)
    if layout == "nf4":
        assert 'must_not_be_quantized = ["embed_tokens"]' in text
        small(tmp_path / "model", rows=43)
        failed = quantcheck("check", cwd=tmp_path)
        assert failed.returncode == 1
        assert "logical parameters: measured 8,960, expected 8,320 exactly: 640 more" in failed.stdout
        assert "exceeds the budget of" in failed.stdout


def test_init_of_one_artifact_named_twice_is_green_too(tmp_path):
    small(tmp_path / "model")
    done = quantcheck("init", "model", "model/", "./model", cwd=tmp_path)
    assert done.stdout == "quantcheck.toml: 1 artifact; now run: quantcheck check quantcheck.toml\n"
    assert quantcheck("check", cwd=tmp_path).returncode == 0


def test_reports_are_written_beside_the_verdict(tmp_path):
    small(tmp_path / "model")
    write(tmp_path, artifact("model", size=1))
    pytest.importorskip("squarify", reason="the extra `report` is not installed")
    done = quantcheck("check", "--html", "a.html", "--markdown", "out/a.md", "--junit", "out/a.xml", cwd=tmp_path)
    assert done.returncode == 1
    assert "exceeds the budget" in (tmp_path / "out/a.md").read_text()
    assert (tmp_path / "out/a.xml").read_text().startswith("<?xml")
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")


def test_github_is_told_only_where_it_listens(tmp_path):
    small(tmp_path / "model")
    write(tmp_path, artifact("model", size=1))
    assert quantcheck("check", cwd=tmp_path).stderr == ""
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    done = quantcheck("check", cwd=tmp_path, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))
    assert done.stderr.startswith("::error file=quantcheck.toml,line=3,")
    assert summary.read_text().startswith("before\n")
    assert "exceeds the budget" in summary.read_text()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An NF4 model of two layers and its reference."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(128, 96) for name in ("up", "down")})
    safetensors.torch.save_file(model.state_dict(), folder / "reference.safetensors")
    for name in ("up", "down"):
        layer = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compress_statistics=False)
        layer.load_state_dict(model[name].state_dict())
        model[name] = layer.to("cpu")
    safetensors.torch.save_file(model.state_dict(), folder / "nf4.safetensors")
    return folder


FIDELITIES = {
    "auto": ('"auto"', "passed", ""),
    "a-number": ("19.5", "passed", ""),
    "too-much": ("25", "failed", "up.weight: SQNR"),
    "a-pattern": ('{ min_sqnr_db = { "up" = 25, "*" = "auto" } }', "failed", "up.weight: SQNR"),
    "a-pattern-of-nothing": ('{ min_sqnr_db = { "left" = 25 } }', "error", "pattern `left` matches no tensor"),
}


@pytest.mark.parametrize("case", FIDELITIES)
def test_fidelity_is_required_of_all_or_by_pattern(pair, case):
    fidelity, status, said = FIDELITIES[case]
    write(pair, artifact("nf4.safetensors", reference='"reference.safetensors"', fidelity=fidelity))
    run = json.loads(quantcheck("check", "--json", cwd=pair).stdout)
    (check,) = run["artifacts"][0]["checks"]
    assert check["status"] == status
    assert said in "\n".join([check["headline"], *check["details"]])
    assert "down.weight: SQNR" not in "\n".join(check["details"]) or case == "too-much"
    assert (run["artifacts"][0]["compare"] is None) == (status == "error")


@pytest.mark.parametrize("device", ["cuad", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(pair, device):
    write(pair, artifact("nf4.safetensors", reference='"reference.safetensors"'))
    run = json.loads(quantcheck("check", "--json", "--device", device, cwd=pair).stdout)
    (check,) = run["artifacts"][0]["checks"]
    assert check["status"] == "error"
    assert check["headline"].startswith(f"fidelity: device `{device}` is not")


def test_an_interrupted_run_says_so_and_keeps_what_it_has(tmp_path, monkeypatch):
    def check(planned, entry, key, opened):
        if entry.name == "b":
            raise KeyboardInterrupt
        return made(planned, entry, key, opened)

    made = runner.check
    monkeypatch.setattr(runner, "check", check)
    for name in "abc":
        small(tmp_path / name)
    write(tmp_path, artifact("[abc]", logical_params=PARAMS))
    done = quantcheck("check", "--json", "--markdown", "run.md", cwd=tmp_path)
    run = json.loads(done.stdout)
    assert (done.returncode, run["partial"], run["exit_code"]) == (130, True, 2)
    assert [entry["name"] for entry in run["artifacts"]] == ["a"]
    assert "interrupted" in (tmp_path / "run.md").read_text()


SIZED = {
    "a-shard": (["model/model-00001-of-00001.safetensors"], 1),
    "another-artifact": (["other/config.json"], 0),
    "no-artifact": (["README.md"], 0),
    "the-configuration": (["quantcheck.toml"], 1),
    "nothing": ([], 0),
}


@pytest.mark.parametrize("case", SIZED)
def test_the_hook_weighs_the_artifacts_of_the_changed_files(tmp_path, case):
    files, code = SIZED[case]
    small(tmp_path / "model")
    small(tmp_path / "other")
    write(tmp_path, artifact("model", size=1, logical_params=1) + artifact("other", size='"1 MB"', logical_params=1))
    done = quantcheck("check-size", *files, cwd=tmp_path)
    assert done.returncode == code
    assert ("exceeds the budget" in done.stdout) == bool(code)
    assert "logical" not in done.stdout


def test_checks_of_headers_import_neither_torch_nor_numpy(tmp_path):
    small(tmp_path / "model")
    assert quantcheck("init", "model", cwd=tmp_path).returncode == 0
    code = (
        "import sys; from pytest_quantcheck import config, runner; "
        "run = runner.run(runner.plan(config.load('quantcheck.toml'))); assert run['exit_code'] == 0; "
        "assert not {'torch', 'numpy', 'pytest', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
