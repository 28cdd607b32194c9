"""Blocks: the repeated parts of a model, found by its structure, and a walk over them that computes each block of each
batch once, however often the model around them is asked.

The model itself says what reaches a block: its own forward is run, with blocks that are done giving back what they
gave, and stops where it has gone far enough. So masks, positions, and whatever else a model hands to its blocks are
right without this package knowing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..sharding import input_device
from ..targets import Layer
from .activations import Activations
from .batches import call, on_device


class Stop(BaseException):
    """A forward has gone far enough. No code of a model catches it."""


@dataclass(frozen=True)
class Stage:
    """What is pruned together, from what reaches it: the layers of a block, or those outside all blocks.

    Args:
        name: of the block, or of what stands for one.
        layers: those to prune; of a block that only passes on what it gets there are none.
        stack: the name of the list that the block is in; None outside blocks.
        until: the name of the block that is not to be entered any more, outside blocks; None if there is none.
    """

    name: str
    layers: tuple[Layer, ...]
    stack: str | None = None
    until: str | None = None


def find_stacks(model: nn.Module, layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Lists of modules that hold layers, the outermost ones, with the names of their members.

    Example:
        >>> from hf_sparse.targets import find_layers
        >>> model = nn.ModuleDict({"body": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)])})
        >>> find_stacks(model, find_layers(model))
        {'body': ['body.0', 'body.1']}
    """
    stacks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(is_within(name, outer) for outer in stacks):
            continue
        blocks = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        if any(is_within(layer.module, block) for layer in layers for block in blocks):
            stacks[name] = blocks
    return stacks


def is_within(name: str, outer: str) -> bool:
    """Whether a module is `outer` or in it.

    Example:
        >>> is_within("layers.10.mlp", "layers.10"), is_within("layers.10.mlp", "layers.1")
        (True, False)
    """
    return not outer or name == outer or name.startswith(outer + ".")


def by_block(model: nn.Module, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of each block, and those of none, together."""
    blocks = [block for stack in find_stacks(model, layers).values() for block in stack]
    parts: dict[str | None, list[Layer]] = {}
    for layer in layers:
        block = next((block for block in blocks if is_within(layer.module, block)), None)
        parts.setdefault(block, []).append(layer)
    return list(parts.values())


class Walk:
    """Runs a model over batches. Within `with walk:` the model is in evaluation mode, without gradients and cache.

    Args:
        model: any module.
        batches: what it is called with: keyword arguments in a mapping, positional ones in a tuple, or a tensor.
        place: where outputs of blocks are kept, see `Activations`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], place: str = "cpu"):
        self.model, self.batches, self._place = model, batches, place
        self._passed: dict[str, Activations] = {}
        self._done: dict[str, tuple[nn.Module, Any]] = {}
        self._now = 0
        self._taken: dict[str, Any] = {}
        self._used_up: str | None = None
        self._context: ExitStack | None = None

    def __enter__(self) -> Walk:
        self._context = ExitStack()
        self._context.enter_context(torch.no_grad())
        self._context.enter_context(inference_mode_of(self.model))
        self._context.callback(self._forget)
        return self

    def __exit__(self, *error) -> None:
        self._context.close()

    def _forget(self) -> None:
        """Blocks compute again."""
        for module, own in self._done.values():
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._done.clear()
        self._passed.clear()
        self._taken.clear()

    def forward(self, index: int) -> Any:
        """Run one batch until something raises `Stop`. Returns what the model gives, if nothing does."""
        self._now = index
        try:
            return call(self.model, on_device(self.batches[index], input_device(self.model)))
        except Stop:
            return None
        finally:
            self._taken.clear()

    def pass_on(self, stage: Stage, before: Callable[[int], None] = lambda index: None) -> None:
        """Run every batch through a block and keep what it gives; `before` is called with each batch's number first.
        From then on the block gives that without computing."""
        self._used_up = stage.stack  # what a block gives takes the place of what it got
        try:
            for index in range(len(self.batches)):
                before(index)
                self.keep(stage, index, self.output(stage.name, index))
        finally:
            self._used_up = None
        self.finish(stage)

    def output(self, block: str, index: int) -> Any:
        """What a block gives for one batch."""
        found = []

        def take(module, args, output):
            found.append(output)
            raise Stop

        handle = self.model.get_submodule(block).register_forward_hook(take)
        try:
            self.forward(index)
        finally:
            handle.remove()
        if not found:
            raise ValueError(f'a forward on calibration batch {index} does not reach the block "{block}".')
        return found[0]

    def keep(self, stage: Stage, index: int, output: Any) -> None:
        """Take `output` for what a block gives for a batch."""
        self._passed.setdefault(stage.stack, Activations(self._place))[index] = output

    def finish(self, stage: Stage) -> None:
        """From now on the block gives what is kept of its stack, without computing."""
        module = self.model.get_submodule(stage.name)
        self._done[stage.name] = module, module.__dict__.get("forward")
        module.forward = lambda *args, **kwargs: self._take(stage.stack)

    def _take(self, stack: str) -> Any:
        """What is kept of a stack for the batch that runs: brought once, however many of its blocks are done."""
        if stack not in self._taken:
            kept = self._passed[stack]
            self._taken[stack] = kept.pop(self._now) if stack == self._used_up else kept[self._now]
        return self._taken[stack]

    def __contains__(self, block: str) -> bool:
        """Whether a block gives what is kept."""
        return block in self._done

    def run_to(self, stage: Stage, before: Callable[[int], None] = lambda index: None) -> None:
        """Run every batch as far as a stage goes, and keep nothing."""
        with ExitStack() as handles:
            if stage.stack is not None:
                handle = self.model.get_submodule(stage.name).register_forward_hook(stop)
                handles.callback(handle.remove)
            elif stage.until is not None:
                handle = self.model.get_submodule(stage.until).register_forward_pre_hook(stop)
                handles.callback(handle.remove)
            for index in range(len(self.batches)):
                before(index)
                self.forward(index)


def stop(module, *arguments) -> None:
    """A hook that ends the forward."""
    raise Stop


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Within, dropout is off, nothing is cached, and experts are computed one by one, so that inputs are seen."""
    training = {module: module.training for module in model.modules()}
    configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "use_cache")]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    unique = {id(config): config for config in configs}.values()
    cached = [(config, config.use_cache) for config in unique if hasattr(config, "use_cache")]
    experts = _experts_implementation(model)
    try:
        model.eval()
        for config, _ in cached:
            config.use_cache = False
        if experts is not None:
            model.set_experts_implementation("eager")
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, value in cached:
            config.use_cache = value
        if experts is not None:
            model.set_experts_implementation(experts)


def _experts_implementation(model: nn.Module) -> str | dict | None:
    """How transformers computes the model's experts; None where it has none, or one way only."""
    has_experts = any(type(module).__name__.endswith("Experts") for module in model.modules())
    if not has_experts or not hasattr(model, "set_experts_implementation"):
        return None
    if hasattr(model, "get_experts_implementation"):
        return model.get_experts_implementation()
    return getattr(model.config, "_experts_implementation", None)
