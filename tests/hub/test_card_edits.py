"""A push keeps what a person has changed in the card on the Hub."""

import pytest
from helpers.hub_server import USER
from helpers.tiny import SCHEDULE, make
from huggingface_hub import ModelCard

from hf_sparse.cli import app as cli
from hf_sparse.hub.card import PUBLISHED_FILES


REPO = f"{USER}/out"


@pytest.mark.parametrize("program", [False, True], ids=["trainer", "hf-sparse"])
def test_a_push_keeps_edits_on_the_hub(hub, plots, tmp_path, program):
    folder = tmp_path / "out"
    trainer = make(folder, push_to_hub=True, target_sparsity=0.5, **SCHEDULE)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos[REPO].files
    assert {"README.md", *PUBLISHED_FILES} < files.keys()
    text = files["README.md"].decode()
    assert f'from_pretrained("{REPO}")' in text and "](pruning_layers.png)" in text
    text = text.replace("## Model description\n", "## Model description\n\nMy words.\n").replace(
        "- sparse\n", "- sparse\n- mine\n"
    )
    files["README.md"] = text.replace("| selected weights |", "| tampered |").encode()

    if program:
        with pytest.raises(SystemExit) as done:
            cli.app(["push", str(folder), REPO])
        assert done.value.code == 0
    else:
        trainer.push_to_hub()
    text = hub.repos[REPO].files["README.md"].decode()
    assert text.count("My words.") == 1 and "tampered" not in text and "mine" in ModelCard(text).data.tags
    assert text == (folder / "README.md").read_text()
