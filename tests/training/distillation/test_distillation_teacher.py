"""Which teachers fit, what is refused before training, and what the teacher is not part of."""

import json

import pytest
import torch
from helpers.distillation import TASKS, collate
from helpers.tiny import arguments, bert, figures, make, same, samples, weights
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
)

from hf_sparse import PruningConfig, PruningConfigError, SparseTrainer, SparseTrainingArguments, SparsityCallback
from hf_sparse.training.distillation.teacher import TeacherError


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher"
    bert(seed=5).save_pretrained(path)
    return str(path)


def distilled(tmp_path, teacher, model=None, **options):
    return make(tmp_path / "out", model=model, distill_teacher=str(teacher), **options)


def test_the_teacher_is_frozen_and_in_no_file_and_not_in_evaluation(tmp_path, teacher):
    trainer = distilled(
        tmp_path, teacher, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=5, max_steps=5
    )
    calls, before = [], bert(seed=5).state_dict()
    trainer.train()  # loads it
    trainer.teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert calls == [False] * 5
    assert same(weights(trainer.teacher), before) and not trainer.teacher.training
    assert not any(value.requires_grad or value.grad is not None for value in trainer.teacher.parameters())
    assert trainer.teacher not in list(trainer.model.modules())
    trainer.evaluate()
    assert len(calls) == 5
    model_files = [path for path in (tmp_path / "out").rglob("*.safetensors") if path.name == "model.safetensors"]
    assert model_files and not list((tmp_path / "out").rglob("*teacher*"))
    config = json.loads((tmp_path / "out" / "checkpoint-5" / "config.json").read_text())
    assert not config.get("output_hidden_states")


def test_without_a_teacher_training_is_that_of_trainer(tmp_path):
    runs = [(Trainer, {}), (SparseTrainer, {}), (SparseTrainer, {"target_sparsity": 0.0})]
    trained = []
    for cls, options in runs:
        trainer = make(tmp_path, cls, model=bert(), **options)
        trainer.train()
        trained.append((weights(trainer.model), figures(trainer.state.log_history)))
    for found, logs in trained[1:]:
        assert same(found, trained[0][0])
        losses = [[log.get("loss") for log in history] for history in (logs, trained[0][1])]
        assert losses[0] == losses[1] and not any("loss_task" in log for log in logs)


def test_self_is_a_copy_of_the_dense_weights(tmp_path):
    trainer, before = distilled(tmp_path, "self", target_sparsity=0.5, distill_hidden=1.0), bert().state_dict()
    trainer.train()
    assert same(weights(trainer.teacher), before) and not same(weights(trainer.model), before)
    first = trainer.state.log_history[0]
    assert first["loss_hidden"] < 0.5 and trainer.sparsity_callback.pruner.sparsity() == 0.5
    trainer.train()  # from pruned weights, with the same teacher
    assert same(weights(trainer.teacher), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_teacher_may_be_in_half_precision(tmp_path, teacher, dtype):
    for name in (teacher, "self"):
        trainer = distilled(tmp_path, name, distill_teacher_dtype=dtype, distill_hidden=1.0, max_steps=2)
        trainer.train()
        assert {value.dtype for value in trainer.teacher.parameters()} == {getattr(torch, dtype)}
        assert trainer.state.log_history[0]["loss_distill"] < 1e-2


def test_a_compiled_student(tmp_path, teacher):
    options = {"distill_hidden": 1.0, "max_steps": 3, "hidden_dropout_prob": 0.0}
    logs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        given = {name: value for name, value in options.items() if "dropout" not in name}
        trainer = distilled(tmp_path, teacher, model=model, **given, **compiled)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_a_student_with_adapters_learns_from_its_base(tmp_path, teacher):
    peft = pytest.importorskip("peft")
    for name in (teacher, "self"):
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        trainer = distilled(tmp_path, name, model=peft.get_peft_model(bert(), config), distill_hidden=1.0, max_steps=3)
        trainer.train()
        assert type(trainer.teacher) is BertForSequenceClassification
        if name == "self":
            assert same(weights(trainer.teacher), bert().state_dict())


def test_a_teacher_of_another_architecture(tmp_path):
    """Without the inputs that it does not take."""
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=40, dim=24, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=16)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "distil")
    data = [{**row, "token_type_ids": [0] * 8} for row in samples()]
    options = {"train_dataset": data, "eval_dataset": data}
    trainer = distilled(tmp_path, tmp_path / "distil", trainer_options=options, distill_hidden=1.0, max_steps=2)
    trainer.train()
    assert type(trainer.teacher) is DistilBertForSequenceClassification


class Linear(nn.Module):
    """A model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.layer(input_ids.float())
        return {"loss": nn.functional.cross_entropy(logits, labels) if labels is not None else None, "logits": logits}


def test_other_models_have_a_teacher_by_an_override(tmp_path):
    class Mine(SparseTrainer):
        def load_teacher(self):
            return Linear()

    trainer = make(tmp_path, Mine, model=Linear(), distill_teacher="mine", max_steps=2)
    trainer.train()
    assert type(trainer.teacher) is Linear and "loss_distill" in trainer.state.log_history[0]
    with pytest.raises(TeacherError, match="Linear is not a model of transformers: override load_teacher"):
        make(tmp_path, model=Linear(), distill_teacher=str(tmp_path)).train()


def other(tmp_path, cls=BertForSequenceClassification, **config):
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 16}
    cls(BertConfig(**sizes | config)).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


REFUSED = {
    "vocabulary": ({"vocab_size": 41}, {}, "vocabulary of 41 tokens, but that of the model has 40"),
    "labels": ({"num_labels": 3}, {}, "with 3 labels, but the model has 2"),
    "order": (
        {"id2label": {0: "POS", 1: "NEG"}, "label2id": {"POS": 0, "NEG": 1}},
        {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}},
        r"numbers the labels otherwise than the model \(pos is 0, neg is 1\)",
    ),
    "problem": (
        {"problem_type": "multi_label_classification"},
        {"problem_type": "single_label_classification"},
        "problem_type is multi_label_classification, but that of the model is single_label_classification",
    ),
    "hidden": ({"hidden_size": 32}, {}, "have size 32, those of the model 24"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_of_something_else_is_refused_before_training(tmp_path, case):
    changes, own, message = REFUSED[case]
    trainer = distilled(tmp_path, other(tmp_path, **changes), model=bert(**own), distill_hidden=1.0)
    before = weights(trainer.model)
    with pytest.raises(TeacherError, match=message):
        trainer.train()
    assert same(weights(trainer.model), before) and trainer.optimizer is None


def test_a_teacher_that_cannot_be_loaded_or_lacks_its_head_is_refused(tmp_path):
    with pytest.raises(TeacherError, match="no/such/folder, which cannot be loaded"):
        distilled(tmp_path, "no/such/folder").train()
    with pytest.raises(
        TeacherError, match=r'lack 2 weights of BertForSequenceClassification, such as "classifier.bias"'
    ):
        distilled(tmp_path, other(tmp_path, BertModel)).train()


class WithoutStates(nn.Module):
    """Gives logits only."""

    def __init__(self):
        super().__init__()
        self.bert = bert(seed=5)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.bert(input_ids, attention_mask).logits}


class TrainerWithOwnTeacher(SparseTrainer):
    def load_teacher(self):
        return WithoutStates()


def test_a_teacher_that_gives_no_hidden_states_is_refused(tmp_path):
    options = {"distill_teacher": "own", "max_steps": 2}
    make(tmp_path, TrainerWithOwnTeacher, model=bert(), **options).train()
    trainer = make(tmp_path, TrainerWithOwnTeacher, model=bert(), distill_hidden=1.0, **options)
    with pytest.raises(TeacherError, match=r"the forward of the teacher \(WithoutStates\) does not take"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_another_tokenizer_is_refused(tmp_path, teacher):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(35))]
    tokenizers = [
        BertTokenizer(vocab={word: number for number, word in enumerate(order)})
        for order in (words, [*words[:5], *reversed(words[5:])])
    ]
    tokenizers[0].save_pretrained(teacher)
    distilled(tmp_path, teacher, trainer_options={"processing_class": tokenizers[0]}, max_steps=1).train()
    trainer = distilled(tmp_path, teacher, trainer_options={"processing_class": tokenizers[1]})
    with pytest.raises(TeacherError, match="token 5 is 'w0' there, and 'w34' here"):
        trainer.train()


def test_a_stock_trainer_is_told(tmp_path, teacher, caplog):
    callback = SparsityCallback(PruningConfig(distill_teacher=teacher))
    with pytest.raises(ValueError, match="`distill_teacher` needs SparseTrainer"):
        make(tmp_path, Trainer, callbacks=[callback], cls=None).train()
    make(tmp_path, Trainer, distill_teacher=teacher, max_steps=1).train()
    assert "`distill_teacher` is set in the arguments, but this trainer runs no teacher" in caplog.text


def test_the_callback_gives_the_options(tmp_path, teacher):
    callback = SparsityCallback(PruningConfig(distill_teacher=teacher, target_sparsity=0.5))
    trainer = make(tmp_path, callbacks=[callback], max_steps=2)
    trainer.train()
    assert "loss_distill" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distill_alpha": 1.5}, "`distill_alpha` is 1.5: it must be a number from 0 to 1"),
        ({"distill_temperature": 0}, "`distill_temperature` is 0: it must be a number above 0"),
        ({"distill_hidden": -1}, "`distill_hidden` is -1: it must be 0"),
        ({"distill_teacher_dtype": "fp8"}, "`distill_teacher_dtype` is"),
        ({"distill_alpha": 0}, "`distill_alpha` and `distill_hidden` are 0"),
        ({"distill_alpha": "much"}, "`distill_alpha` is 'much': it must be a number"),
        ({"distill_teacher": None, "distill_hidden": 2.0}, "`distill_hidden` need a teacher"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(PruningConfigError) as error:
        PruningConfig(**{"distill_teacher": "dense"} | options)
    assert any(message in text for text in error.value.errors), error.value.errors


def test_options_are_of_the_run_and_in_recipes(tmp_path):
    (tmp_path / "recipe.yaml").write_text("distill_teacher: path/to/dense\ndistill_hidden: 1\n")
    config = PruningConfig.from_file(tmp_path / "recipe.yaml")
    assert config.distills and not config.prunes and config.distill_alpha == 0.9
    with pytest.raises(PruningConfigError, match="unknown option"):
        PruningConfig(groups={"all": {"targets": ["*"], "distill_alpha": 0.5}})
    args = SparseTrainingArguments("out", use_cpu=True, pruning_config=str(tmp_path / "recipe.yaml"))
    assert args.distill_teacher == "path/to/dense"


def test_the_card_names_the_teacher_and_no_path(tmp_path, teacher):
    trainer = distilled(tmp_path, teacher, target_sparsity=0.5, distill_hidden=1.0)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Distilled from teacher (alpha 0.9, temperature 2, hidden 1)." in text
    for name in ("README.md", "pruning_config.json", "pruning_card.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text(), name


def test_several_gpus_in_one_process_are_refused(tmp_path, teacher):
    trainer = distilled(tmp_path, teacher)
    trainer.args._n_gpu = 2
    with pytest.raises(TeacherError, match="needs one process for each GPU"):
        trainer.train()


def test_model_init_makes_no_copy(tmp_path):
    trainer = make(tmp_path, trainer_options={"model_init": lambda: bert()}, distill_teacher="self")
    with pytest.raises(TeacherError, match="model_init makes the model anew"):
        trainer.train()


def test_a_vocabulary_of_another_language_model(tmp_path):
    model = TASKS["causal"].model()
    model.resize_token_embeddings(44)
    model.save_pretrained(tmp_path / "larger")
    args = arguments(tmp_path, distill_teacher=str(tmp_path / "larger"), max_steps=1)
    trainer = SparseTrainer(TASKS["causal"].model(), args, train_dataset=TASKS["causal"].rows(), data_collator=collate)
    with pytest.raises(TeacherError, match="vocabulary of 44 tokens"):
        trainer.train()
