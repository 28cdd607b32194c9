"""Observes the inputs of the layers of a subgraph, with one statistic for each distinct input.

Shapes: T tokens, I inputs of a weight, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..calibration.batches import mask_for_inputs
from ..criteria import Criterion
from ..model.layers import PrunableLayer
from ..statistics import GramMatrix, InputNorms, WeightedGram, WeightedInputs, WeightedMoments
from .pipeline import stop_forward
from .unit_scores import UnitReader


logger = logging.getLogger(__name__)

SAMPLE = 128
"""Tokens of each input that are kept to measure the error of the outputs."""

# The experts of transformers multiply by views of one parameter, not by calling a module.
_MATMULS: set[Callable] = {nn.functional.linear, torch.matmul, torch.mm, torch.bmm}
_MATMULS |= {getattr(torch.Tensor, name) for name in ("matmul", "__matmul__", "mm", "bmm")}


InputStatistic = InputNorms | GramMatrix | WeightedInputs


class InputObserver:
    """Accumulates the statistic of one input.

    Args:
        statistic: the sums over tokens.
        layers: the layers that read this input.
        expert: which matrix of a layer with several reads it; None for other layers.
        outputs: computes the outputs for inputs, for a statistic that is weighted by them.
    """

    def __init__(
        self,
        statistic: InputStatistic,
        layers: list[PrunableLayer],
        expert: int | None = None,
        outputs: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self._statistic: InputStatistic | None = statistic
        self.layers, self.expert, self._outputs = layers, expert, outputs
        self.sample: torch.Tensor | None = None
        """(T, I) the first tokens, float32."""

    @property
    def statistic(self) -> InputStatistic:
        """The sums over tokens, until they are released."""
        if self._statistic is None:
            raise RuntimeError(f'the statistic of the inputs of "{self.name}" has been released')
        return self._statistic

    def release_statistic(self) -> None:
        """Frees the memory of the statistic."""
        self._statistic = None

    def observe(self, x: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Adds the tokens of one call.

        Args:
            x: (..., I) the input.
            keep: (...) bool, False for padding; None if all tokens count.

        Raises:
            ValueError: a value is inf or nan, or shapes do not fit. Values on an accelerator are checked by `check`.
        """
        with self._named_errors():
            if isinstance(self.statistic, WeightedInputs) and self._outputs is not None:
                self.statistic.observe_outputs(x, self._outputs(x), keep)
            else:
                self.statistic.observe(x, keep)
        size = 0 if self.sample is None else len(self.sample)
        if self.sample is None or size < SAMPLE:
            tokens = x.detach().reshape(-1, x.shape[-1])
            tokens = tokens if keep is None else tokens[keep.reshape(-1).to(x.device)]
            new = tokens[: SAMPLE - size].float()
            self.sample = new.clone() if self.sample is None else torch.cat([self.sample, new])

    def check(self) -> None:
        """Checks the tokens of all calls.

        Raises:
            ValueError: a value is inf or nan.
        """
        with self._named_errors():
            self.statistic.check()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f'inputs of "{self.name}": {error}') from error

    @property
    def name(self) -> str:
        """The name of the first weight that reads this input."""
        return self.layers[0].name + ("" if self.expert is None else f"[{self.expert}]")


class InputObservers:
    """Observes the layers of a subgraph. A context manager: hooks are registered inside it.

    Args:
        model: the model that runs.
        layers: the layers to observe.
        shared_inputs: see `ModelTrace`.
        gram_layers: the layers that need a Gram matrix of their inputs; for the others norms suffice.
        last_module: the module at whose input the forward ends; None to let it run.
        unit_readers: the layers that read coupled units, by name and expert, with what computes their outputs: their
            statistics are weighted.
        on_input: called after each call of a layer, while the forward waits, with the observer and the error of its
            input, if there was one. For a forward that runs all batches as one.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunableLayer],
        shared_inputs: Mapping[str, str],
        gram_layers: Collection[PrunableLayer],
        last_module: str | None = None,
        on_input: Callable[[InputObserver, ValueError | None], None] | None = None,
        unit_readers: Mapping[tuple[str, int | None], UnitReader] | None = None,
    ):
        self._model, self._gram_layers, self._unit_readers = model, gram_layers, unit_readers or {}
        self._last_module, self._on_input = last_module, on_input
        self._readers: dict[str, list[PrunableLayer]] = {}
        """Module -> the layers that share its input."""
        self._experts = [layer for layer in layers if layer.expert_dim is not None]
        for layer in (layer for layer in layers if layer.expert_dim is None):
            # A statistic that is weighted by outputs is not shared.
            weighted = (layer.name, None) in self._unit_readers
            self._readers.setdefault(layer.module if weighted else shared_inputs[layer.module], []).append(layer)
        self._observers: dict[tuple[str, int | None], InputObserver] = {}
        self.token_masks: list[torch.Tensor] = []
        """Which tokens of the current batch count, see `token_masks` in calibration/batches.py."""

    def __enter__(self) -> InputObservers:
        self._handles = ExitStack()
        for name in self._readers:
            module = self._model.get_submodule(name)
            self._handles.enter_context(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        if self._experts:
            self._handles.enter_context(_MatmulMode(self))
        if self._last_module is not None:
            module = self._model.get_submodule(self._last_module)
            has_experts = self._last_module in {layer.module for layer in self._experts}
            register = module.register_forward_hook if has_experts else module.register_forward_pre_hook
            self._handles.enter_context(register(stop_forward))
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()

    def _hook(self, name: str) -> Callable:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._observe((name, None), self._readers[name], next(iter((*args, *kwargs.values()))))

        return observe

    def _observe(self, key: tuple[str, int | None], layers: list[PrunableLayer], x: torch.Tensor) -> None:
        if key not in self._observers:
            self._observers[key] = self._new_observer(layers, key[1], x.shape[-1], x.device)
        observer, error = self._observers[key], None
        try:
            observer.observe(x, mask_for_inputs(self.token_masks, x))
            if self._on_input is not None:
                observer.check()
        except ValueError as problem:
            if self._on_input is None:
                raise
            error = problem
        if self._on_input is not None:
            self._on_input(observer, error)

    def _new_observer(
        self, layers: list[PrunableLayer], expert: int | None, columns: int, device: torch.device
    ) -> InputObserver:
        has_gram = any(layer in self._gram_layers for layer in layers)
        reader = self._unit_readers.get((layers[0].name, expert))
        if reader is not None:
            weighted = WeightedGram(columns, device) if has_gram else WeightedMoments(columns, device)
            return InputObserver(weighted, layers, expert, reader.outputs(self._model))
        return InputObserver(GramMatrix(columns, device) if has_gram else InputNorms(columns, device), layers, expert)

    def observe_matmul(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Observes `x` if `weight` is a view of an expert's matrix, or of those of all experts."""
        storage = weight.untyped_storage().data_ptr()
        for layer in self._experts:
            parameter = self._model.get_parameter(layer.name)
            if storage != parameter.untyped_storage().data_ptr():
                continue
            first = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            if 0 <= first < layer.shape[0]:
                inputs = x if weight.ndim == 3 else [x]
                for expert, tokens in enumerate(inputs, start=first):
                    self._observe((layer.name, expert), [layer], tokens)
                return

    def in_order(self) -> list[InputObserver]:
        """Returns the observers of all inputs in an order that is the same on all ranks, whatever their data: experts
        that no token has reached have one as well.

        Raises:
            ValueError: an input holds inf or nan.
        """
        observers = [self._observers[name, None] for name in self._readers]
        for layer in self._experts:
            columns, device = layer.matrix_shape[2], self._model.get_parameter(layer.name).device
            for expert in range(layer.shape[0]):
                observer = self._observers.get((layer.name, expert))
                observers.append(observer or self._new_observer([layer], expert, columns, device))
        for observer in observers:
            observer.check()
        return observers


class _MatmulMode(TorchFunctionMode):
    """Shows the operands of matrix products to the observers."""

    def __init__(self, observers: InputObservers):
        super().__init__()
        self._observers = observers

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _MATMULS and len(args) > 1 and torch.is_tensor(args[1]):
            self._observers.observe_matmul(args[0], args[1])
        return func(*args, **(kwargs or {}))


def input_norms(layer: PrunableLayer, observers: Sequence[InputObserver]) -> torch.Tensor:
    """Returns the L2 norms of a layer's inputs over all tokens, of a shape that broadcasts to the weight's."""
    per_matrix = [observer.statistic.norms for observer in observers if layer in observer.layers]
    norms = torch.stack(per_matrix) if layer.expert_dim is not None else per_matrix[0]
    return norms.unsqueeze(layer.row_dim)


def criterion_statistic(
    criterion: Criterion, layer: PrunableLayer, weight: torch.Tensor, observers: Sequence[InputObserver]
) -> torch.Tensor:
    """Returns what a criterion that requires norms of inputs gets as the statistic of a layer, of a shape that
    broadcasts to the weight's."""
    norms = input_norms(layer, observers)
    by_matrix = zip(layer.matrices(weight), layer.matrices(norms.expand(layer.shape)), strict=True)
    prepared = [criterion.prepare_statistic(matrix[:, 0], norm[0, 0]) for matrix, norm in by_matrix]
    if prepared[0].ndim == 1:
        return torch.stack(prepared).view(norms.shape)
    statistic = torch.empty(layer.shape, device=weight.device)
    for matrix, values in zip(layer.matrices(statistic), prepared, strict=True):
        matrix[:, 0] = values
    return statistic


def fill_unreached(observers: Sequence[InputObserver], on_unreached: str) -> None:
    """Gives inputs that no token has reached equal norms, so that their weights are pruned by magnitude.

    The norms are as large as the mean of the layer's other experts, with which these weights may compete.

    Args:
        observers: all observers of a subgraph.
        on_unreached: "magnitude", or "error".

    Raises:
        ValueError: no token has reached an input, and `on_unreached` is "error".
    """
    unreached = [observer for observer in observers if not observer.statistic.count]
    if unreached and on_unreached == "error":
        raise ValueError(
            f"no token of the calibration data reaches {len(unreached)} of {len(observers)} inputs, such as that of "
            f'"{unreached[0].name}": give more data, set `on_unreached="magnitude"` to prune these by magnitude, or '
            f'leave the weight out, as with `exclude=["{unreached[0].layers[0].module}"]`.'
        )
    levels = [_mean_square_of_others(observer, observers) for observer in unreached]
    for observer, level in zip(unreached, levels, strict=True):
        logger.warning('no token reaches "%s": it is pruned by magnitude.', observer.name)
        observer.statistic.set_equal_squares(level)


def _mean_square_of_others(observer: InputObserver, observers: Sequence[InputObserver]) -> float:
    """The mean over the reached experts of the same layer of their inputs' sums of squares; 1 if there are none."""
    squares = [
        other.statistic.norms.square().mean()
        for other in observers
        if other.layers == observer.layers and other.statistic.count
    ]
    return float(torch.stack(squares).mean()) if squares else 1.0
