"""Predictions against files: what the libraries write, published sizes, the command, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

import pytest_quantcheck.report
from pytest_quantcheck import FormatError, architecture, cli, inspect, recipes, unquantized_model
from pytest_quantcheck.checks.predict import predict, predicted
from pytest_quantcheck.checks.unquantized import unquantized
from pytest_quantcheck.recipes.recipe import Unquantized, Weight
from tests import layouts, models
from tests.golden import file as golden
from tests.test_cli import quantcheck

REPORT = Path(pytest_quantcheck.report.__path__[0])
SCHEMA = json.loads((REPORT / "predict.schema.json").read_text())

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
MISTRAL_7B = {
    **LLAMA,
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
ROPE = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA_31_8B = MISTRAL_7B | {
    "vocab_size": 128_256,
    "rope_scaling": ROPE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
}
SMOLLM2_135M = {
    **LLAMA,
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
MADE = {"nf4": models.NF4 | {"bnb_4bit_use_double_quant": False}, "nf4-dq": models.NF4, "int8": models.INT8}
MADE |= {"fp4": MADE["nf4"] | {"bnb_4bit_quant_type": "fp4"}}


def in_process(monkeypatch):
    """Build models here, where transformers is imported already; the process of its own has a test of its own."""

    def ask(source, config, shapes):
        return unquantized_model.described(unquantized_model.cleaned(config))

    monkeypatch.setattr(architecture, "_ask", ask)


def written(path, config):
    """A configuration in a folder of its own."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def classes(artifact):
    """The bytes of the tensors by class, headers left out."""
    found = Counter()
    for tensor in artifact.tensors:
        found.update(tensor.bytes)
    return dict(found)


def stored(tensors):
    return {part.stored.name: (part.stored.dtype, part.stored.shape) for tensor in tensors for part in tensor.parts}


def every_tensor(recipe, path):
    """What a recipe writes, the experts of a layer one by one."""
    return stored(predicted(recipe, unquantized(path)).tensors)


# model as transformers has it, recipe
SAVED = [
    ("llama", "nf4"),
    ("llama", "int8"),
    ("llama-tied", "nf4-dq"),
    ("llama-tied", "fp4"),
    ("mixtral", "nf4-dq"),
    ("mixtral", "int8"),
    ("gpt2", "nf4"),
    ("gpt2", "bf16"),
    ("falcon", "nf4"),  # its linears are a class of their own: not replaced, and not known by their names
    ("llama-tied", "bf16"),
    ("mixtral", "bf16"),
]


@pytest.mark.parametrize(("kind", "recipe"), SAVED)
def test_transformers_and_bitsandbytes_write_what_was_predicted(tmp_path, monkeypatch, kind, recipe):
    in_process(monkeypatch)
    source = models.save(kind, tmp_path / "model")
    model = models.load(source, **MADE.get(recipe, {}))
    model.save_pretrained(tmp_path / "quantized")
    made = inspect(tmp_path / "quantized")
    for path in [source / "config.json", *([source] if kind != "falcon" else [])]:
        (row,) = predict(path, [recipe]).predicted
        measured, expected = classes(made), dict(row.sizes.bytes)
        records = expected.pop("bookkeeping", 0)
        assert 0 <= records - measured.pop("bookkeeping", 0) <= row.less
        assert expected == measured
        assert row.sizes.params == made.logical_params == models.parameters(kind)
        assert without_states(every_tensor(recipe, path)) == without_states(stored(made.tensors))


def without_states(tensors):
    return {name: tensor for name, tensor in tensors.items() if "state" not in name}


# model, values of its routers' `e_score_correction_bias` if they are a buffer
ROUTED = [("mixtral", 0), ("deepseek", 2 * 6), ("ernie", 0)]


@pytest.mark.parametrize(("kind", "buffers"), ROUTED)
def test_what_the_model_declares_counts_in_a_live_model_a_checkpoint_and_a_configuration(
    tmp_path, monkeypatch, kind, buffers
):
    in_process(monkeypatch)
    model = models.load(models.save(kind, tmp_path / "made"))
    path = tmp_path / "loaded"
    model.save_pretrained(path)
    checkpoint, config = inspect(path), predict(path / "config.json", ["bf16"])
    assert checkpoint.buffers == buffers
    assert classes(checkpoint) == config.predicted[0].sizes.bytes
    live = inspect(model).logical_params
    assert [live, checkpoint.logical_params, config.logical_params] == [models.parameters(kind)] * 3


def test_the_experts_of_a_layer_are_written_once_and_counted_as_often_as_they_are(tmp_path, monkeypatch):
    in_process(monkeypatch)
    path = models.save("mixtral", tmp_path)
    one_by_one = unquantized(path / "config.json")
    tried = 0
    for row in predict(path / "config.json").predicted:
        whole = predicted(row.recipe, one_by_one)
        assert (row.sizes, row.less, row.refused) == (whole.sizes, whole.less, whole.refused)
        if row.sizes and row.container == "safetensors":
            assert len(whole.tensors) - len(row.tensors) == 3 * 3 * (4 - 1)  # layers, matrices, experts but one
            tried += 1
    assert tried >= 8


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [("fp8", "FP8"), ("fp8-dynamic", "FP8_DYNAMIC"), ("nvfp4", "NVFP4"), ("mxfp4", "MXFP4")],
)
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_compressed_tensors_writes_what_was_predicted(tmp_path, monkeypatch, kind, recipe, preset):
    in_process(monkeypatch)
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    source = models.save(kind, tmp_path / "model")
    model = models.load(source)
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(1)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    made = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.values()}
    assert {name: (_torch(dtype), shape) for name, (dtype, shape) in every_tensor(recipe, source).items()} == made


def _torch(dtype):
    from pytest_quantcheck.dtypes import DTYPES

    return f"torch.{DTYPES[dtype].torch}"


def one_layer(rows, columns, dtype="F16"):
    weight = Weight("layers.0.layer.weight", (rows, columns), "linear")
    return Unquantized("a model", {}, dtype, rows * columns, (weight,))


def parts(recipe, rows, columns):
    family, options = recipes.named(recipe)
    tensors = family.write(one_layer(rows, columns), options).tensors
    return {tensor.name.removeprefix("layers.0."): (tensor.dtype, tensor.shape) for tensor in tensors}


def packed(case):
    names = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "F16"}
    return {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in case.tensors.items()}


def is_of_the_recipe(case):
    """Whether the recipes write such a layer: words of 32 bits, whole words, no embedding, no planes."""
    config, tensors = case.record["config"], case.tensors
    whole = case.values.dim() == 2 and not case.values.shape[0] % 32 and not case.values.shape[1] % 32
    is_linear = "layer.g_idx" in tensors or config["quant_method"] == "awq"
    return whole and is_linear and config["bits"] in (2, 3, 4, 8) and tensors["layer.qweight"].dtype == torch.int32


PACKED = [
    *(("gptq", name) for name, case in golden.read("gptq").items() if is_of_the_recipe(case)),
    *(
        ("awq", name)
        for name, case in golden.read("awq").items()
        if case.record["config"].get("version") == "gemm" and case.record["config"]["bits"] == 4
    ),
]


def test_there_are_packed_layers_to_compare():
    assert [family for family, _ in PACKED].count("gptq") >= 4
    assert [family for family, _ in PACKED].count("awq") >= 1


@pytest.mark.parametrize(("family", "name"), PACKED)
def test_gptqmodel_and_autoawq_pack_what_was_predicted(family, name):
    case = golden.read(family)[name]
    rows, columns = case.values.shape
    config = case.record["config"]
    group = "row" if config["group_size"] == -1 else f"g{config['group_size']}"
    assert parts(f"{family}-{config['bits']}-{group}", rows, columns) == packed(case)


def test_transformers_makes_the_fp8_layer_that_was_predicted():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(384, 256, block_size=(128, 128))
    made = {f"layer.{name}": (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in layer.state_dict().items()}
    expected = {name: (_torch(dtype), shape) for name, (dtype, shape) in parts("fp8-block", 256, 384).items()}
    assert expected == made


@pytest.mark.parametrize(
    ("bits", "block", "zero", "shapes"),
    [
        (4, 32, "sym", [(7, 96), (33, 64)]),
        (4, 128, "sym", [(5, 576)]),
        (4, 16, "asym", [(9, 48)]),
        (8, 32, "asym", [(3, 40)]),
    ],
)
def test_onnxruntime_writes_what_was_predicted(tmp_path, bits, block, zero, shapes):
    onnx = pytest.importorskip("onnx")
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    helper, weights, nodes = onnx.helper, [], []
    for at, (rows, columns) in enumerate(shapes):
        values = torch.randn(columns, rows).numpy()
        weights.append(onnx.numpy_helper.from_array(values, f"w{at}"))
        nodes.append(helper.make_node("MatMul", [f"x{at}", f"w{at}"], [f"y{at}"], f"n{at}"))
    ends = [
        [helper.make_tensor_value_info(f"{name}{at}", 1, [1, size[side]]) for at, size in enumerate(shapes)]
        for name, side in (("x", 1), ("y", 0))
    ]
    graph = helper.make_graph(nodes, "g", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    made = quantizer.MatMulNBitsQuantizer(model, bits=bits, block_size=block, is_symmetric=zero == "sym")
    made.process()
    onnx.save(made.model.model, tmp_path / "q.onnx")
    linears = tuple(Weight(f"layers.{at}.w.weight", shape, "linear") for at, shape in enumerate(shapes))
    config = {"model_type": "llama"}
    source = Unquantized("a model", config, "F32", sum(rows * columns for rows, columns in shapes), linears)
    row = predicted(f"matmulnbits-{bits}-b{block}-{zero}", source)
    assert row.sizes.bytes == classes(inspect(tmp_path / "q.onnx"))


# model, its configuration, recipe, bytes, where they were read
PUBLISHED = [
    ("mistral-7b-instruct-v0.1.Q4_0.gguf", MISTRAL_7B, "q4_0", 4_108_181_504),
    ("mistral-7b-instruct-v0.1.Q4_K_S.gguf", MISTRAL_7B, "q4_k_s", 4_139_638_784),
    ("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", LLAMA_31_8B, "q4_k_m", 4_912_898_304),
    ("openai/gpt-oss-20b", GPT_OSS_20B, "mxfp4", 13_761_264_768),
]


@pytest.mark.parametrize(("name", "config", "recipe", "size"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_sizes_are_predicted_to_the_byte(tmp_path, monkeypatch, name, config, recipe, size):
    in_process(monkeypatch)
    (row,) = predict(written(tmp_path / "model", config), [recipe]).predicted
    assert row.sizes.tensor_bytes == size


def test_published_parameters_are_predicted(tmp_path, monkeypatch):
    in_process(monkeypatch)
    counts = [predict(written(tmp_path, config)).logical_params for config in (MISTRAL_7B, LLAMA_31_8B, GPT_OSS_20B)]
    assert counts == [7_241_732_096, 8_030_261_248, 20_914_757_184]


@pytest.mark.parametrize(("recipe", "width"), [("matmulnbits-4-b32-sym", 4), ("matmulnbits-4-b32-sym-f16", 2)])
def test_the_puzzle_of_the_four_bit_export_is_predicted(tmp_path, monkeypatch, recipe, width):
    """SmolLM2-135M: the embedding stays, the tied head is quantized a second time."""
    in_process(monkeypatch)
    (row,) = predict(written(tmp_path / "model", SMOLLM2_135M), [recipe]).predicted
    assert row.sizes.params == 134_515_008
    assert row.sizes.bytes == {
        "codes": 67_239_936,
        "scales": 134_479_872 // 32 * width,
        "unquantized": (28_311_552 + 35_136) * width,
    }


def test_what_stays_unquantized_is_told(tmp_path, monkeypatch):
    in_process(monkeypatch)
    (row,) = predict(written(tmp_path / "model", MISTRAL_7B), ["nf4"]).predicted
    rows = {group.kind: (group.tensors, group.params, group.bytes) for group in row.sizes.kept}
    assert rows == {
        "embedding": (1, 131_072_000, 262_144_000),
        "head": (1, 131_072_000, 262_144_000),
        "vectors": (65, 266_240, 532_480),
    }


def llama_file(tmp_path, **more):
    """A small checkpoint, written sparse: 64 wide, two layers; `more` are other shapes by name."""
    model = models.config_of("llama")
    names = {"model.embed_tokens.weight": (131, 64), "lm_head.weight": (131, 64), "model.norm.weight": (64,)}
    names |= {f"model.layers.{at}.mlp.up_proj.weight": (96, 64) for at in range(2)} | more
    tmp_path.mkdir(exist_ok=True)
    kinds = {"position_ids": "I64"}
    entries = [layouts.Entry(name, kinds.get(name.rpartition(".")[2], "BF16"), shape) for name, shape in names.items()]
    layouts.write_file(tmp_path / "model.safetensors", entries)
    (tmp_path / "config.json").write_text(json.dumps(model.to_dict() | {"dtype": "bfloat16"}))
    return tmp_path


def test_what_fits_is_told_by_budget(tmp_path):
    found = predict(llama_file(tmp_path), ["bf16", "nf4", "fp32"], fits=["70 KB", "60 KiB", "1 MB", "1 B"])
    sizes = {row.recipe: row.sizes.tensor_bytes for row in found.predicted}
    assert sizes["fp32"] == 2 * sizes["bf16"] == 4 * found.logical_params
    assert {fit.budget: fit.recipes for fit in found.fits} == {
        budget: tuple(name for name in ("fp32", "bf16", "nf4") if sizes[name] <= limit)
        for budget, limit in (("70 KB", 70_000), ("60 KiB", 61_440), ("1 MB", 10**6), ("1 B", 1))
    }


def test_every_recipe_of_the_table_is_tried_and_says_why_it_is_not_for_the_model(tmp_path):
    found = predict(llama_file(tmp_path))
    assert [row.recipe for row in found.predicted] == list(recipes.shown())
    refused = {row.recipe: row.refused for row in found.predicted if row.refused}
    assert set(refused) == {"awq-4-g128", "fp8-block"}
    assert "no multiple of 128" in refused["awq-4-g128"]
    assert all((row.sizes is None) == (row.refused is not None) for row in found.predicted)


def test_a_buffer_keeps_its_bytes_and_never_counts(tmp_path):
    without, buffered = (
        predict(llama_file(tmp_path / name, **more), ["fp32", "int8"])
        for name, more in (("without", {}), ("with", {"model.position_ids": (1, 40)}))
    )
    assert buffered.logical_params == without.logical_params
    for row, other in zip(buffered.predicted, without.predicted, strict=True):
        assert row.sizes.tensor_bytes - other.sizes.tensor_bytes == 8 * 40
        assert row.sizes.bytes["buffers"] == 8 * 40


REFUSED = [
    ("unknown-recipe", {}, ["nf5"], "recipe `nf5` is not one of fp32"),
    ("unknown-name", {"model.layers.0.strange.weight": (3, 5)}, ["nf4"], "name does not say what it is"),
    ("odd-group", {}, ["awq-4-g128"], "has 64 inputs, no multiple of 128"),
    ("tower", {"model.encoder.layers.0.fc1.weight": (64, 64)}, ["gptq-4-g32"], "is of no text decoder"),
    ("odd-block", {}, ["matmulnbits-4-b24"], "power of 2 from 16"),
    ("no-such-bits", {}, ["gptq-9-g32"], "recipe `gptq-9-g32` is not one of"),
]


@pytest.mark.parametrize(("more", "names", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_predicted_is_refused(tmp_path, more, names, said):
    path = llama_file(tmp_path / "model", **more)
    with pytest.raises(ValueError, match=said):
        predict(path, names)


def test_a_quantized_checkpoint_is_refused_in_one_line(tmp_path):
    save_file({"fc.qweight": torch.zeros(8, 32, dtype=torch.int32)}, tmp_path / "model.safetensors")
    models.save("llama", tmp_path / "plain")
    models.load(tmp_path / "plain", **models.INT8).save_pretrained(tmp_path / "int8")
    done = quantcheck("predict", tmp_path / "int8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "is quantized already (bnb-int8)" in done.stderr


CONFIGS = [
    ("no-dtype", {key: value for key, value in MISTRAL_7B.items() if key != "dtype"}, "names no dtype"),
    ("no-model", {"model_type": "no\x1b[31mne", "dtype": "float16"}, r"no\x1b[31mne"),
    ("list", [1], "holds a list where an object belongs"),
]


@pytest.mark.parametrize(("config", "said"), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_a_bad_configuration_is_one_line(tmp_path, monkeypatch, capsys, config, said):
    def ask(source, config, shapes):
        try:
            return unquantized_model.described(unquantized_model.cleaned(config))
        except unquantized_model.Unknown as error:
            raise FormatError(f"its architecture is not known: {error}", file=source) from None

    monkeypatch.setattr(architecture, "_ask", ask)
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", str(written(tmp_path / "model", config))])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert said in printed.err


def test_a_configuration_without_transformers_is_refused_politely(tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs transformers: pip install pytest-quantcheck\[hf\]"):
        predict(written(tmp_path / "model", MISTRAL_7B))


def test_the_command_keeps_its_schema_and_agrees_with_the_process_of_its_own(tmp_path):
    path = written(tmp_path / "model", SMOLLM2_135M) / "config.json"
    done = quantcheck("predict", path, "--json", "--dtype", "fp16")
    document = json.loads(done.stdout)
    jsonschema.validate(document, SCHEMA)
    assert (done.returncode, document["logical_params"], document["dtype"]) == (0, 134_515_008, "F16")
    sizes = {row["recipe"]: row["tensor_bytes"] for row in document["recipes"]}
    assert sizes["fp16"] == 2 * 134_515_008
    assert sizes["q8_0"] == 134_479_872 // 32 * 34 + 35_136 * 4


@pytest.mark.parametrize("named", [True, False])
def test_the_tables_are_readable_at_80_columns(tmp_path, named):
    recipe = ["--recipe", "nf4-dq", "--recipe", "q4_k_m"] if named else []
    done = quantcheck("predict", llama_file(tmp_path / "model"), *recipe, "--fits", "24 GB")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    assert "  24.00 GB    22.35 GiB  " in done.stdout


def test_a_checkpoint_is_predicted_without_torch(tmp_path):
    llama_file(tmp_path / "model")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'transformers')));"
        "from pytest_quantcheck.cli import main; main(['predict', sys.argv[1]])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model"], check=True, capture_output=True)
