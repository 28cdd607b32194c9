"""The card that a trainer writes: Trainer's, with ours in it, of the weights as they are, and what people changed."""

import inspect
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import SCHEDULE, bert, make
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, Trainer

from hf_sparse import SparseTrainer, SparseTrainerMixin
from hf_sparse.hub.card import PUBLISHED_FILES
from hf_sparse.hub.card.merge import SECTION_END, SECTION_START
from hf_sparse.training.model_card import _LOCAL_BASE_MODEL


TOKEN = "not-for-anybody-else"


def accuracy(result) -> dict[str, float]:
    return {"accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())}


def trained(folder: Path, trainer=SparseTrainer, **options):
    """A run whose last evaluation is one of the final weights."""
    options = {"target_sparsity": 0.5, "eval_strategy": "steps", "eval_steps": 5, **SCHEDULE} | options
    run = make(folder, trainer, trainer_options={"compute_metrics": accuracy}, **options)
    run.train()
    return run


GLUE = {"tasks": "text-classification", "dataset_tags": "glue", "dataset": "GLUE SST2", "dataset_args": "sst2"}


def section_of(text: str) -> str:
    return text.split(SECTION_START)[1].split(SECTION_END)[0]


def test_the_card_is_trainers_with_a_section_after_the_title(tmp_path):
    run = trained(tmp_path / "sparse")
    given = GLUE | {"finetuned_from": "user/dense"}
    run.create_model_card(**given)
    text = (tmp_path / "sparse" / "README.md").read_text()
    Trainer.create_model_card(run, **given)
    plain = (tmp_path / "sparse" / "README.md").read_text()
    before, rest = ModelCard(text).text.split(SECTION_START)
    assert (before + rest.split(SECTION_END)[1].removeprefix("\n\n")).split() == ModelCard(plain).text.split()
    assert before.count("\n# sparse\n") == 1 and "It achieves the following results" in before

    section = section_of(text)
    report = run.sparsity_callback.pruner.report()
    assert f"| selected weights | {report.zeros:,} | 4,224 | 50.00% |" in section
    assert f"| all parameters | {report.parameter_zeros:,} | {report.parameters:,} |" in section
    assert "4 prune steps, after optimizer steps 3 to 8 of 10" in section  # tiny.PRUNE_STEPS
    assert "AutoModelForSequenceClassification.from_pretrained" in section and "keep_zeros=True" in section
    data = ModelCard(text).data
    assert data.tags == ["generated_from_trainer", "sparse", "pruned", "unstructured"]
    assert data["sparsity"]["selected"] == 0.5 and data.library_name == "transformers"
    logged = [log["eval_accuracy"] for log in run.state.log_history if "eval_accuracy" in log]
    assert [result.metric_value for result in data.eval_results] == [logged[-1]]


def test_the_signature_is_trainers_and_more_metadata():
    own = list(inspect.signature(SparseTrainer.create_model_card).parameters.items())
    trainers = list(inspect.signature(Trainer.create_model_card).parameters.items())
    assert own[: len(trainers)] == trainers
    assert [name for name, _ in own[len(trainers) :]] == ["base_model", "datasets", "pipeline_tag"]


def test_the_weights_are_counted_when_the_card_is_made(tmp_path):
    run = trained(tmp_path)
    weight = run.model.bert.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        weight.fill_(0)
        weight[0, 0] = 1
    run.create_model_card()
    assert (
        "| bert.encoder.layer.0.attention.self.query.weight | 24x24 | unstructured | 575 | 576 | 99.83% |"
        in (tmp_path / "README.md").read_text()
    )
    stored = json.loads((tmp_path / "pruning_report.json").read_text())
    assert [layer["zeros"] for layer in stored["layers"] if layer["name"].endswith("query.weight")] == [575]


def test_figures_are_shown_where_there_are_some(tmp_path, plots):
    run = trained(tmp_path)
    run.save_model()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    for name in ("pruning_schedule.png", "pruning_layers.png"):
        assert f"]({name})" in text and (tmp_path / name).is_file()
    assert all((tmp_path / name).is_file() for name in PUBLISHED_FILES)


def test_dense_and_saved_metrics_are_compared(tmp_path):
    run = trained(tmp_path)
    run.dense_metrics = {"test_accuracy": np.float32(0.75), "test_runtime": 1.0, "test_name": "x"}
    run.save_metrics("test", {"test_accuracy": 0.5, "test_samples": 8})
    run.create_model_card()
    section = section_of((tmp_path / "README.md").read_text())
    assert "| test_accuracy | 0.7500 | 0.5000 | -0.2500 |" in section
    assert "_runtime" not in section and "samples" not in section


def test_no_evaluation_of_other_weights_counts(tmp_path):
    """Evaluated after step 5 of 10 only, before the final sparsity; or the best of those after it, when it is kept."""
    run = trained(tmp_path / "early")
    run.state.log_history = [log for log in run.state.log_history if "eval_loss" not in log or log["step"] == 5]
    run.create_model_card()
    assert "were not evaluated" in section_of((tmp_path / "early" / "README.md").read_text())

    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    run = trained(tmp_path / "best", eval_steps=1, **best)
    run.create_model_card()
    found = next(
        log for log in run.state.log_history if log["step"] == run.state.best_global_step and "eval_loss" in log
    )
    assert f"| eval_loss | {found['eval_loss']:.4f} |" in section_of((tmp_path / "best" / "README.md").read_text())


def test_edits_stay_and_figures_do_not(tmp_path):
    run = trained(tmp_path)
    run.create_model_card(language="en", **GLUE)
    path = tmp_path / "README.md"
    text = path.read_text().replace(
        "## Model description\n\nMore information needed", "## Model description\n\nMy words"
    )
    text = text.replace("- sparse\n", "- sparse\n- mine\n").replace("| selected weights", "| tampered")
    path.write_text(text)
    run.args.max_steps = 12
    run.train()
    run.evaluate()
    run.create_model_card(language="en", **GLUE)
    text = path.read_text()
    assert "## Model description\n\nMy words\n" in text and "tampered" not in text
    assert "training_steps: 12" in text and "training_steps: 10" not in text  # nobody had touched that
    assert "mine" in ModelCard(text).data.tags and text.count(SECTION_START) == 1
    run.create_model_card(language="en", **GLUE)
    assert path.read_text() == text


def test_tags_of_an_earlier_pattern_go(tmp_path):
    """Trainer takes tags over from the card that it finds; and a list that it is given is not changed."""
    trained(tmp_path, pattern="4x1").create_model_card()
    given = ["mine"]
    trained(tmp_path, pattern="2:4").create_model_card(tags=given)
    tags = ModelCard.load(tmp_path / "README.md").data.tags
    assert sorted(tags) == ["2:4", "generated_from_trainer", "mine", "pruned", "sparse"]
    assert given == ["mine"]


def test_a_card_that_fails_costs_no_words(tmp_path, monkeypatch):
    run = trained(tmp_path)
    run.create_model_card()
    path = tmp_path / "README.md"
    path.write_text(text := path.read_text() + "\nMy words.\n")

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("hf_sparse.hub.card.writing.write_atomically", fail)
    with pytest.raises(OSError, match="no space left"):
        run.create_model_card()
    assert path.read_text() == text


def test_names_are_escaped_in_text_and_whole_in_the_metadata(tmp_path):
    name = "a|b <!-- `c` --> {{ d }}"
    run = trained(tmp_path)
    run.create_model_card(model_name=name, **GLUE | {"dataset": [name]}, finetuned_from=str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert "\n# a\\|b &lt;!-- \\`c\\` --&gt; {{ d }}\n" in card.text
    assert card.text.count(name) == 1 and f'"path/to/{name}"' in card.text  # in a block of code
    assert (card.data.model_name, card.data.eval_results[0].dataset_name) == (name, name)
    assert str(tmp_path) not in str(card) and card.data.base_model is None
    assert f"a fine-tuned version of {tmp_path.name} (a local folder)" in card.text


def test_a_model_made_from_a_config_was_trained_from_scratch(tmp_path):
    run = trained(tmp_path)
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "This model was trained from scratch on" in text and "[](" not in text
    assert run.model.config.name_or_path == ""  # it was changed for as long as Trainer wrote
    Trainer.create_model_card(run)
    assert "[](https://huggingface.co/)" in (tmp_path / "README.md").read_text(), "Trainer does it right by now"


def test_what_a_card_of_trainer_says_of_the_base_model(tmp_path):
    """Fails when transformers words it otherwise: then see whether the cards here still read well."""
    run = trained(tmp_path)
    Trainer.create_model_card(run, finetuned_from=_LOCAL_BASE_MODEL)
    card = ModelCard.load(tmp_path / "README.md")
    link = f"[{_LOCAL_BASE_MODEL}](https://huggingface.co/{_LOCAL_BASE_MODEL})"
    assert f"\nThis model is a fine-tuned version of {link} on an unknown dataset." in card.text
    assert card.text.count(_LOCAL_BASE_MODEL) == 2 and card.data.base_model == _LOCAL_BASE_MODEL


WORDINGS = {
    "today's": "This model is a fine-tuned version of [{}](https://huggingface.co/{}) on x.",
    "a link elsewhere": "It comes from [the base model {}](https://hub.test/models/{}/card), and that is it.",
    "no link": "Base model: {}",
    "twice": "Base model: {}. See [{}](https://huggingface.co/{}).",
}


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_local_base_model_is_named_without_its_path_however_trainer_words_it(tmp_path, caplog, wording):
    (tmp_path / "my_base").mkdir()
    text = WORDINGS[wording].replace("{}", _LOCAL_BASE_MODEL)

    def create_model_card(self, finetuned_from=None):
        assert finetuned_from == _LOCAL_BASE_MODEL
        (tmp_path / "README.md").write_text(f"---\nbase_model: {finetuned_from}\n---\n# out\n\n{text}\n")

    class Worded(Trainer):
        pass

    class SparseWorded(SparseTrainerMixin, Worded):
        pass

    Worded.create_model_card = create_model_card
    trained(tmp_path, SparseWorded).create_model_card(finetuned_from=str(tmp_path / "my_base"))
    card = ModelCard.load(tmp_path / "README.md")
    assert "my_base (a local folder)" in card.text and "](http" not in card.text.split(SECTION_START)[0]
    assert _LOCAL_BASE_MODEL not in str(card) and card.data.base_model is None
    assert "does not name its base model" not in caplog.text


def test_a_card_that_does_not_name_its_base_model_is_logged(tmp_path, caplog):
    class Silent(Trainer):
        def create_model_card(self, finetuned_from=None):
            (tmp_path / "README.md").write_text("# out\n")

    class SparseSilent(SparseTrainerMixin, Silent):
        pass

    trained(tmp_path, SparseSilent).create_model_card(finetuned_from=str(tmp_path))
    assert f"does not name its base model, {tmp_path.name}." in caplog.text


def test_no_token_lands_in_a_card(tmp_path, monkeypatch):
    command = f"python x.py --run_name {TOKEN}"
    monkeypatch.setattr("hf_sparse.training.model_card.command_line", lambda: command)
    trained(tmp_path, hub_token=TOKEN).create_model_card(tags=TOKEN)
    for name in ("README.md", "pruning_card.json", "pruning_config.json", "pruning_report.json"):
        assert TOKEN not in (tmp_path / name).read_text(), name


def test_no_file_but_trainers_arguments_names_a_folder_of_this_machine(tmp_path, plots):
    """The base model, the teacher and the data set are local, and so is the path of the output folder."""
    home = tmp_path / "alice"
    bert(1).save_pretrained(home / "teacher")
    bert().save_pretrained(home / "base")
    model = AutoModelForSequenceClassification.from_pretrained(home / "base")
    options = {"distill_teacher": str(home / "teacher"), "save_strategy": "steps", "save_steps": 5}
    run = make(home / "out", model=model, target_sparsity=0.5, **SCHEDULE, **options)
    run.train()
    run.save_model()
    run.evaluate()
    given = {"dataset_tags": str(home / "films"), "dataset": str(home / "films"), "tasks": "text-classification"}
    run.create_model_card(model_name=str(home / "out"), **given)
    named = {path.name for path in (home / "out").rglob("*") if path.is_file() and b"alice" in path.read_bytes()}
    assert named == {"training_args.bin"}
    card = ModelCard.load(home / "out" / "README.md")
    assert "a fine-tuned version of base (a local folder) on the films dataset" in card.text
    assert "Distilled from teacher" in card.text and card.data.datasets is None and card.data.base_model is None


def test_metadata_are_arguments_of_the_card_and_of_a_push(tmp_path):
    run = trained(tmp_path)
    given = {"base_model": "user/base", "license": "mit", "datasets": ["user/data"], "pipeline_tag": "fill-mask"}
    run.create_model_card(**given, **GLUE)
    card = ModelCard.load(tmp_path / "README.md")
    assert {name: card.data.get(name) for name in given} == given
    assert "a fine-tuned version of [user/base](https://huggingface.co/user/base) on the GLUE SST2" in card.text
    with pytest.raises(ValueError, match='`license` is "MIT": write it in lower case'):
        run.create_model_card(license="MIT")
    run.sparsity_callback.pruner = None  # of a dense run the card is Trainer's
    run.create_model_card(**given, **GLUE)
    assert SECTION_START not in (tmp_path / "README.md").read_text()


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    run = trained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(type(run), "is_world_process_zero", lambda self: False)
    run.create_model_card()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_pruning_it_is_trainers(tmp_path):
    run = trained(tmp_path, target_sparsity=None, prune_start=0.0, prune_end=0.7, prune_every=0.01)
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "hf_sparse" not in text and not (tmp_path / "pruning_card.json").exists()


@pytest.mark.parametrize("ours", [True, False])
def test_edits_on_the_hub_stay(tmp_path, monkeypatch, ours):
    """The card there is the one here with an edit; or a stock Trainer's, which a push replaces as Trainer does."""
    run = trained(tmp_path)
    run.create_model_card()
    readme, stored = tmp_path / "hub" / "README.md", tmp_path / "hub" / "pruning_card.json"
    readme.parent.mkdir()
    text = (tmp_path / "README.md").read_text() if ours else "---\n{}\n---\n## Intended uses & limitations\n"
    readme.write_text(
        text.replace("## Intended uses & limitations\n", "## Intended uses & limitations\n\nFrom the Hub\n")
    )
    stored.write_text((tmp_path / "pruning_card.json").read_text() if ours else "{}")
    files = {"README.md": readme, "pruning_card.json": stored}
    monkeypatch.setattr("hf_sparse.hub.card.writing.hf_hub_download", lambda repo, name, **_: str(files[name]))
    run.hub_model_id = "user/model"
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert text.count("From the Hub") == ours
    assert 'from_pretrained("user/model")' in text


def test_a_hub_out_of_reach_stops_no_card(tmp_path, caplog):
    run = trained(tmp_path)
    run.hub_model_id = "user/model"  # the tests are offline
    with caplog.at_level(logging.INFO, "hf_sparse"):
        run.create_model_card()
    assert SECTION_START in (tmp_path / "README.md").read_text()
    assert "the card of user/model was not read" in caplog.text
