"""Metadata that a user gives for a card, and what is private of this machine."""

import pytest
from helpers.hub_server import USER
from huggingface_hub import ModelCard
from test_card_writing import card
from typer.testing import CliRunner

from hf_sparse.cli.app import app
from hf_sparse.hub.card import CardMetadata, SparsityCard, rewrite_card, write_card


GIVEN = CardMetadata("user/base", "apache-2.0", ["glue", "user/data"], "fill-mask")
WORDS = ["--base-model", "user/base", "--license", "apache-2.0", "--datasets", "glue", "--datasets", "user/data"]
WORDS += ["--pipeline-tag", "fill-mask"]


def test_given_metadata_win_over_edits_and_stay(tmp_path):
    path = write_card(tmp_path, card())
    path.write_text(path.read_text().replace("license: mit", "license: mine\npipeline_tag: mine"))
    text = rewrite_card(tmp_path, given=GIVEN).read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.pipeline_tag) == ("user/base", "apache-2.0", "fill-mask")
    assert data.datasets == ["glue", "user/data"] and data.language == "en"
    assert "version of [user/base](https://huggingface.co/user/base), pruned" in text and "user/dense" not in text
    assert rewrite_card(tmp_path).read_text() == text
    path.write_text(text.replace("apache-2.0", "bsd"))  # by a person, later
    assert ModelCard.load(rewrite_card(tmp_path)).data.license == "bsd"


def test_a_local_base_model_is_named_until_its_hub_name_is_given(tmp_path):
    text = write_card(
        tmp_path, card(metadata={"base_model": "/home/alice/bert", "datasets": ["/home/alice/d"]})
    ).read_text()
    assert "A sparse version of bert (a local folder), pruned with hf_sparse." in text and "alice" not in text
    assert ModelCard(text).data.base_model is None and ModelCard(text).data.datasets is None
    text = rewrite_card(tmp_path, given=CardMetadata(base_model="google-bert/bert")).read_text()
    assert "A sparse version of [google-bert/bert](https://huggingface.co/google-bert/bert), pruned" in text
    assert "local folder" not in text


def test_a_folder_of_the_name_of_a_given_model_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "user" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    rewritten = [write_card("out", card(), given=GIVEN), rewrite_card("out")]
    assert ModelCard.load(rewritten[-1]).data.base_model == "user/base"


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"base_model": "/home/me/bert"},
            '`base_model` is "/home/me/bert": it must be the name of a model on the Hub',
        ),
        ({"datasets": ["glue", "../data"]}, '`datasets` is "../data": it must be the name of a dataset on the Hub'),
        ({"license": "Apache 2.0"}, '`license` is "Apache 2.0": write it in lower case as the Hub does'),
        ({"pipeline_tag": ""}, '`pipeline_tag` is "": write it in lower case'),
    ],
)
def test_values_that_the_hub_refuses(values, words):
    with pytest.raises(ValueError, match=words):
        CardMetadata(**values)


def test_nothing_of_a_card_names_a_folder_of_this_machine(tmp_path):
    config = card().config | {"distill_teacher": "/home/alice/teacher", "criterion_kwargs": {"file": "/home/alice/s"}}
    values = {
        "config": config,
        "settings": [{**card().settings[0], "criterion_kwargs": {"file": "/home/alice/s"}}],
        "metadata": {"base_model": "/home/alice/bert"},
        "command": "python run.py --model '/home/alice/my bert' --data ~alice/x.json",
    }
    text = write_card(tmp_path, card(**values)).read_text()
    assert "--model 'path/to/my bert' --data path/to/x.json" in text and "Distilled from teacher" in text
    for path in tmp_path.iterdir():
        assert "alice" not in path.read_text(), path


# Commands


def test_the_card_command_takes_the_metadata(tmp_path):
    write_card(tmp_path, card())
    done = CliRunner().invoke(app, ["card", str(tmp_path), *WORDS])
    assert done.exit_code == 0, done.output
    assert SparsityCard.load(tmp_path).given == GIVEN.to_dict()
    done = CliRunner().invoke(app, ["card", str(tmp_path), "--base-model", str(tmp_path)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "name of a model on the Hub" in done.stderr


def test_a_push_that_fails_leaves_the_card_as_it_was(hub, tmp_path):
    folder, repo = tmp_path / "out", f"{USER}/pruned"
    write_card(folder, card(repo_id=None))
    (folder / "pruning_shrink.json").unlink(missing_ok=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.fail("/commit/", 403, times=1)
    done = CliRunner().invoke(app, ["push", str(folder), repo, *WORDS])
    assert done.exit_code == 1 and "no write permission" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    done = CliRunner().invoke(app, ["push", str(folder), repo, *WORDS])
    assert done.exit_code == 0, done.output
    text = (folder / "README.md").read_text()
    assert f'from_pretrained("{USER}/pruned")' in text and ModelCard(text).data.license == "apache-2.0"
    done = CliRunner().invoke(app, ["push", str(folder), "pruned", "--license", "mit"])
    assert done.exit_code == 2 and "license cannot be written into a card" in done.stderr
