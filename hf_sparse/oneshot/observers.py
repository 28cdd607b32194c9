"""What reaches the weights of a stage: one sum for each distinct input, whatever number of weights it feeds.

Shapes: T tokens, I inputs of a weight, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..calibration.batches import mask_for_inputs
from ..model.layers import PrunableLayer
from ..statistics import GramMatrix, InputNorms
from .pipeline import stop


SAMPLE = 128
"""Tokens of each input that are set aside, to measure what pruning does to its outputs."""

# How the experts of transformers multiply: their weights are views of one parameter, and no module's own.
_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, torch.bmm}
_PRODUCTS |= {getattr(torch.Tensor, name) for name in ("matmul", "__matmul__", "mm", "bmm")}


@dataclass(eq=False)
class InputObserver:
    """One input: the sums over its tokens, and the matrices that it feeds."""

    stat: InputNorms | GramMatrix
    layers: list[PrunableLayer]
    expert: int | None = None
    """Which matrix of the layer, where there are several."""
    sample: torch.Tensor | None = None
    """(T, I) its first tokens, float32."""
    _aside: list[torch.Tensor] = field(default_factory=list)

    def observe(self, x: torch.Tensor, keep: torch.Tensor | None) -> None:
        try:
            self.stat.observe(x, keep)
        except ValueError as error:
            raise ValueError(f'inputs of "{self.name}": {error}') from error
        if self.sample is None or len(self.sample) < SAMPLE:
            tokens = x.detach().reshape(-1, x.shape[-1])
            tokens = tokens if keep is None else tokens[keep.reshape(-1).to(x.device)]
            known = 0 if self.sample is None else len(self.sample)
            new = tokens[: SAMPLE - known].float()
            self.sample = new.clone() if self.sample is None else torch.cat([self.sample, new])

    @property
    def name(self) -> str:
        """The first weight that it feeds."""
        expert = "" if self.expert is None else f"[{self.expert}]"
        return self.layers[0].name + expert


class InputObservers:
    """Observes the layers of a stage while `with feeds:` lasts.

    Args:
        model: that is run.
        layers: of the stage.
        leaders: see `ModelTrace`.
        gram: the names of layers whose whole Gram matrix is needed; of others the norms are.
        last: the module after whose input the forward may end; None if it must not.
        ready: called at once with each feed and what was wrong with its input, while the forward waits. For a forward
            of all batches as one.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunableLayer],
        leaders: Mapping[str, str],
        gram: set[str],
        last: str | None = None,
        ready: Callable[[InputObserver, Exception | None], None] | None = None,
    ):
        self._model, self._gram, self._last, self._ready = model, gram, last, ready
        self._fed: dict[str, list[PrunableLayer]] = {}
        self._experts = [layer for layer in layers if layer.expert_dim is not None]
        for layer in (layer for layer in layers if layer.expert_dim is None):
            self._fed.setdefault(leaders[layer.module], []).append(layer)
        self._observers: dict[tuple[str, int | None], InputObserver] = {}
        self.masks: list[torch.Tensor] = []
        """Which tokens of the batch that runs count, see `token_masks`."""

    def __enter__(self) -> InputObservers:
        self._handles = ExitStack()
        for name in self._fed:
            module = self._model.get_submodule(name)
            handle = module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            self._handles.callback(handle.remove)
        if self._experts:
            self._handles.enter_context(_Products(self))
        if self._last is not None:
            module = self._model.get_submodule(self._last)
            if self._last in {layer.module for layer in self._experts}:
                handle = module.register_forward_hook(stop)
            else:
                handle = module.register_forward_pre_hook(stop)
            self._handles.callback(handle.remove)
        return self

    def __exit__(self, *error) -> None:
        self._handles.close()

    def _hook(self, name: str) -> Callable:
        def called(module, args, kwargs):
            x = next(iter((*args, *kwargs.values())))
            self._observe((name, None), self._fed[name], x)

        return called

    def _observe(self, key: tuple[str, int | None], layers: list[PrunableLayer], x: torch.Tensor) -> None:
        observer = self._observers.get(key)
        if observer is None:
            needed = any(layer.name in self._gram for layer in layers)
            observer = self._observers[key] = InputObserver(
                (GramMatrix if needed else InputNorms)(x.shape[-1], x.device), layers, key[1]
            )
        try:
            observer.observe(x, mask_for_inputs(self.masks, x))
        except ValueError as error:
            if self._ready is None:
                raise
            self._ready(observer, error)
        else:
            if self._ready is not None:
                self._ready(observer, None)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """See whether `weight` is an expert's, or those of all, and `x` its input."""
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

    def all(self, device_of: Callable[[PrunableLayer], torch.device]) -> list[InputObserver]:
        """Every feed of the stage in an order that does not depend on the data, also of experts that no token reached:
        all processes have the same."""
        found = [self._observers[name, None] for name in self._fed]
        for layer in self._experts:
            columns = layer.matrix_shape[2]
            kind = GramMatrix if layer.name in self._gram else InputNorms
            for expert in range(layer.shape[0]):
                observer = self._observers.get((layer.name, expert))
                found.append(observer or InputObserver(kind(columns, device_of(layer)), [layer], expert))
        return found


class _Products(TorchFunctionMode):
    """Shows products of matrices to the feeds."""

    def __init__(self, observers: InputObservers):
        super().__init__()
        self._observers = observers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS and len(args) > 1 and torch.is_tensor(args[1]):
            self._observers.product(args[0], args[1])
        return func(*args, **(kwargs or {}))
