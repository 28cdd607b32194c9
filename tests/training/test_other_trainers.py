"""SparsityCallback in the trainers of other libraries, alone and with the mixin, and under torch.compile.

Each library is optional: without it, its tests are skipped.
"""

import shutil

import pytest
import torch
from datasets import Dataset
from helpers.invariants import Spy, exactly_positive_zero
from helpers.sft import SFT, WORDS
from helpers.tiny import PRUNE_STEPS, SCHEDULE, STEPS, arguments, content, make, same, weights
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    Trainer,
)

from hf_sparse import PruningConfig, SparseTrainerMixin, SparsityCallback


PRUNING = {"target_sparsity": 0.5, **SCHEDULE}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def mixed(base: type) -> type:
    """The class that a user writes."""

    class Mixed(SparseTrainerMixin, base): ...

    return Mixed


class Sentences:
    """SentenceTransformerTrainer on a BERT of one layer. The loss does not reach its pooler, which is not selected:
    the mean over tokens is taken."""

    body = [f"0.model.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value")]
    body += [f"0.model.encoder.layer.0.{name}.dense.weight" for name in ("attention.output", "intermediate", "output")]
    prefix = "0.model."

    def __init__(self, tmp_path):
        self.library = pytest.importorskip("sentence_transformers")
        self.trainer = self.library.SentenceTransformerTrainer
        self.arguments = self.library.SentenceTransformerTrainingArguments
        self.reopen = self.library.SentenceTransformer
        self.files = str(tmp_path / "bert")
        sizes = {"vocab_size": len(WORDS), "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        BertModel(BertConfig(**sizes, intermediate_size=40, max_position_embeddings=16)).save_pretrained(self.files)
        BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(self.files)

    def model(self, seed=0):
        model = self.library.SentenceTransformer(self.files, device="cpu")
        if seed:
            torch.manual_seed(seed)
            for weight in model.parameters():
                weight.data.normal_(std=0.02)
        return model

    def make(self, folder, callbacks, trainer=None, model=None, **options):
        pairs = [{"a": f"w{row} w{row + 1}", "b": f"w{row + 2} w{row}", "score": row % 3 / 2} for row in range(24)]
        args = arguments(folder, cls=self.arguments, **options)
        data = Dataset.from_list(pairs)
        return (trainer or self.trainer)(model or self.model(), args, train_dataset=data, callbacks=callbacks)


@pytest.fixture(params=["trl", "sentence_transformers"])
def library(request, tmp_path):
    return SFT() if request.param == "trl" else Sentences(tmp_path)


@pytest.fixture(params=["callback", "mixin"])
def trainer_class(request, library):
    return library.trainer if request.param == "callback" else mixed(library.trainer)


def check_file(folder, masks: dict[str, torch.Tensor], prefix: str):
    saved = load_file(folder / "model.safetensors")
    for name, mask in masks.items():
        assert exactly_positive_zero(saved[name.removeprefix(prefix)], mask), (folder, name)


class Recorder(Spy):
    """Spies, and keeps the masks of every checkpoint."""

    def __init__(self, callback):
        super().__init__(callback)
        self.masks: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        super().on_save(args, state, control, model=model, **kwargs)
        self.masks[state.global_step] = {name: mask.clone() for name, mask in self.callback.pruner.masks.items()}


def test_zeros_hold_at_every_step_in_every_file_and_in_a_resumed_run(tmp_path, library, trainer_class):
    """By the default criterion, which needs gradients; the spy also counts the target at every prune step."""
    callback = SparsityCallback(PruningConfig(**PRUNING))
    spy = Recorder(callback)
    trainer = library.make(tmp_path / "whole", [callback, spy], trainer_class, **SAVING)
    trainer.train()
    assert list(callback.pruner.masks) == library.body
    assert spy.events >= {"begin", "optimizer_step", "step_end", "save", "end"}
    assert len(spy.pruned_at) == STEPS and spy.pruned_at[STEPS] == spy.weights // 2

    for step in range(1, STEPS + 1):
        assert sum(int((~mask).sum()) for mask in spy.masks[step].values()) == spy.pruned_at[step]
        check_file(tmp_path / "whole" / f"checkpoint-{step}", spy.masks[step], library.prefix)
    trainer.save_model(str(tmp_path / "final"))
    check_file(tmp_path / "final", dict(callback.pruner.masks), library.prefix)

    # Between two prune steps.
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    again = SparsityCallback(PruningConfig(**PRUNING))
    resumed = library.make(tmp_path / "resumed", [again, Spy(again)], trainer_class, library.model(seed=9), **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(trainer.model))
    expected, found = (content(tmp_path / name / f"checkpoint-{STEPS}") for name in ("whole", "resumed"))
    expected.pop("log"), found.pop("log")  # TRL counts the tokens of each process by itself
    assert found == expected


def test_what_is_saved_opens_without_us(tmp_path, library):
    """With the class that users of that library load with, and the body alone with AutoModel."""
    callback = SparsityCallback(PruningConfig(target_sparsity=0.5, criterion="magnitude", scope="layer", **SCHEDULE))
    trainer = library.make(tmp_path, [callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    reopened = library.reopen(str(tmp_path / "final"))
    assert same(weights(reopened), weights(trainer.model))
    body = AutoModel.from_pretrained(tmp_path / "final")
    zeros = sum(int((weight == 0).sum()) for name, weight in body.named_parameters() if "embed" not in name)
    assert zeros >= sum(mask.numel() // 2 for mask in callback.pruner.masks.values())


def test_a_mixed_in_trainer_refuses_a_checkpoint_of_another_pruning(tmp_path, library):
    """Before training: what a callback alone can only say once training has begun."""
    callback = SparsityCallback(PruningConfig(**PRUNING))
    trainer = library.make(tmp_path, [callback], mixed(library.trainer), save_strategy="steps", save_steps=6)
    assert trainer.sparsity_callback is callback and not callback.owns_saving
    trainer.train()
    other = library.make(
        tmp_path, [SparsityCallback(PruningConfig(**PRUNING | {"target_sparsity": 0.6}))], mixed(library.trainer)
    )
    with pytest.raises(ValueError, match=r"`target_sparsity`: 0\.5 -> 0\.6"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert other.sparsity_callback.pruner is None


def test_the_card_of_that_library_has_our_section_once(tmp_path, library):
    trainer = library.make(tmp_path, [SparsityCallback(PruningConfig(**PRUNING))], mixed(library.trainer))
    trainer.train()
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(model_name="a|b")
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert text.count("## Sparsity") == 1 and text.count("50.00%") >= 1
        data = ModelCard(text).data
        assert {"sparse", "pruned", "unstructured"} < set(data.tags) and data["sparsity"]["selected"] == 0.5
        assert len(data.tags) > 3, "the library's own tags"


def test_zeros_hold_in_a_compiled_model_of_the_stock_trainer(tmp_path):
    if torch.__version__ < "2.7":
        pytest.skip("torch 2.6 cannot compile the BERT of transformers 5.6, with or without pruning")
    callback = SparsityCallback(PruningConfig(**PRUNING))
    spy = Recorder(callback)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "save_strategy": "steps", "save_steps": 5}
    trainer = make(tmp_path, Trainer, callbacks=[callback, spy], **options)
    names = set(weights(trainer.model))
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert [step for step in spy.pruned_at if spy.pruned_at[step] > spy.pruned_at.get(step - 1, 0)] == [*PRUNE_STEPS]
    for step in (5, STEPS):
        folder = tmp_path / f"checkpoint-{step}"
        assert set(load_file(folder / "model.safetensors")) == names  # no "_orig_mod." in them
        check_file(folder, spy.masks[step], "")
