"""The pytest plugin, run by pytest itself."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from pytest_quantcheck import devices
from tests import models

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    models.load(models.save("llama", folder / "llama"), **models.NF4).save_pretrained(folder / "llama-nf4")
    return folder / "llama-nf4"


def test_the_fixtures_serve_a_users_test_file(pytester, nf4):
    shutil.copytree(nf4, pytester.path / "model")
    pytester.makepyfile(
        f"""
        import pytest, torch
        from pytest_quantcheck import assert_logical_params, assert_quantized, count_params

        @pytest.mark.quantized("model")
        def test_live(quantized_model, quant_device):
            assert isinstance(quantized_model, torch.nn.Module)
            assert quantized_model.device == torch.device(quant_device)
            assert_logical_params(quantized_model, {models.parameters("llama")})
            assert_quantized(quantized_model, "*.mlp.*")

        @pytest.mark.quantized("model")
        def test_files(quantized_checkpoint):
            assert_logical_params(quantized_checkpoint, {models.parameters("llama")})

        def test_by_hand(load_quantized):
            assert count_params(load_quantized("model")) == {models.parameters("llama")}

        @pytest.mark.quantized("model")
        def test_fails(quantized_model):
            assert_logical_params(quantized_model, 12.0)
        """
    )
    result = pytester.runpytest("--strict-markers", "-p", "no:randomly")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["E   *AssertionError: logical parameters: measured *, expected 12 +/- 0: *"])
    result.stdout.no_fnmatch_line("*asserts.py*")  # the helper's frames are hidden


def test_options_stand_in_one_group_of_help(pytester):
    result = pytester.runpytest("--help")
    result.stdout.fnmatch_lines(["quantcheck: tests of quantized models:", "  --quantcheck-device=DEVICE"])
    result.stdout.fnmatch_lines(["  --quantcheck-require-gpu"])
    markers = pytester.runpytest("--markers")
    markers.stdout.fnmatch_lines(["@pytest.mark.quantized(path, [*], factory=None, *"])


SHARED = """
    import pytest
    built = []

    def make(name):
        def factory(device):
            built.append(name)
            return (name, device)
        return factory

    a, b = make("a"), make("b")

    @pytest.mark.quantized(factory=a)
    def test_1(quantized_model): assert built == ["a"]

    @pytest.mark.quantized(factory=b)
    def test_2(quantized_model): assert built == ["a", "b"]

    def test_3(): pass

    @pytest.mark.quantized(factory=a)
    def test_4(quantized_model): assert built == ["a"]

    @pytest.mark.quantized(factory=b)
    def test_5(quantized_model): assert built == ["a", "b"]
"""


def test_tests_of_one_model_run_together_and_share_it(pytester):
    pytester.makepyfile(SHARED)
    result = pytester.runpytest("-v", "--quantcheck-device=cpu")
    result.assert_outcomes(passed=5)
    order = [line.split("::")[1].split()[0] for line in result.outlines if "::test_" in line]
    assert order == ["test_1", "test_4", "test_2", "test_5", "test_3"]


@pytest.mark.parametrize("outcome", ["assert True", "assert False"], ids=["after-a-pass", "after-a-failure"])
def test_a_model_is_freed_before_the_next_one_loads(pytester, outcome):
    pytester.makepyfile(
        f"""
        import gc, weakref
        import pytest, torch

        alive = weakref.WeakSet()

        def first(device):
            model = torch.nn.Linear(2, 2)
            alive.add(model)
            return model

        def second():
            assert not alive, "the first model is still there"
            return torch.nn.Linear(3, 3)

        @pytest.mark.quantized(factory=first)
        def test_1(quantized_model):
            local = quantized_model
            {outcome}

        def test_2():
            assert not alive

        @pytest.mark.quantized(factory=second)
        def test_3(quantized_model):
            assert quantized_model.weight.shape == (3, 3)
        """
    )
    failed = outcome.count("False")
    # In a process of its own: pytester records every hook call, exceptions and their frames included.
    result = pytester.runpytest_subprocess("--quantcheck-device=cpu")
    result.assert_outcomes(passed=3 - failed, failed=failed)


def test_asking_for_another_model_frees_the_last_one(pytester):
    pytester.makepyfile(
        """
        import weakref, torch

        def test_it(load_quantized):
            model = load_quantized(lambda: torch.nn.Linear(2, 2))
            gone = weakref.ref(model)
            del model
            other = load_quantized(lambda device: torch.nn.Linear(3, 3))
            assert gone() is None
        """
    )
    pytester.runpytest("--quantcheck-device=cpu").assert_outcomes(passed=1)


DEVICE_TEST = """
    import pytest

    @pytest.mark.quantized(lambda device: device, device="cuda")
    def test_it(quantized_model):
        assert quantized_model.startswith("cuda")
"""


@pytest.mark.skipif(HAS_GPU, reason="checks what happens without a GPU, and this machine has one")
class TestWithoutGpu:
    def test_a_missing_device_skips_with_the_reason(self, pytester):
        pytester.makepyfile(DEVICE_TEST)
        result = pytester.runpytest("-rs")
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(
            [f"*device `cuda` is not available: torch {torch.__version__} sees no cuda device*"]
        )

    @pytest.mark.parametrize("how", ["option", "ini"])
    def test_a_required_gpu_fails_instead(self, pytester, how):
        pytester.makepyfile(DEVICE_TEST)
        arguments = ["--quantcheck-require-gpu"] if how == "option" else ["-o", "quantcheck_require_gpu=true"]
        result = pytester.runpytest(*arguments)
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(
            ["*a GPU is required (--quantcheck-require-gpu), but device `cuda` is not available*"]
        )

    def test_a_required_gpu_is_not_the_cpu(self, pytester):
        pytester.makepyfile("def test_it(quant_device): pass")
        result = pytester.runpytest("--quantcheck-require-gpu")
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["*but the best device is `cpu`*"])


@pytest.mark.parametrize(
    ("arguments", "mark", "device"),
    [
        ([], "", "auto"),
        (["-o", "quantcheck_device=cpu"], "", "cpu"),
        (["-o", "quantcheck_device=nosuch"], "device='cpu'", "cpu"),
        (["--quantcheck-device=cpu"], "device='nosuch'", "cpu"),
    ],
    ids=["best", "ini", "marker-over-ini", "option-over-marker"],
)
def test_the_device_is_decided_by_option_then_marker_then_ini(pytester, arguments, mark, device):
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.quantized(lambda device: device, {mark})
        def test_it(quantized_model, quant_device):
            assert quantized_model == quant_device
            assert {device!r} in (quant_device, "auto")
        """
    )
    pytester.runpytest(*arguments).assert_outcomes(passed=1)


def test_a_device_that_torch_does_not_know_fails_and_never_skips(pytester):
    pytester.makepyfile("def test_it(quant_device): pass")
    result = pytester.runpytest("--quantcheck-device=cuad")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*device `cuad` is not one that torch knows*"])


def test_misuse_is_explained(pytester):
    pytester.makepyfile(
        """
        import pytest

        def test_without_a_mark(quantized_model): pass

        @pytest.mark.quantized(lambda: 1)
        def test_headers_of_a_factory(quantized_checkpoint): pass
        """
    )
    result = pytester.runpytest("--quantcheck-device=cpu")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        ["*fixture `quantized_model` needs @pytest.mark.quantized(path) or (factory=...) on the test*"]
    )
    result.stdout.fnmatch_lines(["*needs a path in @pytest.mark.quantized, not a factory*"])


def test_xdist_workers_get_the_visible_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(devices, "_count", lambda kind: 3 if kind == "cuda" else 0)
    chosen = [devices.choose("auto", worker=worker).name for worker in (None, 0, 1, 2, 3)]
    assert chosen == ["cuda", "cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert devices.choose("cuda:2", worker=0).name == "cuda:2"
    assert devices.choose("cuda:3").missing is not None
    assert devices.choose("cpu", worker=1).name == "cpu"


def test_it_works_under_xdist(pytester):
    pytester.makepyfile(SHARED.replace("assert built == [", "assert built[-1:] == [").replace('"a", "b"', '"b"'))
    result = pytester.runpytest("-n", "2", "--quantcheck-device=cpu", "--dist", "loadfile")
    result.assert_outcomes(passed=5)


LIGHT = "import sys; heavy = {'torch', 'numpy', 'transformers', 'libcst', 'rich', 'safetensors'} & set(sys.modules)"


def test_a_start_of_pytest_imports_nothing_heavy(pytester):
    pytester.makepyfile("def test_it(): pass")
    pytester.makeconftest(
        f"""
        def pytest_unconfigure(config):
            assert config.pluginmanager.hasplugin("quantcheck")
            {LIGHT}
            print("heavy:", sorted(heavy))
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:sybil")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["heavy: []"])


LIGHT_PATHS = {
    "package": "import pytest_quantcheck",
    "counting": "import pytest_quantcheck as q; assert q.count_params({path!r}) == 7_241_732_096",
    "assertions": "import pytest_quantcheck as q; q.assert_logical_params({path!r}, '7.24B'); "
    "q.assert_size_budget({path!r}, '5 GB'); q.assert_quantized_fraction({path!r}, min=0.9); "
    "q.assert_bits_per_weight({path!r}, max=4.6); q.assert_checkpoint_intact({path!r}, values=False); "
    "q.assert_quantized({path!r}, '*_proj'); q.assert_not_quantized({path!r}, 'lm_head')",
    "command-line": "import sys; sys.argv = ['quantcheck', 'inspect', {path!r}, '--json']\n"
    "from pytest_quantcheck.cli import cli; cli(standalone_mode=False)",
}


@pytest.mark.parametrize("path", LIGHT_PATHS)
def test_the_light_half_stays_light(path, mistral, pytester):
    code = LIGHT_PATHS[path].format(path=str(mistral))
    code += "\nimport sys; print(file=sys.stderr); print('heavy:', sorted({'torch', 'numpy', 'transformers', 'pytest'}"
    code += " & set(sys.modules)), file=sys.stderr)"
    result = pytester.run(sys.executable, "-c", code)
    assert result.ret == 0
    assert result.errlines[-1] == "heavy: []"
