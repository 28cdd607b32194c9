"""Rewinding: two plain trainings, the learning rate, resuming, state files, and what is refused."""

import shutil

import pytest
import torch
from helpers.tiny import SCHEDULE, STEPS, arguments, bert, content, make, same, samples, weights
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import Trainer, TrainerCallback

from hf_sparse import CheckpointError, PruningConfig, PruningConfigError, SparseTrainerMixin, SparsityCallback
from hf_sparse.files import STATE_FILE
from hf_sparse.training.rewinding import replayed_step


END = SCHEDULE["prune_end"]
REWOUND = {"target_sparsity": 0.5, "criterion": "magnitude", "max_steps": 16, "rewind": 2, **SCHEDULE}


class Recorder(TrainerCallback):
    """Keeps the weights, the learning rate and the state of the optimizer at each step."""

    def __init__(self):
        self.weights, self.rates, self.batches = {}, {}, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates[state.global_step + 1] = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)


def run(folder, seed=0, resume=None, **options):
    recorder = Recorder()
    trainer = make(folder, model=quiet_bert(seed), callbacks=[recorder], **REWOUND | options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def quiet_bert(seed=0):
    """Without dropout, whose random numbers would change the order of the data."""
    return bert(seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def linear(step, total):
    return max(0.0, (total - step) / total)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_it_is_two_plain_trainings_bit_for_bit(tmp_path, optim):
    """The second one: the weights of step 2 with the final mask, a new optimizer, the learning rates from step 2 on
    in the eight steps that remain, and the data of those steps."""
    options = {"optim": optim, "optim_args": "momentum=0.9"} if optim == "sgd" else {"optim": optim}
    trainer, recorder = run(tmp_path / "rewound", **options)
    plain, until = run(tmp_path / "plain", rewind=None, **options)
    assert all(same(recorder.weights[step], until.weights[step]) for step in range(END))
    masks = trainer.sparsity_callback.pruner.masks
    start = until.weights[2]
    masks.enforce(start)
    assert same(recorder.weights[END], start)
    rates = [5e-3 * linear(replayed_step(step, trainer.sparsity_callback.schedule, 16), 16) for step in range(17)]
    assert [recorder.rates[step + 1] for step in range(16)] == rates[:16]

    class Second(Trainer):
        """Trains the last steps: the batches of the first are skipped."""

        def create_scheduler(self, num_training_steps, optimizer=None):
            scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rates[END + step] / 5e-3)
            self.lr_scheduler = scheduler
            return scheduler

        def get_train_dataloader(self):
            return self.accelerator.prepare(batches)

    class Zeros(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            masks.enforce(dict(model.named_parameters()))

    batches = seen_batches(tmp_path / "data")[END:]
    batches = torch.utils.data.DataLoader(batches, batch_size=None)
    model = quiet_bert()
    model.load_state_dict(start)
    args = arguments(tmp_path / "second", max_steps=16 - END, **options)
    second = Second(model, args, train_dataset=samples(), callbacks=[Zeros()])
    second.train()
    assert same(weights(model), recorder.weights[16])


def seen_batches(folder):
    """The batches of a run, which depend on the seed alone."""

    class Seen(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    batches = []
    Seen(quiet_bert(), arguments(folder, max_steps=16), train_dataset=samples()).train()
    return batches


@pytest.mark.parametrize("options, what", [({}, "weights and learning rate"), ({"rewind_weights": False}, "learning")])
def test_cards_say_it(tmp_path, options, what):
    trainer, _ = run(tmp_path, rewind=0.25, **options)
    trainer.save_model()
    trainer.create_model_card()
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert f"Rewound after the last prune step to the {what}" in text and "of optimizer step 4." in text


@pytest.mark.parametrize("rewind, kept", [(0, 0), (0.25, 4), (7, 7)])
def test_the_step_to_rewind_to(tmp_path, rewind, kept):
    trainer, recorder = run(tmp_path, rewind=rewind)
    masks = trainer.sparsity_callback.pruner.masks
    for name, value in recorder.weights[END].items():
        expected = recorder.weights[kept][name]
        assert torch.equal(value, expected * masks[name] if name in masks else expected)
    assert not same(recorder.weights[END], recorder.weights[END - 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt", "polynomial"])
def test_only_the_learning_rate_is_rewound(tmp_path, schedule):
    options = {"rewind_weights": False, "lr_scheduler_type": schedule, "warmup_steps": 3}
    trainer, recorder = run(tmp_path / "rewound", **options)
    _, plain = run(tmp_path / "plain", rewind=None, lr_scheduler_type=schedule, warmup_steps=3)
    assert all(same(recorder.weights[step], plain.weights[step]) for step in range(END + 1))
    replayed = [replayed_step(step, trainer.sparsity_callback.schedule, 16) for step in range(16)]
    assert replayed[END:] == [2, 4, 6, 7, 9, 11, 12, 14]
    assert list(recorder.rates.values()) == [plain.rates[step + 1] for step in replayed]
    assert all(value["step"] == 16 for value in trainer.optimizer.state.values())


@pytest.mark.parametrize("step", [2, 4, 8, 12])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, step):
    """From the step to rewind to, before the last prune step, right after it, and later."""
    options = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = run(tmp_path / "whole", **options)
    folder = tmp_path / "resumed" / f"checkpoint-{step}"
    shutil.copytree(tmp_path / "whole" / folder.name, folder)
    resumed, _ = run(tmp_path / "resumed", seed=5, resume=str(folder), **options)
    assert same(weights(resumed.model), weights(whole.model))
    for name in ("checkpoint-14", "checkpoint-16"):
        assert content(tmp_path / "whole" / name) == content(tmp_path / "resumed" / name)


def test_weights_are_in_the_state_files_while_they_are_needed(tmp_path):
    trainer, recorder = run(tmp_path, save_strategy="steps", save_steps=1)
    for step in (1, 2, 7, 8, 16):
        tensors = load_file(tmp_path / f"checkpoint-{step}" / STATE_FILE)
        kept = {key.removeprefix("rewind/"): value for key, value in tensors.items() if key.startswith("rewind/")}
        trained = {name: recorder.weights[2][name] for name, _ in trainer.model.named_parameters()}
        assert same(kept, trained if 2 <= step < END else {})


def test_frozen_parameters_are_not_kept(tmp_path):
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    trainer = make(tmp_path, model=model, **REWOUND, save_strategy="steps", save_steps=4)
    trainer.train()
    kept = {key for key in load_file(tmp_path / "checkpoint-4" / STATE_FILE) if key.startswith("rewind/")}
    assert kept == {f"rewind/{name}" for name, value in model.named_parameters() if value.requires_grad}


def test_resuming_with_another_rewinding_is_refused(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=4)
    for options, text in (
        ({"rewind": 3}, r"`rewind` \(steps\): 2 -> 3"),
        ({"rewind": None}, r"`rewind` \(steps\): 2 -> None"),
        ({"rewind_weights": False}, "`rewind_weights`: True -> False"),
    ):
        with pytest.raises(CheckpointError, match=text):
            run(tmp_path, resume=str(tmp_path / "checkpoint-4"), **options)


def test_a_second_training_rewinds_again(tmp_path):
    trainer, recorder = run(tmp_path)
    trainer.train()
    assert list(recorder.rates) == list(range(1, 17))
    assert trainer.sparsity_callback.pruner.sparsity() == 0.5


@pytest.mark.parametrize(
    "options, text",
    [
        ({"rewind": 0.7}, "`rewind` is 0.7, not before `prune_end`, 0.7"),
        ({"rewind": 9, "prune_end": 8}, "`rewind` is 9, not before `prune_end`, 8"),
        ({"rewind": -1}, "`rewind` is -1: it must be a whole number of steps, or a fraction"),
        ({"rewind": 2.5}, "`rewind` is 2.5"),
        ({"rewind_weights": False}, "`rewind_weights` needs `rewind`"),
        ({"rewind": 0.1, "target_sparsity": None}, "but nothing is pruned: give `target_sparsity`"),
        ({"rewind": "soon"}, "`rewind` is 'soon': it must be a number"),
    ],
)
def test_options_that_are_refused(options, text):
    with pytest.raises(PruningConfigError, match=text):
        PruningConfig(**{"target_sparsity": 0.5} | options)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"prune_end": 12, "max_steps": 20, "rewind": 0.7}, "`rewind` is step 14 and `prune_end` is step 12"),
        ({"prune_end": 20, "max_steps": 20, "rewind": 2}, "which is the last step: lower `prune_end`"),
    ],
)
def test_steps_that_do_not_fit_are_refused_before_training(tmp_path, options, text):
    trainer = make(tmp_path, target_sparsity=0.5, **options)
    with pytest.raises(ValueError, match=text):
        trainer.train()
    assert trainer.state.global_step == 0


def test_learning_rates_that_are_no_function_of_the_step_are_refused(tmp_path):
    for name in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(PruningConfigError, match=f'lr_scheduler_type="{name}" depends on metrics'):
            make(tmp_path, lr_scheduler_type=name, eval_strategy="steps", **REWOUND)
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    given = {"optimizers": (optimizer, CosineAnnealingLR(optimizer, 10))}
    with pytest.raises(PruningConfigError, match="CosineAnnealingLR that the trainer was given"):
        make(tmp_path, model=model, trainer_options=given, **REWOUND)


def test_a_scheduler_of_a_subclass_is_refused_by_name(tmp_path):
    class Own(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = CosineAnnealingLR(self.optimizer, num_training_steps)
            return self.lr_scheduler

    trainer = make(tmp_path, type("Mixed", (SparseTrainerMixin, Own), {}), **REWOUND)
    with pytest.raises(PruningConfigError, match="CosineAnnealingLR is no LambdaLR"):
        trainer.train()


def test_a_stock_trainer_is_refused(tmp_path):
    config = PruningConfig(**{name: value for name, value in REWOUND.items() if name != "max_steps"})
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=samples(), callbacks=[SparsityCallback(config)])
    with pytest.raises(ValueError, match="`rewind` needs SparseTrainer"):
        trainer.train()


def test_nothing_to_rewind_is_bitwise_the_run_without(tmp_path):
    found = [weights(run(tmp_path, rewind=None, rewind_weights=value)[0].model) for value in (None, True)]
    assert same(*found) and STEPS == 10
