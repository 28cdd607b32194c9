"""The loss of a training step with a teacher, of every task, against its formula on the outputs of both models."""

import copy

import pytest
import torch
from helpers.distillation import LENGTHS, TASKS, collate
from helpers.tiny import arguments, bert
from torch.nn import functional
from transformers import BertForMultipleChoice, Seq2SeqTrainer, Trainer

from hf_sparse import SparseSeq2SeqTrainer, SparseSeq2SeqTrainingArguments, SparseTrainer, SparseTrainerMixin
from hf_sparse.training.distillation.logits import LogitsLoss


ALPHA, TEMPERATURE, HIDDEN = 0.7, 2.0, 0.5
OPTIONS = {"distill_alpha": ALPHA, "distill_temperature": TEMPERATURE, "distill_hidden": HIDDEN}


@pytest.fixture
def teachers(tmp_path_factory):
    """Folders of teachers with four layers, by task."""

    def folder(name):
        path = tmp_path_factory.mktemp(name)
        TASKS[name].model(seed=5, layers=4).save_pretrained(path)
        return str(path)

    return folder


def make(tmp_path, task, teacher, trainer=SparseTrainer, cls=None, trainer_options=None, mean=None, **options):
    """A trainer of one step over the four rows of a task. By `mean` the loss of the model is that of a batch."""
    model = TASKS[task].model()
    if mean is not None:
        model.accepts_loss_kwargs = not mean
    given = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
    given |= {"lr_scheduler_type": "constant", "remove_unused_columns": False, **OPTIONS, **options}
    args = arguments(tmp_path, cls, distill_teacher=teacher, **given)
    rows = TASKS[task].rows()
    return trainer(model, args, train_dataset=rows, data_collator=collate, **trainer_options or {})


def log_softmax(logits):
    return functional.log_softmax(logits / TEMPERATURE, dim=-1)


def kl(student, teacher):
    return TEMPERATURE**2 * (log_softmax(teacher).exp() * (log_softmax(teacher) - log_softmax(student))).sum(-1)


def expected_logits(task, student, teacher, batch):
    """The mean of each task, row by row and token by token, without anything of padding."""
    if task == "questions":
        parts = [
            kl(student[name][row, :length], teacher[name][row, :length])
            for name in ("start_logits", "end_logits")
            for row, length in enumerate(LENGTHS)
        ]
        return torch.stack(parts).mean()
    student, teacher, labels = student["logits"], teacher["logits"], batch["labels"]
    if task == "regression":
        return ((student - teacher) ** 2).mean()
    if task == "multi_label":
        probabilities, found = (teacher / TEMPERATURE).sigmoid(), (student / TEMPERATURE).sigmoid()
        entropy = -(probabilities * found.log() + (1 - probabilities) * (1 - found).log())
        return TEMPERATURE**2 * entropy.mean()
    if task == "causal":
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    losses = kl(student, teacher)
    return losses.mean() if task == "classification" else losses[labels != -100].mean()


def expected_hidden(task, student, teacher, batch):
    attention = batch["attention_mask"].bool()
    kinds = {"hidden_states": attention}
    if task == "seq2seq":
        kinds = {"encoder_hidden_states": attention, "decoder_hidden_states": batch["labels"] != -100}
    means = []
    for name, mask in kinds.items():
        ratios = [
            ((student[name][layer][row, kept] - teacher[name][2 * layer][row, kept]) ** 2).sum()
            / (teacher[name][2 * layer][row, kept] ** 2).sum()
            for layer in (1, 2)
            for row, kept in enumerate(mask)
        ]
        means.append(torch.stack(ratios).mean())
    return torch.stack(means).mean()


def gradients_of(trainer, loss):
    return dict(
        zip(
            dict(trainer.model.named_parameters()),
            torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True),
            strict=True,
        )
    )


def check_step(trainer, before, gradients):
    """Plain SGD of rate 1: the weights have changed by the gradient."""
    for name, value in trainer.model.named_parameters():
        gradient = gradients[name] if gradients[name] is not None else torch.zeros_like(value)
        torch.testing.assert_close(before[name] - value, gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [4, 1])
def test_a_step_of_every_task_is_that_of_the_formula(tmp_path, teachers, task, size):
    """In one batch of four rows, and in four of one row, whose numbers of tokens differ."""
    # The losses of BERT and T5 are of each part of a batch, also where Trainer takes them as shares of the whole.
    scaled_wrongly = size == 1 and task in ("tokens", "seq2seq")
    trainer = make(
        tmp_path,
        task,
        teachers(task),
        mean=task != "causal" and not scaled_wrongly,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=4 // size,
    )
    student, teacher = copy.deepcopy(trainer.model), TASKS[task].model(seed=5, layers=4).eval()
    batch = collate(TASKS[task].rows())
    trainer.model.train()
    outputs = trainer.model(**batch, output_hidden_states=True)
    with torch.no_grad():
        others = teacher(**batch, output_hidden_states=True)
    terms = {
        "loss_task": outputs["loss"],
        "loss_distill": expected_logits(task, outputs, others, batch),
        "loss_hidden": expected_hidden(task, outputs, others, batch),
    }
    if size == 1 and task == "questions":  # that loss is also of the places of padding
        losses = [trainer.model(**collate([row]))["loss"] for row in TASKS[task].rows()]
        terms["loss_task"] = torch.stack(losses).mean()
    weights = {"loss_task": 1 - ALPHA, "loss_distill": ALPHA, "loss_hidden": HIDDEN}
    loss = sum(weights[name] * term for name, term in terms.items())
    gradients = gradients_of(trainer, loss)
    trainer.train()
    log = trainer.state.log_history[0]
    for name, term in terms.items():
        if name != "loss_task" or not scaled_wrongly:
            assert log[name] == pytest.approx(term.item(), rel=1e-4), name
    if scaled_wrongly:
        return
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    check_step(trainer, dict(student.named_parameters()), gradients)


def test_the_padding_of_choices_does_not_count(tmp_path):
    def model(seed, layers):
        config = bert(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).config
        torch.manual_seed(seed)
        return BertForMultipleChoice(config)

    tokens, mask = torch.randint(3, 40, (2, 3, 8)), torch.ones(2, 3, 8, dtype=torch.long)
    for place, length in enumerate((3, 8, 5, 6, 2, 7)):
        mask[place // 3, place % 3, length:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    model(5, 4).save_pretrained(tmp_path / "teacher")
    given = {"max_steps": 1, "distill_teacher": str(tmp_path / "teacher"), "per_device_train_batch_size": 2}
    student, args = model(0, 2), arguments(tmp_path, remove_unused_columns=False, **OPTIONS, **given)
    with torch.no_grad():
        outputs, others = (each(**batch, output_hidden_states=True) for each in (student, model(5, 4).eval()))
    flat = {"attention_mask": mask.flatten(0, 1)}
    expected = expected_hidden("choices", outputs, others, flat).item()
    trainer = SparseTrainer(student, args, train_dataset=[{"row": 0}, {"row": 1}], data_collator=lambda rows: batch)
    trainer.train()
    assert trainer.state.log_history[0]["loss_hidden"] == pytest.approx(expected, rel=1e-4)


def test_checkpointed_activations_change_no_term(tmp_path, teachers):
    logs, calls = [], []
    for checkpointed in (False, True):
        options = {"gradient_checkpointing": checkpointed, "max_steps": 3, "learning_rate": 0.1}
        trainer = make(tmp_path, "causal", teachers("causal"), **options)
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, run=checkpointed: calls.append(run))
        trainer.train()
        logs.append([{name: log[name] for name in log if "loss" in name} for log in trainer.state.log_history[:3]])
    assert (calls.count(False), calls.count(True)) == (3, 6)  # each step computes them again
    assert len(logs[0][0]) == 4 and logs[0][0] != logs[0][2]
    assert all(found == pytest.approx(expected, rel=1e-5) for found, expected in zip(*logs, strict=True))


class Smoothed:
    """Loss functions of a user, whose loss a step with a teacher has as its task."""

    @staticmethod
    def summed(outputs, labels, num_items_in_batch=None):
        losses = functional.cross_entropy(
            outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return losses / num_items_in_batch


@pytest.mark.parametrize(
    "options, trainer_options",
    [({"label_smoothing_factor": 0.1}, {}), ({}, {"compute_loss_func": Smoothed.summed}), ({"bf16": True}, {})],
    ids=["label_smoothing", "compute_loss_func", "bf16"],
)
def test_the_task_has_the_loss_of_trainer_and_parts_of_a_batch_add_up(tmp_path, teachers, options, trainer_options):
    teacher, precision = teachers("causal"), 2e-2 if options.get("bf16") else 1e-4
    whole = {"per_device_train_batch_size": 4}
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    logs = []
    for sizes in (whole, parts):
        run = make(tmp_path, "causal", teacher, trainer_options=trainer_options, **options, **sizes)
        run.train()
        log = run.state.log_history[0]
        plain = arguments(tmp_path, max_steps=1, optim="sgd", remove_unused_columns=False, **options, **sizes)
        rows = TASKS["causal"].rows()
        trainer = Trainer(TASKS["causal"].model(), plain, train_dataset=rows, data_collator=collate, **trainer_options)
        trainer.train()
        # In transformers 5.6 Trainer's own smoothed loss grows with the number of parts.
        assert log["loss_task"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=precision)
        terms = [log[name] for name in ("loss_task", "loss_distill", "loss_hidden")]
        expected = sum(weight * term for weight, term in zip((1 - ALPHA, ALPHA, HIDDEN), terms, strict=True))
        assert log["loss"] == pytest.approx(expected, rel=1e-5)
        logs.append(log)
    for name in ("loss_distill", "loss_hidden"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=precision), name


def test_terms_are_logged_as_means_over_the_steps_of_an_interval(tmp_path, teachers):
    teacher = teachers("classification")
    options = {"max_steps": 6, "mean": True, "learning_rate": 0.1}
    every = make(tmp_path, "classification", teacher, **options, logging_steps=1)
    every.train()
    three = make(tmp_path, "classification", teacher, **options, logging_steps=3)
    three.train()
    logs = [[log for log in run.state.log_history if "loss_task" in log] for run in (every, three)]
    assert [len(part) for part in logs] == [6, 2]
    for name in ("loss", "loss_task", "loss_distill", "loss_hidden"):
        means = [sum(log[name] for log in logs[0][start : start + 3]) / 3 for start in (0, 3)]
        assert [log[name] for log in logs[1]] == [pytest.approx(mean, rel=1e-5) for mean in means]


class OutOfMemory(SparseTrainer):
    """A batch fails once after its terms were added, in the step that `fails_at` says."""

    fails_at: int | None = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == self.fails_at:
            self.fails_at = None
            raise RuntimeError("CUDA out of memory.")
        return loss


@pytest.mark.parametrize("fails_at", [0, 2])
def test_terms_of_an_attempt_that_ran_out_of_memory_are_not_logged(tmp_path, teachers, fails_at):
    options = {"max_steps": 4, "mean": True, "learning_rate": 0.0, "logging_steps": 4, "auto_find_batch_size": True}
    trainer = make(tmp_path, "classification", teachers("classification"), OutOfMemory, **options)
    trainer.fails_at, count = fails_at, len(trainer.callback_handler.callbacks)
    trainer.train()
    log = trainer.state.log_history[0]
    terms = [log[name] for name in ("loss_task", "loss_distill", "loss_hidden")]
    expected = sum(weight * term for weight, term in zip((1 - ALPHA, ALPHA, HIDDEN), terms, strict=True))
    assert trainer.fails_at is None and log["loss"] == pytest.approx(expected, rel=1e-5)
    assert len(trainer.callback_handler.callbacks) == count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_seq2seq_trainer_distills(tmp_path, teachers, smoothing):
    def with_decoder_inputs(rows):
        batch = collate(rows)
        model = TASKS["seq2seq"].model()
        return batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}

    trainer = make(
        tmp_path, "seq2seq", teachers("seq2seq"), SparseSeq2SeqTrainer, SparseSeq2SeqTrainingArguments,
        label_smoothing_factor=smoothing, max_steps=8, learning_rate=0.3,
    )  # fmt: skip
    assert isinstance(trainer, Seq2SeqTrainer)
    trainer.data_collator = with_decoder_inputs
    trainer.train()
    logs = [log["loss_distill"] for log in trainer.state.log_history if "loss_distill" in log]
    assert logs[-1] < 0.9 * logs[0]


class Doubling(Trainer):
    """A trainer of a user, with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def test_the_mixin_distills_over_the_loss_of_another_trainer(tmp_path, teachers):
    class Mixed(SparseTrainerMixin, Doubling): ...

    logs = []
    for cls in (SparseTrainer, Mixed):
        trainer = make(tmp_path, "classification", teachers("classification"), cls, mean=True)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[1]["loss_task"] == pytest.approx(2 * logs[0]["loss_task"])
    assert logs[1]["loss_distill"] == pytest.approx(logs[0]["loss_distill"])


def test_a_subclass_that_leaves_the_teacher_out_is_an_error(tmp_path, teachers):
    class Mine(SparseTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(**inputs)["loss"]

    trainer = make(tmp_path, "classification", teachers("classification"), Mine, mean=True)
    with pytest.raises(RuntimeError, match="compute_loss of Mine does not call that of its base class"):
        trainer.train()


def test_the_number_of_positions_that_a_mask_leaves_may_be_none():
    loss = LogitsLoss(1.0, shifts=True)
    batch = {"labels": torch.full((1, 3), -100)}
    logits = {"logits": torch.randn(1, 3, 5)}
    assert loss(logits, {"logits": torch.randn(1, 3, 5)}, batch).mean.item() == 0.0


def test_labels_that_are_of_no_token_are_an_error():
    logits = {"logits": torch.randn(1, 3, 5)}
    with pytest.raises(ValueError, match="distill_alpha=0"):
        LogitsLoss(1.0)(logits, logits, {"labels": torch.zeros(1, 2)})
