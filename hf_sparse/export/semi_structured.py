"""2:4 kernels of torch: linear layers run on sparse tensor cores where that is measured to be faster."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from ..patterns import get_pattern
from ..patterns.n_of_m import NOfM
from ..reporting.tables import format_table


_DEVICE = "cuda"
_MIN_CAPABILITY = (8, 0)  # sparse tensor cores
_CALLS = 10  # of a measurement
_REPEATS = 7

_Key = tuple[torch.Size, torch.dtype, torch.device, bool]


@dataclass(frozen=True)
class LayerSpeed:
    """Seconds of one call of a layer.

    Args:
        tokens: rows of the input.
        dense: of the dense kernel.
        sparse: of the 2:4 kernel.
    """

    tokens: int
    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """dense / sparse: above 1 the 2:4 kernel is faster."""
        return self.dense / self.sparse


@dataclass(frozen=True)
class LayerAcceleration:
    """The outcome for one layer.

    Args:
        name: of the module.
        shape: outputs and inputs.
        reason: why it stays dense; None if it was swapped.
        speeds: what was measured, for each number of tokens.
    """

    name: str
    shape: tuple[int, int]
    reason: str | None
    speeds: tuple[LayerSpeed, ...] = ()

    @property
    def swapped(self) -> bool:
        """Whether the layer uses a 2:4 kernel now."""
        return self.reason is None


@dataclass(frozen=True)
class AccelerationReport:
    """The outcome for each linear layer of a model, printed as a table.

    Args:
        layers: all linear layers, in the order of the model.
    """

    layers: tuple[LayerAcceleration, ...]

    @property
    def swapped(self) -> int:
        """Number of layers that use a 2:4 kernel now."""
        return sum(layer.swapped for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "shape", "kernel", "dense / 2:4 time, by tokens")]
        for layer in self.layers:
            speeds = ", ".join(f"{speed.tokens}: {speed.speedup:.2f}x" for speed in layer.speeds)
            kernel = "2:4" if layer.swapped else f"dense: {layer.reason}"
            rows.append((layer.name, f"{layer.shape[0]}x{layer.shape[1]}", kernel, speeds or "-"))
        summary = f"{self.swapped} of {len(self.layers)} linear layers use 2:4 kernels"
        return f"{format_table(rows, text_columns=4)}\n{summary}"


class SemiStructuredLinear(nn.Linear):
    """A linear layer whose weight is a `torch.sparse.SparseSemiStructuredTensor`, for inference."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _product(input.reshape(-1, input.shape[-1]), self.weight, self.bias).view(*input.shape[:-1], -1)


def accelerate_2of4(
    model: nn.Module,
    tokens: Sequence[int] = (1, 256, 4096),
    *,
    cuda_graphs: bool = False,
    min_speedup: float = 1.05,
    echo: Callable[[str], None] = print,
) -> AccelerationReport:
    """Swaps linear layers with 2:4 weights to torch's 2:4 kernels, where these are measured to be faster.

    Each layer is timed on its own device with random inputs, dense and 2:4, and swapped only if 2:4 is faster at every
    number of tokens; layers of the same shape, dtype and device are timed once. In cuSPARSELt the fastest of its
    algorithms that its search finds for these inputs is used. All other layers are left as they are.

    The model is for inference afterwards: its 2:4 weights cannot be trained or saved. Save the model before.

    Args:
        model: with its weights on CUDA devices of compute capability 8.0 or newer; changed in place.
        tokens: rows of the inputs that the model will have: batch size times length, or the batch size when tokens are
            generated one at a time.
        cuda_graphs: whether to time replays of CUDA graphs, as `torch.compile(mode="reduce-overhead")` and servers run
            a model. Otherwise calls are timed as they are, with what the host needs to launch them, which is more for
            2:4 than for dense kernels.
        min_speedup: smallest dense time / 2:4 time, for every number of tokens, to swap a layer; at least 1.
        echo: prints the report.

    Returns:
        The times of each layer, and whether it was swapped or why not.

    Raises:
        RuntimeError: there is no CUDA device, or a layer is on one of an older compute capability.
        ValueError: `tokens` or `min_speedup` is out of range, or the model has no linear layer on a CUDA device.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("out", dtype="bfloat16").cuda()  # doctest: +SKIP
        >>> report = accelerate_2of4(model, tokens=(16, 8192))  # doctest: +SKIP
    """
    if not tokens or any(count < 1 for count in tokens):
        raise ValueError(f"tokens is {tokens}: give one number of 1 or more, or several, as in (1, 4096)")
    if not min_speedup >= 1:
        raise ValueError(f"`min_speedup` is {min_speedup}: it must be 1 or more, so that no layer becomes slower")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _check_devices(modules.values())
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    measured: dict[_Key, _Measurement] = {}
    layers = []
    for name, module in modules.items():
        weight, reason = module.weight, _obstacle(module)
        speeds: tuple[LayerSpeed, ...] = ()
        if reason is None and uses[id(weight)] > 1:
            reason = "its weight is shared with another module"
        if reason is None:
            key = weight.shape, weight.dtype, weight.device, module.bias is not None
            if key not in measured:
                measured[key] = _measure(module, sorted(set(tokens)), cuda_graphs)
            reason, speeds = measured[key].refusal, measured[key].speeds
            if reason is None and measured[key].least_speedup < min_speedup:
                reason = "no gain"
            if reason is None:
                _swap(module, measured[key].algorithm)
        layers.append(LayerAcceleration(name, (module.out_features, module.in_features), reason, speeds))
    report = AccelerationReport(tuple(layers))
    echo(str(report))
    return report


def _check_devices(modules: Iterable[nn.Linear]) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "2:4 kernels need a CUDA device, and torch finds none: run this on a machine with an NVIDIA GPU of "
            "compute capability 8.0 (Ampere) or newer, with a CUDA build of torch."
        )
    devices = {module.weight.device for module in modules if module.weight.is_cuda}
    if not devices:
        raise ValueError(
            'the model has no linear layer on a CUDA device: move it there first, as in model.to("cuda").'
        )
    for device in devices:
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            raise RuntimeError(
                f"2:4 kernels need compute capability 8.0 (Ampere) or newer, but {torch.cuda.get_device_name(device)} "
                f"({device}) has {capability[0]}.{capability[1]}."
            )


def _obstacle(module: nn.Linear) -> str | None:
    """Why a layer cannot be swapped, whatever its speed."""
    weight = module.weight
    if isinstance(module, SemiStructuredLinear) or isinstance(weight, SparseSemiStructuredTensor):
        return "it is 2:4 already"
    if type(module) is not nn.Linear or type(weight) is not nn.Parameter or "forward" in vars(module):
        return "it is not a plain linear layer"
    if weight.device.type != _DEVICE:
        return f"it is on {weight.device}"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(weight.dtype).removeprefix('torch.')} has no 2:4 kernel, float16 and bfloat16 have"
    if not is_2of4(weight):
        return "not 2:4"
    return None


def is_2of4(weight: torch.Tensor) -> bool:
    """Whether at most 2 of every 4 neighbours along the input dimension are not zero.

    Example:
        >>> is_2of4(torch.tensor([[1.0, 0.0, 0.0, 2.0]])), is_2of4(torch.tensor([[1.0, 3.0, 0.0, 2.0]]))
        (True, False)
    """
    pattern = get_pattern("2:4")
    if not isinstance(pattern, NOfM) or pattern.check(*weight.shape) is not None:
        return False
    nonzero = (weight.detach() != 0).view(-1, pattern.of).sum(1)
    return int(nonzero.max()) <= pattern.keep


@dataclass(frozen=True)
class _Measurement:
    """What was measured for layers of one shape: the speeds with the best algorithm, or why there is no kernel."""

    speeds: tuple[LayerSpeed, ...] = ()
    algorithm: int = 0
    refusal: str | None = None

    @property
    def least_speedup(self) -> float:
        return min((speed.speedup for speed in self.speeds), default=0.0)


@torch.no_grad()
def _measure(module: nn.Linear, tokens: Sequence[int], cuda_graphs: bool) -> _Measurement:
    """Times a layer with each algorithm that is a candidate."""
    weight, bias = module.weight.detach(), module.bias
    inputs = [torch.randn(count, weight.shape[1], device=weight.device, dtype=weight.dtype) for count in tokens]
    best = _Measurement()
    with torch.cuda.device_of(weight):
        dense = [_seconds(partial(linear, x, weight, bias), cuda_graphs) for x in inputs]
        try:
            for algorithm in _algorithms(_pack(weight, 0), inputs, bias):
                packed = _pack(weight, algorithm)
                sparse = [_seconds(partial(_product, x, packed, bias), cuda_graphs) for x in inputs]
                found = _Measurement(tuple(map(LayerSpeed, tokens, dense, sparse)), algorithm)
                best = max(best, found, key=lambda measurement: measurement.least_speedup)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if not best.speeds:
                return _Measurement(refusal="refused: " + " ".join(str(error).split())[:120])
    return best


def _pack(weight: torch.Tensor, algorithm: int) -> SparseSemiStructuredTensor:
    packed = to_sparse_semi_structured(weight)
    packed.alg_id_cusparselt = algorithm
    return packed


def _product(x_TI: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x·W^T + bias. With cuSPARSELt by the operator itself: it writes the result in the layout of a dense product, and
    takes less time to launch than the dispatch of torch's tensor subclass."""
    if weight.BACKEND != "cusparselt":
        return linear(x_TI, weight, bias)
    result = torch._cslt_sparse_mm(
        weight.packed, _padded(x_TI).t(), bias=bias, transpose_result=True, alg_id=weight.alg_id_cusparselt
    )
    return result[: len(x_TI)]


def _padded(x_TI: torch.Tensor) -> torch.Tensor:
    """Rows of zeros up to a multiple of 8, which the kernels need."""
    missing = -len(x_TI) % 8
    return nn.functional.pad(x_TI, (0, 0, 0, missing)) if missing else x_TI.contiguous()


def _algorithms(packed: Any, inputs: Sequence[torch.Tensor], bias: torch.Tensor | None) -> list[int]:
    """The default algorithm, and those that cuSPARSELt's search finds to be the fastest for each input."""
    if packed.BACKEND != "cusparselt":
        return [0]
    search = partial(torch._cslt_sparse_mm_search, packed.packed, bias=bias, transpose_result=True)
    return list(dict.fromkeys([0, *(search(_padded(x).t()) for x in inputs)]))


def _seconds(work: Callable[[], object], cuda_graphs: bool) -> float:
    """The median time of one call, by the clock of the device."""
    work()  # loads kernels and chooses algorithms
    run = work
    if cuda_graphs:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                work()
        run = graph.replay
        run()
    times = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(1 if cuda_graphs else _CALLS):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _CALLS)
    return statistics.median(times)


def _swap(module: nn.Linear, algorithm: int) -> None:
    """Changes the layer itself, so that its name, its hooks and its bias stay."""
    module.weight = nn.Parameter(_pack(module.weight.detach(), algorithm), requires_grad=False)
    module.__class__ = SemiStructuredLinear
