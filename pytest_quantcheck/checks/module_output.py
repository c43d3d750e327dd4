"""The forward of each quantized linear layer against x @ W.T + bias, W decoded by us and multiplied in float64.

    sigma    u (2 + sqrt(K)) |x w_j|      u: half the eps of the layer's precision, K the columns, w_j row j of W
    allowed  6 sigma + 2 u |y_j|          and for layers that round their activations 6 |s w_j| more

|x w_j| is the root of sum_i (x_i w_ij)^2. The weight goes through at most four roundings on its way, of u each, which
are independent: a standard deviation of 2 u. The sum goes through K more, in float32: sqrt(K) u32, which is what stands
for u there. x is Gaussian, so the error of an output is Gaussian given W, and six standard deviations are passed once
in 500 million values. s_i is the most that activation i is rounded by, half a step of int8 or float8. The result is
rounded, and the bias added: 2 u |y_j|.

A batch of 1 takes the matrix-vector kernel of most libraries, larger ones the matrix-matrix kernel. A layer runs as a
copy, since a first forward may repack the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks import kernels
from pytest_quantcheck.checks.coverage import matches
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.quantities import counted, format_shape
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

CHECK = "module-output"
BATCHES = (1, 2, 33)
SIGMAS = 6
WINDOW = 1 << 20


class Output(NamedTuple):
    """One forward: of which layer, on how many rows of which dtype, and how far it is off what is allowed.

    `error` is the relative error of the whole output; `excess` the largest error as a multiple of what is allowed.
    `raised` is what the forward raised instead.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    batch: int
    dtype: str
    precision: str
    error: float
    excess: float
    raised: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether an output is further off than rounding explains; NaN is."""
        return self.raised is not None or not self.excess <= 1


class Outputs(NamedTuple):
    """Every forward that was made, worst first, and the layers that could not be run."""

    runs: tuple[Output, ...]
    failures: tuple[tuple[str, str], ...]


def compare(
    model: Any,
    artifact: Artifact,
    *,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
) -> Outputs:
    """Run every quantized linear layer of a live model on random inputs.

    Without `dtypes`, a layer is run in its own dtype, or in float32, bfloat16 and float16 where its library takes all.
    """
    if not batches or min(batches) < 1:
        raise ValueError(f"batches=`{list(batches)}`: at least one batch size, of at least 1, is needed")
    wanted = {
        tensor.name
        for tensor in artifact.tensors
        if tensor.quantized and not any(matches(tensor.name, pattern) for pattern in skip)
    }
    runs: list[Output] = []
    failures: list[tuple[str, str]] = []
    for tensor, module in kernels.linears(model, artifact):
        if tensor.name not in wanted:
            continue
        wanted.remove(tensor.name)
        try:
            for dtype in dtypes or _own_dtypes(tensor, module):
                runs += [_run(tensor, module, batch, dtype, seed) for batch in batches]
        except FormatError as error:
            failures.append((tensor.name, error.what))
    failures += [(name, "is no linear layer: skip it") for name in sorted(wanted)]
    runs.sort(key=lambda run: (not run.wrong, -run.excess))
    return Outputs(tuple(runs), tuple(failures))


def check_module_output(outputs: Outputs) -> Verdict:
    """Turn the runs into a verdict, the worst first."""
    wrong = [run for run in outputs.runs if run.wrong]
    names = {run.name for run in outputs.runs}
    ran = f"{counted(len(names), 'layer')} in {counted(len(outputs.runs), 'forward')}"
    bad = len({run.name for run in wrong})
    headline = f"module output: {ran}, {counted(bad, 'layer')} not x @ W.T + bias of the stored W"
    lines = worst([_line(run) for run in wrong])
    lines += worst([f"{name}: {why}" for name, why in outputs.failures])
    if not outputs.runs and not outputs.failures:
        lines.append("no quantized linear layer was run (a check that compared nothing has failed)")
    return Verdict(CHECK, not lines, headline, tuple(lines))


def _line(run: Output) -> str:
    what = f"{run.name} ({run.scheme} {format_shape(run.shape)}), batch {run.batch}, {run.dtype}"
    if run.raised is not None:
        return f"{what}: forward raises {run.raised}"
    allowed = f"the largest is {run.excess:.3g} times what rounding to {run.precision} allows"
    return f"{what}: relative error {run.error:.3g}, {allowed}"


def _own_dtypes(tensor: LogicalTensor, module: Any) -> tuple[str, ...]:
    """The inputs that a layer takes: those its library converts, or the dtype of its weight, its bias, its scales."""
    import torch

    wide = {torch.float32, torch.float16, torch.bfloat16}
    kernel = kernels.kernel_of(module)
    if kernel is not None and kernel.takes:
        return kernel.takes
    held = (getattr(module, "weight", None), _bias(module))
    dtypes = [own.dtype for own in held if isinstance(own, torch.Tensor) and own.dtype in wide]
    dtypes += kernels.precisions(tensor)
    return (str(dtypes[0]).removeprefix("torch.") if dtypes else "float32",)


def _run(tensor: LogicalTensor, module: Any, batch: int, dtype: str, seed: int) -> Output:
    import torch

    if not hasattr(torch, dtype):
        raise ValueError(f"dtype `{dtype}` is not one of torch's")
    layer = _copied(module)
    device = _device(layer)
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tensor.columns, generator=numbers).to(device, getattr(torch, dtype))
    run = Output(tensor.name, tensor.scheme, tensor.shape, batch, dtype, dtype, 0.0, 0.0)
    try:
        with torch.no_grad():
            y = layer(x)
    except Exception as error:  # whatever a library raises is its answer
        return run._replace(raised=f"{type(error).__name__}: {error}".splitlines()[0])
    if tuple(y.shape) != (batch, tensor.rows):
        raise FormatError(f"its forward makes {list(y.shape)} of {list(x.shape)}, it is {list(tensor.shape)}")
    return _judge(run, tensor, layer, x, y)


def _copied(module: Any) -> Any:
    """A copy to run, or the module itself where its weight is a class that cannot be copied."""
    try:
        return copy.deepcopy(module)
    except Exception:  # each class has its own way of saying so
        return module


def _device(module: Any) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors:
        import torch

        return torch.device("cpu")
    device: torch.device = tensors[0].device
    return device


def _judge(run: Output, tensor: LogicalTensor, layer: Any, x: torch.Tensor, y: torch.Tensor) -> Output:
    """Compare in windows over the rows of W, which are the columns of y."""
    import torch

    precision = _precision(tensor, layer, {x.dtype, y.dtype})
    unit, single = (torch.finfo(dtype).eps / 2 for dtype in (precision, torch.float32))
    spread = 2 * unit + tensor.columns**0.5 * single
    rounding = _rounding(layer, x.double())
    bias = _bias(layer)
    excess, noise, signal = 0.0, 0.0, 0.0
    for start, stop in tensor.windows(WINDOW):
        w = tensor.decode(start, stop, str(x.device)).double()
        expected = x.double() @ w.t()
        if bias is not None:
            expected += bias[start:stop].double()
        error = (y[:, start:stop].double() - expected).abs()
        squares = w.t().square()
        sigma = spread * (x.double().square() @ squares).sqrt()
        if rounding is not None:
            sigma += (rounding @ squares).sqrt()
        allowed = SIGMAS * sigma + 2 * unit * expected.abs()
        ratio = torch.where(error == 0, 0.0, error / allowed)
        excess = float(torch.maximum(ratio.max().cpu(), torch.tensor(excess, dtype=torch.float64)))
        noise += float(error.square().sum())
        signal += float(expected.square().sum())
    error_of_all = (noise / signal) ** 0.5 if signal else noise**0.5
    return run._replace(precision=str(precision).removeprefix("torch."), error=error_of_all, excess=excess)


def _precision(tensor: LogicalTensor, layer: Any, seen: set[torch.dtype]) -> torch.dtype:
    """The coarsest of 32 and 16 bits that the layer goes through: input, output, scales, bias, what it computes in."""
    import torch

    kernel, bias = kernels.kernel_of(layer), _bias(layer)
    computes_in = kernel.computes_in(layer) if kernel is not None and kernel.computes_in is not None else None
    found = {*seen, *kernels.precisions(tensor), computes_in, None if bias is None else bias.dtype}
    wide = (torch.float32, torch.float16, torch.bfloat16)
    return max((dtype for dtype in wide if dtype in found), key=lambda dtype: torch.finfo(dtype).eps)


def _bias(layer: Any) -> torch.Tensor | None:
    bias: Any = getattr(layer, "bias", None)
    found: torch.Tensor | None = bias() if callable(bias) else bias  # a method of torch's quantized modules
    return found


def _rounding(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """How far each activation may be rounded, squared; None where the layer leaves them as they are."""
    kernel = kernels.kernel_of(layer)
    largest = None if kernel is None or kernel.rounds is None else kernel.rounds(layer, x)
    return None if largest is None else largest.square()
