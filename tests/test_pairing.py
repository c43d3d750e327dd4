"""What is compared with what: names, fusions, stacks of experts, turned matrices, and factors moved into neighbours."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from pytest_quantcheck import inspect
from pytest_quantcheck.checks.fidelity import compare
from pytest_quantcheck.checks.pairing import pair
from pytest_quantcheck.checks.smoothing import undo
from tests import models
from tests.gguf_files import Tensor, architecture, gguf
from tests.test_gguf import as_gguf

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40, "pad_token_id": 0}
CONFIGS = {
    "llama": ("LlamaConfig", {"intermediate_size": 96, "num_key_value_heads": 2}),
    "mixtral": ("MixtralConfig", {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 3}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"moe_intermediate_size": 48, "num_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        | {"head_dim": 16},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"intermediate_size": 48, "num_local_experts": 3, "num_key_value_heads": 2, "head_dim": 16}
        | {"layer_types": ["full_attention", "full_attention"]},
    ),
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(5)
    config, options = CONFIGS[kind]
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL | options))
    for parameter in made.parameters():
        nn.init.normal_(parameter, mean=0.0, std=0.05)
    return made.float()


def module(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A model of just these parameters, under these names."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, last = name.split(".")
        owner = root
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner._modules[step]
        owner.register_parameter(last, nn.Parameter(value, requires_grad=False))
    return root


def assert_all_equal(artifact, reference):
    """Everything has a counterpart, and each counterpart decodes to the very same values."""
    pairing = pair(inspect(artifact), inspect(reference))
    assert not pairing.findings
    for tensor, other in pairing.pairs:
        assert other.shape == tensor.shape
        assert torch.equal(tensor.decode(), other.decode()), tensor.name
        for start, stop in ((0, 1), (1, min(7, tensor.rows)), (tensor.rows // 2, tensor.rows)):
            assert torch.equal(tensor.decode(start, stop), other.decode(start, stop)), (tensor.name, start, stop)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_on_disk_are_those_of_the_live_stack(kind, tmp_path):
    """transformers saves the experts one by one, under other names, and holds them in stacks: both ways round."""
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    assert_all_equal(model, tmp_path)
    assert_all_equal(tmp_path, model)


def split(value: torch.Tensor, sizes: list[int], dim: int = 0) -> list[torch.Tensor]:
    return [part.contiguous() for part in value.split(sizes, dim)]


def fused(model: nn.Module) -> dict[str, torch.Tensor]:
    """A llama as vLLM and Phi-3 hold it: one qkv_proj, one gate_up_proj, biases too."""
    state = {name: value for name, value in model.state_dict().items() if "attn" not in name and "mlp" not in name}
    for number, layer in enumerate(model.model.layers):
        at, attention, mlp = f"model.layers.{number}", layer.self_attn, layer.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        state[f"{at}.self_attn.qkv_proj.weight"] = torch.cat([part.weight for part in parts])
        state[f"{at}.self_attn.qkv_proj.bias"] = torch.cat([part.bias for part in parts])
        state[f"{at}.self_attn.o_proj.weight"] = attention.o_proj.weight
        state[f"{at}.self_attn.o_proj.bias"] = attention.o_proj.bias
        state[f"{at}.mlp.gate_up_proj.weight"] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        state[f"{at}.mlp.down_proj.weight"] = mlp.down_proj.weight
    return {name: value.detach().clone() for name, value in state.items()}


def test_fused_projections_are_cut_and_joined():
    config, options = CONFIGS["llama"]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**SMALL | options, attention_bias=True)
    ).float()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    whole = module(fused(model))
    assert_all_equal(whole, model)
    assert_all_equal(model, whole)


def test_conv1d_is_turned_either_way(tmp_path):
    """A GGUF has GPT-2's matrices as outputs by inputs, the model as inputs by outputs."""
    model = transformers.GPT2LMHeadModel(models.config_of("gpt2")).float()
    (tmp_path / "m.gguf").write_bytes(gguf(as_gguf(model, "gpt2", {}), architecture("gpt2", head_count=4)))
    artifact = inspect(tmp_path)
    assert sum(tensor.transposed for tensor in artifact.tensors) == 8
    assert_all_equal(artifact, model)
    assert_all_equal(model, artifact)


def experts_as_gguf(model: nn.Module, arch: str) -> list[Tensor]:
    """The experts of a live model as llama.cpp's converter stacks them: gate, up and down apart, outputs first."""
    made = []
    for number, layer in enumerate(model.model.layers):
        stack = layer.mlp.experts
        if arch == "gpt-oss":
            both, down = stack.gate_up_proj.mT, stack.down_proj.mT
            gate, up = both[:, 0::2], both[:, 1::2]
        else:
            gate, up = stack.gate_up_proj.chunk(2, dim=1)
            down = stack.down_proj
        for name, value in (("gate", gate), ("up", up), ("down", down)):
            value = value.detach().contiguous()
            made.append(
                Tensor(f"blk.{number}.ffn_{name}_exps.weight", "F32", tuple(value.shape), value.numpy().tobytes())
            )
    return made


@pytest.mark.parametrize(("kind", "arch"), [("mixtral", "llama"), ("qwen3-moe", "qwen3moe"), ("gpt-oss", "gpt-oss")])
@pytest.mark.parametrize("live", [True, False])
def test_stacks_of_a_gguf_are_those_of_the_model(kind, arch, live, tmp_path):
    """Against the live model and against its files; gpt-oss holds outputs last and gate and up column by column."""
    model = model_of(kind)
    keys = architecture(arch, expert_count=3, head_count=4, head_count_kv=2)
    (tmp_path / "m.gguf").write_bytes(gguf(experts_as_gguf(model, arch), keys))
    model.save_pretrained(tmp_path / "saved")
    artifact = inspect(tmp_path / "m.gguf")
    pairing = pair(artifact, inspect(model if live else tmp_path / "saved"))
    assert len(pairing.pairs) == 6
    for tensor, other in pairing.pairs:
        assert torch.equal(tensor.decode(), other.decode()), tensor.name


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        (
            {"a.qkv_proj.weight": (12, 4)},
            {"a.q_proj.weight": (4, 4), "a.k_proj.weight": (4, 4)},
            "is not in the reference",
        ),
        (
            {"a.qkv_proj.weight": (12, 4)},
            {f"a.{part}_proj.weight": (rows, 4) for part, rows in (("q", 4), ("k", 4), ("v", 5))},
            "is 12 x 4, the reference has 4 x 4 and 5 x 4",
        ),
        ({"a.q_proj.weight": (4, 4)}, {"a.qkv_proj.weight": (12, 4)}, "is not in the reference"),
        ({"a.x.weight": (6, 4)}, {"a.x.weight": (4, 6)}, "is 6 x 4, the reference has 4 x 6"),
        ({"e.experts.up_proj": (3, 4, 5)}, {"e.experts.0.up_proj.weight": (4, 5)}, "is not in the reference"),
        ({"e.experts.3.up_proj.weight": (4, 5)}, {"e.experts.up_proj": (3, 4, 5)}, "is not in the reference"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_not_compared(ours, theirs, what):
    one, other = (module({name: torch.ones(shape) for name, shape in side.items()}) for side in (ours, theirs))
    pairing = pair(inspect(one), inspect(other))
    assert not pairing.pairs
    assert pairing.findings[0].message == what


# --- factors that AWQ and SmoothQuant move ---


SPREAD = 0.3


def fold(model: nn.Module, *, norms: bool = True, producers: bool = True, forget: str = "") -> nn.Module:
    """Move factors out of norms (and out of v and up) into what takes them in: the outputs stay the same."""
    torch.manual_seed(3)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        moves = []
        if norms:
            moves += [
                (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ]
        if producers:
            moves += [(mlp.up_proj, [mlp.down_proj])]
        for giver, takers in moves:
            factors = torch.exp(SPREAD * torch.randn(len(giver.weight)))
            giver.weight.data = giver.weight.data / (factors[:, None] if giver.weight.ndim == 2 else factors)
            for taker in takers:
                if not forget or taker is not attention.get_submodule(forget):
                    taker.weight.data = taker.weight.data * factors
    return model


def llama() -> nn.Module:
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.1 * torch.randn(len(parameter))
    return model


def quantized(model: nn.Module, folder) -> nn.Module:
    model.save_pretrained(folder)
    return models.load(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")


def test_folding_leaves_the_outputs_alone():
    """The fold of these tests is the real thing: the model still answers the same."""
    tokens = torch.arange(20).view(1, -1)
    assert torch.allclose(fold(llama())(tokens).logits, llama()(tokens).logits, atol=1e-4)


@pytest.mark.parametrize(("norms", "producers"), [(True, False), (False, True), (True, True)])
def test_smoothed_models_raise_no_alarm(norms, producers, tmp_path):
    """Real NF4 of a folded model against the model before folding: every layer compared, at the SQNR of NF4."""
    smoothed = quantized(fold(llama(), norms=norms, producers=producers), tmp_path)
    comparison = compare(inspect(smoothed), inspect(llama().bfloat16()))
    rows = {row.name: row for row in comparison.tensors}
    for name, row in rows.items():
        if row.scheme == "bnb-nf4":
            assert row.sqnr_db > 19.5, name
    places = [finding for finding in comparison.findings if finding.check == "smoothing"]
    assert len(places) == 2 * (2 * norms + producers)
    assert all("undone before comparing" in place.message for place in places)


def test_a_layer_that_missed_its_factors_is_seen(tmp_path):
    """k was forgotten when the norm was divided: its siblings tell that it should have been multiplied."""
    broken = quantized(fold(llama(), producers=False, forget="k_proj"), tmp_path)
    comparison = compare(inspect(broken), inspect(llama().bfloat16()))
    wrong = {finding.tensor for finding in comparison.findings if finding.severity == "error"}
    assert wrong == {f"model.layers.{layer}.self_attn.k_proj.weight" for layer in range(2)}


@pytest.mark.parametrize("name", ["mlp.up_proj", "mlp.down_proj", "self_attn.v_proj"])
def test_gains_of_one_layer_alone_are_a_fault(name, tmp_path):
    """Scales dropped row by row, or column by column, are not excused: the neighbour does not make up for them."""
    model = llama()
    layer = model.model.layers[0].get_submodule(name)
    factors = torch.exp(SPREAD * torch.randn(layer.weight.shape[1 if name.endswith("down_proj") else 0]))
    layer.weight.data = layer.weight.data * (factors if name.endswith("down_proj") else factors[:, None])
    comparison = compare(inspect(quantized(model, tmp_path)), inspect(llama().bfloat16()))
    assert not comparison.passed
    assert not [finding for finding in comparison.findings if finding.check == "smoothing"]
    assert comparison.tensors[0].name == f"model.layers.0.{name}.weight"


def test_a_sound_model_is_left_as_it_is(tmp_path):
    pairing = pair(inspect(quantized(llama(), tmp_path)), inspect(llama()))
    assert undo(pairing) is pairing
