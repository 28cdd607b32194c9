"""Options of pruning that are set after the trainer was made, or that no callback reads."""

import logging

import pytest
from helpers.tiny import SCHEDULE, arguments, bert, make, same, samples, weights, zeros
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_sparse import (
    PruningConfig,
    PruningConfigError,
    SparseTrainer,
    SparseTrainerMixin,
    SparseTrainingArguments,
    SparsityCallback,
)


OPTIONS = {"criterion": "magnitude", **SCHEDULE}


class Mixed(SparseTrainerMixin, Trainer):
    pass


def undecided(folder, trainer=SparseTrainer, callbacks=None, **kwargs):
    """A trainer whose arguments prune nothing yet."""
    args = arguments(folder, SparseTrainingArguments, **OPTIONS)
    if "model_init" not in kwargs:
        kwargs["model"] = bert()
    return trainer(args=args, train_dataset=samples(), eval_dataset=samples()[:8], callbacks=callbacks, **kwargs)


@pytest.mark.parametrize("trainer", [SparseTrainer, Mixed, "callback", "added callback"])
def test_a_target_that_is_set_later_is_reached_as_if_it_had_been_given(tmp_path, trainer):
    expected = make(tmp_path / "given", target_sparsity=0.5, save_strategy="steps", save_steps=5, **OPTIONS)
    expected.train()
    if isinstance(trainer, str):
        run = undecided(tmp_path / "late", Trainer, [SparsityCallback] if trainer == "callback" else None)
        if trainer == "added callback":
            run.add_callback(SparsityCallback())
    else:
        run = undecided(tmp_path / "late", trainer)
    run.args.target_sparsity = 0.5
    run.args.save_strategy, run.args.save_steps = "steps", 5
    run.train()
    assert zeros(run.model) == 2112
    assert same(weights(run.model), weights(expected.model))
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in tmp_path.iterdir()]
    assert files[0] == files[1]


def test_arguments_that_replace_others_are_read(tmp_path):
    sparse = arguments(tmp_path, target_sparsity=0.5, **OPTIONS)
    plain = make(tmp_path, Mixed)
    plain.args = sparse
    plain.train()
    assert zeros(plain.model) == 2112


class Trial(dict):
    """A trial of optuna, as far as Trainer needs it, without that library."""

    number = 0

    @property
    def params(self):
        return dict(self)


@pytest.mark.parametrize("trainer, callbacks", [(SparseTrainer, None), (Trainer, [SparsityCallback])])
def test_each_trial_of_a_search_prunes_by_its_own_target(tmp_path, monkeypatch, trainer, callbacks):
    """Trainer sets the values of a trial once `train` has begun, on arguments that had none."""
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    run = undecided(tmp_path, trainer, callbacks, model_init=lambda: bert())
    run.hp_search_backend, run.hp_name = HPSearchBackend.OPTUNA, None
    run.hp_space = lambda trial: trial.params
    for target, pruned in [(0.5, 2112), (0.25, 1056), (0.0, 0), (0.75, 3168)]:
        run.train(trial=Trial(target_sparsity=target))
        assert zeros(run.model) == pruned


def test_a_late_value_is_checked_before_training(tmp_path):
    run = undecided(tmp_path)
    for name, value, text in [
        ("target_sparsity", 1.5, "`target_sparsity` is 1.5"),
        ("targets", ["nonsense"], '"nonsense" matches none'),
        ("pruning_config", "recipe.yaml", "`pruning_config` is 'recipe.yaml', but was set after"),
    ]:
        run = undecided(tmp_path)
        run.args.target_sparsity = 0.5
        setattr(run.args, name, value)
        with pytest.raises(PruningConfigError, match=text):
            run.train()
        assert run.state.global_step == 0 and zeros(run.model) == 0


def test_a_late_target_beside_a_callback_with_a_config_is_refused(tmp_path):
    for trainer in (Trainer, SparseTrainer):
        run = undecided(tmp_path, trainer, [SparsityCallback(PruningConfig(target_sparsity=0.5))])
        run.args.target_sparsity = 0.7
        with pytest.raises(ValueError, match="given twice"):
            run.train()


def test_a_callback_that_is_added_later_takes_the_place_of_arguments_without_a_target(tmp_path):
    run, callback = undecided(tmp_path), SparsityCallback(PruningConfig(target_sparsity=0.5, **OPTIONS))
    run.add_callback(callback)
    run.train()
    assert run.sparsity_callback is callback and not callback.owns_saving
    assert zeros(run.model) == 2112
    run.remove_callback(callback)
    run.add_callback(SparsityCallback(PruningConfig(target_sparsity=0.75, **OPTIONS)))
    run.train()
    assert zeros(run.model) == 3168


# Nobody reads the arguments


WARNING = "target_sparsity=0.5 is set in the arguments, but"


@pytest.mark.parametrize("late", [False, True])
def test_a_stock_trainer_without_the_callback_says_that_it_does_not_prune(tmp_path, caplog, late):
    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            assert WARNING in caplog.text and "SparseTrainer" in caplog.text

    args = arguments(tmp_path, SparseTrainingArguments, target_sparsity=None if late else 0.5, max_steps=1)
    run = Trainer(bert(), args, train_dataset=samples(), callbacks=[Begin])
    assert WARNING not in caplog.text
    args.target_sparsity = 0.5
    run.train()
    assert caplog.text.count(WARNING) == 1
    assert zeros(run.model) == 0


@pytest.mark.parametrize(
    "trainer, callbacks, target",
    [(SparseTrainer, None, 0.5), (Trainer, [SparsityCallback], 0.5), (Trainer, None, 0.0)],
)
def test_trainers_that_read_the_arguments_or_have_nothing_to_prune_say_nothing(
    tmp_path, caplog, trainer, callbacks, target
):
    args = arguments(tmp_path, SparseTrainingArguments, target_sparsity=target, max_steps=2)
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        trainer(bert(), args, train_dataset=samples(), callbacks=callbacks).train()
    assert "in the arguments" not in caplog.text
