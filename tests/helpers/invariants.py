"""A callback that checks the pruning invariants at every event of a Trainer."""

import torch
from transformers import TrainerCallback

from hf_sparse import SparsityCallback

from .tiny import PRUNE_STEPS


TARGET = 0.5


def cubic(prune_step: int, total: int, target: float) -> float:
    return target * (1 - (1 - prune_step / total) ** 3)


def exactly_positive_zero(weight: torch.Tensor, kept: torch.Tensor) -> bool:
    bits = weight.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[weight.element_size()])
    return not bits[~kept].any()


class Spy(TrainerCallback):
    """Checks every event. `unit` is how many weights are pruned together. With `returns`, weights start again at 0."""

    def __init__(self, callback: SparsityCallback, unit: int = 1, target: float = TARGET, returns: bool = False):
        self.callback, self.unit, self.target, self.returns = callback, unit, target, returns
        self.pruned_at: dict[int, int] = {}
        self.events: set[str] = set()
        self.digest = None
        self.allowed_late: set[int] = set()

    def look(self, event, model) -> int:
        """All pruned weights are +0.0; returns how many there are."""
        self.events.add(event)
        pruner = self.callback.pruner
        parameters = dict(model.named_parameters())
        pruned = 0
        for name, mask in pruner.masks.items():
            assert parameters[name] is pruner.parameters[name]
            assert exactly_positive_zero(parameters[name], mask), (event, name)
            zeros = parameters[name].numel() - int(torch.count_nonzero(parameters[name]))
            assert zeros == pruner.masks.pruned(name) or self.returns, (event, name)
            pruned += pruner.masks.pruned(name)
        return pruned

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.total = len(PRUNE_STEPS)
        self.weights = sum(weight.numel() for weight in self.callback.pruner.parameters.values())
        self.start, self.pruned_at = self.look("begin", model), {}
        self.digest = self.callback.pruner.masks.digest()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        pruned, step = self.look("optimizer_step", model), state.global_step + 1
        self.digest = self.callback.pruner.masks.digest()
        if step in PRUNE_STEPS and step not in self.allowed_late:
            units = self.weights // self.unit
            ratio = cubic(PRUNE_STEPS.index(step) + 1, self.total, self.target)
            assert pruned == max(round(ratio * units) * self.unit, self.start), step
        else:
            assert pruned == self.pruned_at.get(step - 1, self.start), step
        self.pruned_at[step] = pruned

    def _unchanged(self, event, model):
        if self.callback.pruner is None:
            return
        self.look(event, model)
        assert self.callback.pruner.masks.digest() == self.digest, event

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._unchanged("step_end", model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._unchanged("evaluate", model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._unchanged("save", model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        pruned = self.look("end", model)
        assert pruned == round(self.target * self.weights / self.unit) * self.unit
