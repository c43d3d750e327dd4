"""The walk over live modules: ties, shards, wrappers, tensors that are none."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError, NotDecodable, UnknownEncoding


def holder(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def linear(rows: int = 3, columns: int = 5) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def holding(tensor, *, parameter: bool = True) -> nn.Module:
    module = nn.Module()
    if parameter:
        module.weight = nn.Parameter(tensor, requires_grad=False)
    else:
        module.register_buffer("weight", tensor)
    return module


# ---------------------------------------------------------------- ties


def shared_module() -> nn.Module:
    layer = linear()
    return holder(first=layer, second=layer)


def shared_parameter() -> nn.Module:
    first, second = linear(), linear()
    second.weight = first.weight
    return holder(first=first, second=second)


def shared_storage() -> nn.Module:
    first, second = linear(), linear()
    second.weight = nn.Parameter(first.weight.data)
    return holder(first=first, second=second)


def transposed_view() -> nn.Module:
    first = linear()
    return holder(first=first, second=holding(first.weight.data.t()))


def reshaped_view() -> nn.Module:
    first = linear()
    return holder(first=first, second=holding(first.weight.data.view(-1)))


def buffer_that_is_a_parameter_elsewhere() -> nn.Module:
    second = linear()
    return holder(first=holding(second.weight.data, parameter=False), second=second)


def parameter_that_is_a_buffer_elsewhere() -> nn.Module:
    first = linear()
    return holder(first=first, second=holding(first.weight.data, parameter=False))


def shared_on_meta() -> nn.Module:
    with torch.device("meta"):
        return shared_parameter()


def shared_container() -> nn.Module:
    block = nn.Sequential(linear())
    model = holder(first=block, second=block)
    model.first = block
    return model


TIED = [
    shared_module, shared_parameter, shared_storage, transposed_view, reshaped_view,
    buffer_that_is_a_parameter_elsewhere, parameter_that_is_a_buffer_elsewhere, shared_on_meta, shared_container,
]  # fmt: skip


@pytest.mark.parametrize("make", TIED, ids=[make.__name__ for make in TIED])
def test_a_tied_weight_counts_once(make):
    artifact = inspect(make())
    assert (artifact.logical_params, artifact.tied_params, artifact.file_bytes) == (15, 15, 60)
    assert len(artifact.aliases) == 1


def test_slices_of_one_storage_are_two_weights():
    whole = torch.randn(6, 5)
    model = holder(first=holding(whole[:3]), second=holding(whole[3:]))
    assert (inspect(model).logical_params, inspect(model).tied_params) == (30, 0)


def test_two_empty_weights_are_not_tied():
    model = holder(first=holding(torch.empty(0, 5)), second=holding(torch.empty(0, 5)))
    assert inspect(model).aliases == {}


def test_a_module_that_holds_itself_is_walked_once():
    model = holder(layer=linear())
    model.me = model
    assert inspect(model).logical_params == 15


def test_a_shared_module_of_packed_parameters_counts_once():
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 3)), {nn.Linear}, dtype=torch.qint8)[0]
    artifact = inspect(holder(first=packed, second=packed))
    assert (artifact.logical_params, artifact.tied_params) == (18, 18)


@pytest.mark.parametrize("share", ["module", "parameter"])
def test_a_tied_quantized_weight_has_the_name_of_its_parameter(share):
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    first, second = linear(), linear()
    library.quantize_(first, library.Int8WeightOnlyConfig(version=2))
    second.weight = first.weight
    artifact = inspect(holder(first=first, second=first if share == "module" else second))
    assert dict(artifact.aliases) == {"second.weight": "first.weight"}
    assert (artifact.logical_params, artifact.tied_params) == (15, 15)
    assert artifact.tensor("second.weight").scheme == "torchao-int8"


def test_wrappers_leave_no_trace_in_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    compiled = torch.compile(holder(block=checkpoint_wrapper(linear())))
    assert [tensor.name for tensor in inspect(compiled).tensors] == ["block.weight"]
    assert [tensor.name for tensor in inspect(nn.DataParallel(holder(layer=linear()))).tensors] == ["layer.weight"]


# ---------------------------------------------------------------- dtypes, and what is no weight


def test_a_wide_complex_buffer_is_weighed_and_never_counts():
    model = holder(layer=linear(), rope=holding(torch.zeros(4, dtype=torch.complex128), parameter=False))
    assert (inspect(model).logical_params, inspect(model).bytes["buffers"]) == (15, 64)


def test_a_complex_weight_counts_and_has_no_float_form():
    tensor = inspect(holding(torch.zeros(4, 2, dtype=torch.complex128))).tensor("weight")
    assert (tensor.params, tensor.nbytes) == (8, 128)
    with pytest.raises(NotDecodable, match="complex"):
        tensor.decode()


SHELLS = [getattr(torch, f"{sign}{bits}") for sign in ("uint", "int") for bits in range(1, 8)]


@pytest.mark.parametrize("dtype", [*SHELLS, torch.bits8, torch.uint8, torch.int8, torch.int64], ids=str)
def test_an_integer_weight_without_scales_is_an_error(dtype):
    with pytest.raises(UnknownEncoding, match=r"weight: .* is an encoding that no scheme claims"):
        inspect(holding(torch.empty(4, 6, dtype=dtype)))


@pytest.mark.parametrize("dtype", SHELLS, ids=str)
def test_a_shell_integer_buffer_weighs_a_byte_each(dtype):
    assert inspect(holding(torch.empty(4, 6, dtype=dtype), parameter=False)).bytes["buffers"] == 24


def test_a_lazy_module_is_an_error():
    with pytest.raises(FormatError, match=r"layer\.weight: has no shape yet"):
        inspect(holder(layer=nn.LazyLinear(3)))


def test_a_fake_tensor_is_an_error():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = holder(layer=linear())
    with pytest.raises(FormatError, match=r"layer\.weight: is a FakeTensor"):
        inspect(model)


def test_a_sparse_tensor_is_an_error():
    with pytest.raises(UnknownEncoding, match="weight: is a sparse_coo tensor"):
        inspect(holding(torch.eye(3).to_sparse()))


def test_a_tensor_class_nobody_knows_is_an_error():
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

        def __tensor_flatten__(self):
            return [], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return Wrapped(torch.empty(4, 6))

    with pytest.raises(UnknownEncoding, match=r"weight: .*Wrapped` is a tensor class that no scheme knows"):
        inspect(holding(Wrapped(torch.empty(4, 6))))


# ---------------------------------------------------------------- shards


class Partitioned(nn.Parameter):
    """What DeepSpeed ZeRO-3 makes of a parameter: empty, its shard and its shape in attributes."""

    @classmethod
    def of(cls, tensor: torch.Tensor, ranks: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(0, dtype=tensor.dtype), requires_grad=tensor.dtype.is_floating_point)
        parameter.ds_shape, parameter.ds_numel = tensor.shape, tensor.numel()
        parameter.ds_tensor = tensor.reshape(-1)[: -(-tensor.numel() // ranks)].clone()
        return parameter


def test_zero3_counts_the_whole_and_weighs_the_shard():
    model = holder(layer=linear())
    model.layer.weight = Partitioned.of(torch.randn(3, 5), 2)
    artifact = inspect(model)
    tensor = artifact.tensor("layer.weight")
    assert (tensor.shape, tensor.nbytes, artifact.logical_params) == ((3, 5), 32, 15)
    with pytest.raises(NotDecodable, match="holds 32 of 60 bytes"):
        tensor.decode()


def test_zero3_counts_a_quantized_weight():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(33, 7, bias=False, quant_type="nf4").to("cpu")
    state, packed = layer.weight.quant_state, layer.weight.data
    layer.weight = Partitioned.of(packed, 2)
    layer.quant_state = state
    artifact = inspect(holder(layer=layer))
    assert (artifact.logical_params, artifact.tensor("layer.weight").scheme) == (231, "bnb-nf4")
    assert artifact.tensor("layer.weight").bytes["codes"] == 58
    with pytest.raises(NotDecodable, match="is sharded"):
        artifact.tensor("layer.weight").decode()


@pytest.fixture
def one_rank(tmp_path):
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.FileStore(str(tmp_path / "s"), 1))
    yield
    distributed.destroy_process_group()


@pytest.fixture
def first_of_two_ranks():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    distributed.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    yield
    distributed.destroy_process_group()


def fully_sharded(model: nn.Module, ranks: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))


def test_dtensor_of_one_rank_is_decoded(one_rank):
    model = holder(layer=linear())
    values = model.layer.weight.data.clone()
    tensor = inspect(fully_sharded(model, 1)).tensor("layer.weight")
    assert (tensor.shape, tensor.nbytes, tensor.trainable) == ((3, 5), 60, True)
    assert torch.equal(tensor.decode(), values)


def test_dtensor_counts_the_whole_and_weighs_the_shard(first_of_two_ranks):
    artifact = inspect(fully_sharded(holder(layer=linear()), 2))
    tensor = artifact.tensor("layer.weight")
    assert (tensor.shape, tensor.nbytes, artifact.logical_params) == ((3, 5), 40, 15)
    with pytest.raises(NotDecodable, match="holds 40 of 60 bytes"):
        tensor.decode()


def test_replicated_dtensor_is_decoded_and_a_partial_one_is_not(first_of_two_ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, local = init_device_mesh("cpu", (2,)), torch.randn(3, 5)
    whole = inspect(holding(DTensor.from_local(local, mesh, [Replicate()], run_check=False))).tensor("weight")
    assert torch.equal(whole.decode(), local)
    with pytest.raises(NotDecodable, match="is sharded"):
        inspect(holding(DTensor.from_local(local, mesh, [Partial()]))).tensor("weight").decode()


def test_dtensor_of_a_quantized_shard_counts_the_whole(first_of_two_ranks):
    library = pytest.importorskip("torchao.quantization")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    local = library.Float8Tensor.from_hp(torch.randn(3, 5), granularity=library.PerRow())
    mesh = init_device_mesh("cpu", (2,))
    weight = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((6, 5)), stride=(5, 1))
    tensor = inspect(holding(weight)).tensor("weight")
    assert (tensor.shape, tensor.scheme, tensor.bytes) == ((6, 5), "torchao-float8", {"codes": 15, "scales": 12})
    with pytest.raises(NotDecodable, match="is sharded"):
        tensor.decode()


def flattened(**options) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_flat_parameter_counts_what_it_was_made_of(first_of_two_ranks, use_orig_params):
    artifact = inspect(flattened(use_orig_params=use_orig_params))
    shapes = {tensor.name: tensor.shape for tensor in artifact.tensors}
    assert shapes == {"0.weight": (3, 5), "0.bias": (3,), "1.weight": (2, 3)}
    assert (artifact.logical_params, artifact.trainable_params) == (24, 24)
    assert artifact.file_bytes == (13 if use_orig_params else 12) * 4
    with pytest.raises(NotDecodable, match="is sharded"):
        artifact.tensor("0.weight").decode()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_flat_parameter_of_one_rank_is_decoded(one_rank, use_orig_params):
    artifact = inspect(flattened(use_orig_params=use_orig_params))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    assert artifact.file_bytes == 24 * 4
    for name, parameter in model.named_parameters():
        assert torch.equal(artifact.tensor(name).decode(), parameter.data.view(-1, parameter.shape[-1]))


@pytest.mark.filterwarnings("ignore")
def test_a_flat_parameter_of_tied_weights_counts_them_once(first_of_two_ranks):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(linear(5, 5), linear(5, 5))
    model[1].weight = model[0].weight
    artifact = inspect(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    assert (artifact.logical_params, artifact.tied_params) == (25, 25)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_flat_parameter_of_packed_weights_counts_their_logical_shape(first_of_two_ranks, use_orig_params):
    """QLoRA with FSDP: codes are stored in the dtype of the others, so that they fit into one flat parameter."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from torch.distributed.fsdp import FullyShardedDataParallel

    layer = bitsandbytes.nn.Linear4bit(32, 8, bias=False, quant_type="nf4", quant_storage=torch.float32).to("cpu")
    model = FullyShardedDataParallel(
        holder(layer=layer), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    artifact = inspect(model)
    assert (artifact.logical_params, artifact.tensor("layer.weight").scheme) == (256, "bnb-nf4")
    assert artifact.tensor("layer.weight").bytes["codes"] == 64
