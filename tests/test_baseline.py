"""Baselines: what changed against the record, who may change the record, and that it is never half written."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import pytest_quantcheck
from pytest_quantcheck import lock
from pytest_quantcheck.artifact import inspect
from pytest_quantcheck.checks.baseline import Allowed, Record, check_baseline, parse_growth
from pytest_quantcheck.checks.diff import outline
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.report.atomic import write_text
from tests import layouts
from tests.test_check import artifact, quantcheck, small, write


@pytest.fixture
def model(tmp_path):
    small(tmp_path / "model")
    write(tmp_path, artifact("model", baseline="true"))
    return tmp_path


def test_an_update_fails_once_and_then_it_matches(model):
    unrecorded = quantcheck("check", cwd=model)
    assert (unrecorded.returncode, "quantcheck.lock has no record of it" in unrecorded.stdout) == (1, True)
    updated = quantcheck("check", "--update", cwd=model)
    assert (updated.returncode, "recorded in quantcheck.lock: commit it" in updated.stdout) == (1, True)
    assert quantcheck("check", "--update", cwd=model).returncode == 0
    assert quantcheck("check", cwd=model).returncode == 0


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_ci_updates_nothing_unless_forced(model, value):
    refused = quantcheck("check", "--update", cwd=model, CI=value)
    assert (refused.returncode, (model / "quantcheck.lock").exists()) == (2, False)
    assert refused.stderr.startswith("quantcheck: error: baselines are not updated in CI (CI is set)")
    assert quantcheck("check", "--update", "--force", cwd=model, CI=value).returncode == 1
    assert quantcheck("check", cwd=model, CI=value).returncode == 0


CHANGES = {
    "the-same": ("true", {}, None),
    "grown": ("true", {"rows": 34}, "embed_tokens.weight: plain BF16 4.22 KB -> 4.35 KB, 128 B over"),
    "reshaped": ('"50 %"', {"rows": 34}, "embed_tokens.weight: is 34 x 64, was 33 x 64"),
    "shrunk": ("true", {"rows": 32}, "embed_tokens.weight: is 32 x 64, was 33 x 64"),
    "re-encoded": (
        '"10 %"',
        {"plain": True},
        "up_proj.weight: bnb-nf4 3.60 KB -> plain BF16 12.29 KB, 8.33 KB over",
    ),
    "re-encoded-within-bytes": ('"9 KB"', {"plain": True}, None),
    "gone": ("true", {"without": "norm.weight"}, "norm.weight: is gone (64, plain BF16)"),
    "added": ('"90 %"', {"more": True}, "new.weight: new, plain F32 60 B, 60 B over"),
    "added-within-bytes": ('"1 KB"', {"more": True}, None),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_against_the_record_is_named(model, case):
    allowed, change, said = CHANGES[case]
    quantcheck("check", "--update", cwd=model)
    rows, plain = change.get("rows", 33), change.get("plain")
    weight = "layers.0.up_proj.weight"
    entries = [
        *([layouts.Entry(weight, "BF16", (96, 64))] if plain else layouts.nf4(weight, (96, 64))),
        layouts.Entry("embed_tokens.weight", "BF16", (rows, 64)),
        layouts.Entry("norm.weight", "BF16", (64,)),
        *([layouts.Entry("new.weight", "F32", (3, 5))] if change.get("more") else []),
    ]
    entries = [entry for entry in entries if entry.name != change.get("without")]
    layouts.write_folder(model / "model", entries, {"quantization_config": layouts.BNB_CONFIG}, shards=1)
    write(model, artifact("model", baseline=allowed))
    done = quantcheck("check", cwd=model)
    assert done.returncode == (said is not None), done.stdout
    assert (said or "") in done.stdout


@pytest.mark.parametrize(
    ("text", "old", "most"),
    [("2 %", 1000, 1020), ("0.1%", 1001, 1002), ("1 KiB", 10, 1034), (0, 7, 7), ("0 B", 7, 7)],
)
def test_an_allowed_growth_is_exact(text, old, most):
    assert parse_growth(text).limit(old) == most


@pytest.mark.parametrize("text", ["2", "-1 %", "two percent", -3])
def test_a_growth_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="growth"):
        parse_growth(text)


FIDELITIES = [
    (20.0, 20.0, None),
    (20.0, 19.95, None),
    (20.0, 21.0, None),
    (20.0, 19.0, "SQNR 19.00 dB, was 20.00 dB: 1.00 dB worse (allowed 0.1)"),
    (math.inf, 60.0, "SQNR 60.00 dB, was inf dB: inf dB worse"),
    (math.inf, math.inf, None),
    (20.0, math.nan, "SQNR nan dB, was 20.00 dB"),
    (20.0, None, "had 20.00 dB, and is not compared with a reference now"),
    (None, 20.0, None),
]


@pytest.mark.parametrize(("was", "now", "said"), FIDELITIES)
def test_fidelity_that_fell_is_named_and_nan_is_worse(tmp_path, was, now, said):
    found = outline(inspect(small(tmp_path / "model")))
    name = "layers.0.up_proj.weight"
    tensors = [found.tensors | {name: found.tensors[name]._replace(sqnr_db=db)} for db in (was, now)]
    old, new = (found._replace(tensors=changed) for changed in tensors)
    path = str(tmp_path / "quantcheck.lock")
    lock.store(path, {"model": Record("test", "0", old)})
    verdict = check_baseline(lock.read(path)["model"], new, Allowed(), where=path)
    assert verdict.passed is (said is None)
    assert (said or "") in "\n".join(verdict.details)


def test_nothing_that_is_not_a_number_is_recorded(tmp_path):
    found = outline(inspect(small(tmp_path / "model")))
    worse = {"a": next(iter(found.tensors.values()))._replace(sqnr_db=math.nan)}
    with pytest.raises(FormatError, match="a: has an SQNR of nan dB: nothing to record"):
        lock.store(str(tmp_path / "quantcheck.lock"), {"model": Record("test", "0", found._replace(tensors=worse))})
    assert not (tmp_path / "quantcheck.lock").exists()


def test_a_record_that_no_artifact_has_fails_until_it_is_taken_out(model):
    quantcheck("check", "--update", cwd=model)
    write(model, artifact("model", name='"other"', baseline="true"))
    stale = quantcheck("check", cwd=model)
    assert stale.returncode == 1
    assert "quantcheck.lock has a record of `model`, and no artifact has that name" in stale.stdout
    assert quantcheck("check", "--update", cwd=model).returncode == 1
    assert set(lock.read(str(model / "quantcheck.lock"))) == {"other"}
    assert quantcheck("check", cwd=model).returncode == 0


def test_records_of_tests_are_not_stale(model):
    lock.store(str(model / "quantcheck.lock"), {"mine": Record("test", "0", outline(inspect(model / "model")))})
    quantcheck("check", "--update", cwd=model)
    assert set(lock.read(str(model / "quantcheck.lock"))) == {"mine", "model"}
    assert quantcheck("check", cwd=model).returncode == 0


def test_the_lock_is_sorted_versioned_and_has_a_line_for_each_tensor(model):
    quantcheck("check", "--update", cwd=model)
    text = (model / "quantcheck.lock").read_text()
    document = json.loads(text)
    found = document["artifacts"]["model"]
    assert (document["schema"], found["by"], found["container"]) == (1, "quantcheck.toml", "safetensors")
    assert found["version"]
    assert list(found["tensors"]) == sorted(found["tensors"])
    for name in found["tensors"]:
        assert sum(line.startswith(f'    "{name}": {{') for line in text.splitlines()) == 1
    before = outline(inspect(model / "model"))
    assert lock.read(str(model / "quantcheck.lock"))["model"].outline == before._replace(source="the baseline")


def test_totals_of_a_record_are_sums_and_nothing_that_two_branches_would_both_write(tmp_path):
    subjects = [small(tmp_path / "model"), tmp_path / "shared.bin"]
    tensor = torch.zeros(7, 4)
    torch.save({"a": tensor, "b": tensor[:3], "c": tensor.clone()}, subjects[1])
    for subject in subjects:
        opened = inspect(subject)
        record = Record("test", "0", outline(opened))
        kept = json.loads(lock.render({"model": record}))["artifacts"]["model"]
        assert set(kept) == {"by", "version", "container", "outside_tensors", "tensors"}
        found = record.outline
        assert (found.file_bytes, found.logical_params) == (opened.file_bytes, opened.logical_params)
        assert found.classes == {kind: size for kind, size in opened.bytes.items() if size}


def test_branches_that_change_two_tensors_of_one_artifact_merge(tmp_path):
    base = {f"layers.{number}.weight": layouts.Entry(f"layers.{number}.weight", "BF16", (3, 5)) for number in range(9)}
    texts = {}
    for name, changed in (("base", ()), ("mine", (1,)), ("theirs", (7,)), ("both", (1, 7))):
        wider = {f"layers.{at}.weight": layouts.Entry(f"layers.{at}.weight", "BF16", (4, 5)) for at in changed}
        layouts.write_file(tmp_path / f"{name}.safetensors", [*(base | wider).values()])
        texts[name] = lock.render({"model": Record("test", "0", outline(inspect(tmp_path / f"{name}.safetensors")))})
        (tmp_path / name).write_text(texts[name])
    command = ["git", "merge-file", "-p", "mine", "base", "theirs"]
    merged = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (merged.returncode, merged.stdout) == (0, texts["both"])


def test_branches_that_change_two_artifacts_merge(tmp_path):
    found = outline(inspect(small(tmp_path / "model")))
    other = outline(inspect(small(tmp_path / "other", rows=35)))

    def text(first, second):
        return lock.render({"first": Record("test", "0", first), "second": Record("test", "0", second)})

    for name, written in (("mine", text(other, found)), ("base", text(found, found)), ("theirs", text(found, other))):
        (tmp_path / name).write_text(written)
    command = ["git", "merge-file", "-p", "mine", "base", "theirs"]
    merged = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (merged.returncode, merged.stdout) == (0, text(other, other))


BROKEN = {
    "cut-off": ('{"schema": 1, "artif', "JSON"),
    "another-schema": ('{"schema": 2, "artifacts": {}}', "schema `2` is not 1"),
    "a-list": ("[]", "list"),
    "conflict-markers": ("<<<<<<< ours\n{}\n", "JSON"),
    "no-tensors": ('{"schema": 1, "artifacts": {"model": {}}}', "is not a lock of quantcheck"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_lock_that_cannot_be_read_is_one_line(model, case):
    text, said = BROKEN[case]
    (model / "quantcheck.lock").write_text(text)
    done = quantcheck("check", cwd=model)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("quantcheck: error: quantcheck.lock: ")
    assert said in done.stderr


TEST_FILE = """
    from pytest_quantcheck import assert_matches_baseline

    def test_release():
        assert_matches_baseline("model", "release", growth="1 %")
"""


def test_the_assertion_fails_updates_and_passes(pytester, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    small(pytester.path / "model")
    pytester.makepyfile(TEST_FILE)
    missing = pytester.runpytest()
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["E *AssertionError: baseline: quantcheck.lock has no record of it"])
    pytester.runpytest("--quantcheck-update").assert_outcomes(failed=1)
    pytester.runpytest("--quantcheck-update").assert_outcomes(passed=1)
    pytester.runpytest().assert_outcomes(passed=1)
    small(pytester.path / "model", rows=40)
    grown = pytester.runpytest()
    grown.assert_outcomes(failed=1)
    grown.stdout.fnmatch_lines(["E *embed_tokens.weight: plain BF16 4.22 KB -> 5.12 KB, *"])
    assert lock.UPDATE not in os.environ


TWO_TESTS = """
    import pytest
    from pytest_quantcheck import assert_matches_baseline

    @pytest.mark.parametrize("name", {names})
    def test_release(name):
        assert_matches_baseline("model", name)

    def test_other():
        {other}
"""

FULL_RUNS = {
    "all-tests": ([], "pass", True),
    "all-tests-of-two-workers": (["-n", "2"], "pass", True),
    "some-were-skipped": ([], "pytest.skip()", True),
    "one-failed": ([], "assert 0", False),
    "some-by-name": (["-k", "release"], "pass", False),
    "some-by-name-of-two-workers": (["-k", "release", "-n", "2"], "pass", False),
    "some-by-path": (["test_it.py"], "pass", False),
    "none-run": (["--collect-only"], "pass", False),
}


@pytest.mark.parametrize("case", FULL_RUNS)
def test_a_record_that_no_test_asks_for_is_named_after_a_run_of_all_tests(pytester, monkeypatch, case):
    arguments, other, named = FULL_RUNS[case]
    monkeypatch.delenv("CI", raising=False)
    found = outline(inspect(small(pytester.path / "model")))
    records = {name: Record("test", "0", found) for name in ("kept", "left\x1b[1m")}
    lock.store("quantcheck.lock", {**records, "of-a-file": Record("quantcheck.toml", "0", found)})
    pytester.makepyfile(test_it=TWO_TESTS.format(names=["kept"], other=other))
    out = pytester.runpytest(*arguments).stdout.str()
    line = r"quantcheck.lock has a record of `left\x1b[1m`, and no test asked for it"
    assert ("= quantcheck: baselines =" in out, line in out, "of `kept`" in out) == (named, named, False)
    if not arguments and named:
        again = pytester.runpytest("--quantcheck-update")
        assert ("is taken out of quantcheck.lock" in again.stdout.str()) == (other == "pass")
        assert len(lock.read("quantcheck.lock")) == (2 if other == "pass" else 3)
    assert "QUANTCHECK_USES" not in os.environ or os.path.exists(os.environ["QUANTCHECK_USES"])


def record_each(path: str, found, names) -> None:
    for name in names:
        lock.update(path, name, Record("test", "0", found))


def test_processes_update_one_lock_together(tmp_path):
    found, path = outline(inspect(small(tmp_path / "model"))), str(tmp_path / "quantcheck.lock")
    names = [[f"{process}-{number}" for number in range(15)] for process in range(4)]
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=record_each, args=(path, found, own)) for own in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert set(lock.read(path)) == {name for own in names for name in own}


def test_pytest_in_ci_updates_nothing_unless_forced(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    small(pytester.path / "model")
    pytester.makepyfile(TEST_FILE)
    refused = pytester.runpytest("--quantcheck-update")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*baselines are not updated in CI*(--quantcheck-force-update)*"])
    pytester.runpytest("--quantcheck-force-update").assert_outcomes(failed=1)
    pytester.runpytest().assert_outcomes(passed=1)


def test_fidelity_is_recorded_with_a_reference(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")
    import safetensors.torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    torch.manual_seed(0)
    linear = torch.nn.ModuleDict({"layer": torch.nn.Linear(128, 96)})
    safetensors.torch.save_file(linear.state_dict(), "reference.safetensors")
    layer = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict(linear["layer"].state_dict())
    linear["layer"] = layer.to("cpu")
    safetensors.torch.save_file(linear.state_dict(), "nf4.safetensors")
    monkeypatch.setenv(lock.UPDATE, "1")
    options = {"reference": "reference.safetensors", "name": "nf4"}
    with pytest.raises(AssertionError, match="recorded in quantcheck"):
        pytest_quantcheck.assert_matches_baseline("nf4.safetensors", **options)
    monkeypatch.delenv(lock.UPDATE)
    recorded = lock.read("quantcheck.lock")["nf4"].outline.tensors
    assert 20 < recorded["layer.weight"].sqnr_db < 22
    assert recorded["layer.bias"].sqnr_db == math.inf
    pytest_quantcheck.assert_matches_baseline("nf4.safetensors", **options)
    with pytest.raises(AssertionError, match="is not compared with a reference now"):
        pytest_quantcheck.assert_matches_baseline("nf4.safetensors", "nf4")
    linear["layer"].weight.quant_state.absmax[:2] *= 0.5
    safetensors.torch.save_file(linear.state_dict(), "nf4.safetensors")
    with pytest.raises(AssertionError, match=r"layer.weight: SQNR .* dB worse \(allowed 0.5\)"):
        pytest_quantcheck.assert_matches_baseline("nf4.safetensors", **options, sqnr_drop_db=0.5)


OLD, NEW = "old\n" * 50_000, "new!\n" * 50_000


def write_for_ever(path: str, started) -> None:
    started.set()
    while True:
        for text in (NEW, OLD):
            write_text(path, text)


def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_file(tmp_path):
    path, chance = tmp_path / "out" / "quantcheck.lock", random.Random(7)
    write_text(path, OLD)
    seen = set()
    for _ in range(25):
        started = multiprocessing.get_context("fork").Event()
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(str(path), started))
        writer.start()
        started.wait()
        time.sleep(chance.uniform(0, 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        seen.add(path.read_text())
    assert seen <= {OLD, NEW}


def test_what_a_killed_writer_left_is_taken_out_by_a_later_one_of_the_same_file(tmp_path):
    path, other = tmp_path / "quantcheck.lock", tmp_path / "other.lock"
    left = {}
    for target in (path, other):
        for age in (60, 7200):
            process = subprocess.run(
                [sys.executable, "-c", KILLED, str(target)], cwd=tmp_path, capture_output=True, check=False
            )
            assert process.returncode == -signal.SIGKILL
            (temporary,) = {*tmp_path.iterdir()} - {*left.values()}
            os.utime(temporary, (time.time() - age,) * 2)
            left[target, age] = temporary
    write_text(path, NEW)
    assert {*tmp_path.iterdir()} == {path, left[path, 60], left[other, 7200], left[other, 60]}


KILLED = """
import os, signal, sys
from quantcheck_lint.writing import write_whole
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_whole(sys.argv[1], b"new")
"""

FULL = """
import resource, signal, sys
from pytest_quantcheck.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk: an error of the write, not a signal
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "arguments",
    [["check", "--update", "--force"], ["check", "--json", "--markdown", "report.md"], ["init", "model", "--force"]],
    ids=["lock", "report", "configuration"],
)
def test_a_full_disk_leaves_the_old_file_and_no_other(model, arguments):
    quantcheck("check", "--update", cwd=model)
    (model / "report.md").write_text("old\n" * 100)
    small(model / "model", rows=40)
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], cwd=model, capture_output=True, text=True)
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before
    assert "File too large" in (done.stderr + done.stdout)
    assert done.returncode == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
