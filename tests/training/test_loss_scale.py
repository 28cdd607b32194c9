"""A loss that comes out some times too large changes no mask.

Trainer takes every model whose forward has **kwargs as one that divides its loss by the number of items of all
micro-batches. BERT's heads ignore that number: their gradients are multiplied by the number of micro-batches of each
update, and by the number of processes.
"""

import pytest
import torch
from helpers.mixed import Mixed
from helpers.tiny import SCHEDULE, arguments, bert, same, samples
from transformers import Trainer, TrainerCallback

from hf_sparse import Pruner, PruningConfig, Requires, SparseTrainer
from hf_sparse.criteria import CRITERIA


OF_GRADIENTS = [name for name in CRITERIA.names() if CRITERIA[name].requires & Requires.GRADIENTS]


def masks_of_a_run(factor, **options):
    """The masks after each of three prune steps, with gradients `factor` times what they are."""
    model = Mixed()
    pruner = Pruner(model, PruningConfig(target_sparsity=0.6, **options))
    found = []
    for step in range(9):
        model.fake_gradients(step)
        for parameter in model.parameters():
            parameter.grad *= factor
        assert pruner.observe()
        if step % 3 == 2:
            pruner.update(step // 3 + 1, 3)
            found.append({name: pruner.masks[name].clone() for name in pruner.parameters})
        with torch.no_grad():  # what an optimizer does to weights that are kept
            for parameter in model.parameters():
                parameter.mul_(1.125)
        pruner.enforce()
    return found


@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("criterion", OF_GRADIENTS)
def test_gradients_all_times_a_factor_give_the_same_masks(criterion, scope, pattern):
    """Powers of two, with which no number is rounded otherwise."""
    options = {"criterion": criterion, "scope": scope, "pattern": pattern}
    expected = masks_of_a_run(1.0, **options)
    assert not same(expected[0], expected[-1])
    for factor in (0.5, 2.0, 4.0):
        assert all(same(*pair) for pair in zip(expected, masks_of_a_run(factor, **options), strict=True))


def test_regrowth_is_the_same_too():
    options = {"criterion": "snip", "scope": "layer", "algorithm": "granet"}
    assert all(
        same(*pair) for pair in zip(masks_of_a_run(1.0, **options), masks_of_a_run(4.0, **options), strict=True)
    )


class Gradients(TrainerCallback):
    """Keeps those of every step."""

    def __init__(self):
        self.of_steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        self.of_steps.append(gradients)


def train(folder, accepts, count, trainer=SparseTrainer, **options):
    """Weights that stay as they are, so that gradients differ by the factor alone.

    Args:
        accepts: what `accepts_loss_kwargs` is; None where the model says nothing.
        count: of samples, in updates of 4 micro-batches of 4.
    """
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if accepts is not None:
        model.accepts_loss_kwargs = accepts
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "gradient_accumulation_steps": 4}
    seen = Gradients()
    run = trainer(model, arguments(folder, **still | options), train_dataset=samples(count), callbacks=[seen])
    run.train()
    return run, seen.of_steps


@pytest.mark.parametrize("criterion", OF_GRADIENTS)
def test_whether_the_loss_is_right_or_four_times_too_large_masks_are_the_same(tmp_path, criterion):
    options = {"target_sparsity": 0.5, "criterion": criterion, **SCHEDULE}
    (large, _), (right, _) = (train(tmp_path, accepts, 48, **options) for accepts in (None, False))
    assert large.model_accepts_loss_kwargs and not right.model_accepts_loss_kwargs
    masks = [
        {name: run.sparsity_callback.pruner.masks[name] for name in run.sparsity_callback.pruner.parameters}
        for run in (large, right)
    ]
    assert same(*masks) and large.sparsity_callback.pruner.sparsity() == 0.5


@pytest.mark.parametrize("count, factors", [(48, [4, 4, 4]), (40, [4, 4, 2])])
def test_the_factor_is_the_number_of_micro_batches_and_so_not_constant(tmp_path, count, factors):
    """What the README says: the last update of an epoch has fewer, where they do not divide."""
    options = {"max_steps": 6, "trainer": Trainer}
    (_, large), (_, right) = (train(tmp_path, accepts, count, **options) for accepts in (None, False))
    for factor, scaled, gradients in zip(factors * 2, large, right, strict=True):
        assert same(scaled, {name: gradient * factor for name, gradient in gradients.items()})


def test_clipping_takes_the_factor_away_at_some_steps_and_not_at_others(tmp_path):
    """What the README says: criteria see clipped gradients."""
    options = {"max_steps": 4, "trainer": Trainer}
    _, unclipped = train(tmp_path, False, 48, **options)
    norms = [torch.cat([gradient.flatten() for gradient in step.values()]).norm().item() for step in unclipped]
    limit = {"max_grad_norm": 4 * (min(norms) + max(norms)) / 2}
    (_, large), (_, right) = (train(tmp_path, accepts, 48, **options, **limit) for accepts in (None, False))
    name = "bert.encoder.layer.0.output.dense.weight"
    factors = [(scaled[name].norm() / gradients[name].norm()).item() for scaled, gradients in zip(large, right)]
    assert min(factors) < 3.99 and max(factors) == pytest.approx(4)
