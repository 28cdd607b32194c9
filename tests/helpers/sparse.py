"""Tiny models that are pruned already, and runs that train few of their parameters."""

import torch
from transformers import TrainerCallback

from hf_sparse import Pruner, PruningConfig

from .invariants import exactly_positive_zero
from .tiny import bert, make


def pruned(model=None):
    """Half of the selected weights are zero, the smallest of each layer."""
    model = bert() if model is None else model
    config = PruningConfig(target_sparsity=0.5, criterion="magnitude", scope="layer")
    Pruner(model, config).update(1, 1)
    return model


def tuned(output_dir, model=None, **options):
    """A trainer of a pruned model that keeps its zeros."""
    return make(output_dir, model=pruned() if model is None else model, **{"keep_zeros": True} | options)


class KeptZeros(TrainerCallback):
    """After every event, what was zero at the start is +0.0, and no other selected weight is zero."""

    def __init__(self, model):
        config = PruningConfig(keep_zeros=True)
        self.masks = dict(Pruner(model, config).masks.items())
        self.events = 0

    def _check(self, model) -> None:
        self.events += 1
        parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            assert exactly_positive_zero(parameters[name], mask), name
            assert int(torch.count_nonzero(parameters[name])) == int(mask.sum()), name

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._check(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._check(model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._check(model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._check(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._check(model)
