"""A layer that loses (almost) all its weights is named in a warning, once, with a remedy that works."""

import logging
import re

import pytest
import torch
from torch import nn

from hf_sparse import OneshotConfig, Pruner, PruningConfig, prune_oneshot


LOGGER = "hf_sparse.engine.emptied_layers"


class Uneven(nn.Module):
    """Three layers, the first of which a global ranking empties first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.middle, self.large = (nn.Linear(8, 8, bias=False) for _ in range(3))
        with torch.no_grad():
            self.small.weight.mul_(1e-3)

    def forward(self, x):
        return self.large(self.middle(self.small(x)))


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def prune(**options):
    options = {"max_sparsity_per_layer": 1.0, **options}
    options = {"target_sparsity": 0.6, "criterion": "magnitude", "sparsity_decay_type": "linear", **options}
    pruner = Pruner(Uneven(), PruningConfig(**options))
    return [pruner.update(step, 4) for step in range(1, 5)][-1]


def test_each_layer_is_named_once_at_the_prune_step_that_empties_it(caplog):
    report = prune()
    (message,) = messages(caplog)
    assert message.startswith("after prune step 3 of 4, less than 0.1% of the weights remain in 1 layer: ")
    assert '"small.weight" (0 of 64)' in message and 'exclude=["small"]' in message
    assert report.to_dict()["emptied_layers"] == ["small.weight"]


def test_the_remedies_work(caplog):
    """As does the default, which is why the bound is 1 here."""
    assert not prune(max_sparsity_per_layer=None).emptied and not messages(caplog)
    prune()
    (message,) = messages(caplog)
    bound = float(re.search(r"max_sparsity_per_layer=([\d.]+)", message)[1])
    assert bound == 0.8 and 'scope="layer"' in message
    caplog.clear()
    remedies = [{"max_sparsity_per_layer": bound}, {"scope": "layer"}, {"exclude": ["small"]}]
    assert all(not prune(**remedy).emptied for remedy in remedies)
    assert not messages(caplog)


@pytest.mark.parametrize("options", [{"target_sparsity": 1.0}, {"target_sparsity": 0.0, "keep_zeros": True}], ids=str)
def test_what_was_asked_for_is_not_warned_of(caplog, options):
    model = Uneven()
    if options.get("keep_zeros"):
        nn.init.zeros_(model.small.weight)
    Pruner(model, PruningConfig(criterion="magnitude", **options)).update(1, 1)
    assert not messages(caplog)


def test_layers_that_were_empty_before_are_not_named(caplog):
    model = Uneven()
    nn.init.zeros_(model.small.weight)
    nn.init.constant_(model.middle.weight, 1e-3)
    config = PruningConfig(target_sparsity=0.7, criterion="magnitude", keep_zeros=True, max_sparsity_per_layer=1.0)
    Pruner(model, config).update(1, 1)
    assert "in 1 layer: " in messages(caplog)[0] and '"middle.weight"' in messages(caplog)[0]


def test_a_model_that_starts_sparse_and_given_scores_warn_too(caplog):
    config = PruningConfig(target_sparsity=0.5, algorithm="set", scope="global", max_sparsity_per_layer=1.0)
    pruner = Pruner(Uneven(), config)
    scores = {name: parameter.abs() for name, parameter in pruner.parameters.items()}
    pruner.select(1, 1, scores)
    assert "after prune step 1 of 1" in messages(caplog)[0]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_one_shot_pruning_warns_after_the_global_ranking(caplog, scope):
    caplog.set_level(logging.WARNING)
    config = OneshotConfig(target_sparsity=0.6, criterion="magnitude", scope=scope, max_sparsity_per_layer=1.0)
    report = prune_oneshot(Uneven(), None, config, progress=False)
    assert len(messages(caplog)) == len(report.emptied) == (scope == "global")
    assert not report.emptied or messages(caplog)[0].startswith("after the global ranking, ")


@pytest.mark.parametrize("target", [0.5, 0.87, 0.97])
def test_a_bound_below_one_leaves_each_layer_a_unit(target):
    """0.99 of 8 rows are 8 rows, rounded up; the target is met nevertheless, as long as there are rows enough."""
    config = PruningConfig(
        target_sparsity=target, pattern="channel", scope="global", criterion="magnitude", max_sparsity_per_layer=0.99
    )
    report = Pruner(Uneven(), config).update(1, 1)
    assert report.zeros == 8 * round(24 * target) and len(report.emptied) == (2 if target == 0.97 else 0)
