"""The cards in model_cards/ are those that the library generates from the files beside them."""

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_sparse import SparsityReport
from hf_sparse.files import SCHEDULE_PLOT_FILE
from hf_sparse.hub.card import PUBLISHED_FILES, SparsityCard, rewrite_card
from hf_sparse.hub.card.merge import SECTION_END, SECTION_START


ROOT = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir())


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request):
    return request.param


def test_there_are_cards_and_all_are_listed():
    listed = re.findall(r"\]\((.+?)/README\.md\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in FOLDERS] and len(FOLDERS) >= 3


def test_the_card_is_generated_again_from_its_files_byte_for_byte(folder, tmp_path):
    """As it is, and when all figures in its head are wrong and its section is empty."""
    expected = (folder / "README.md").read_text(encoding="utf-8")
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert rewrite_card(copy).read_text(encoding="utf-8") == expected

    head, body = expected.split("\n---\n", 1)
    head = re.sub(r"((?:value|selected|parameters|\w+_zeros): )[\d.]+", r"\g<1>7", head)
    between = re.compile(rf"{re.escape(SECTION_START)}.*{re.escape(SECTION_END)}", flags=re.DOTALL)
    spoilt = f"{head}\n---\n{between.sub(f'{SECTION_START}{chr(10)}{SECTION_END}', body)}"
    assert len(spoilt) < len(expected) / 2 and ModelCard(spoilt).data["sparsity"]["selected"] == 7
    (copy / "README.md").write_text(spoilt, encoding="utf-8")
    assert rewrite_card(copy).read_text(encoding="utf-8") == expected


def test_the_card_agrees_with_the_report(folder):
    report = SparsityReport.load(folder / "pruning_report.json")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| selected weights | {report.zeros:,} | {report.selected:,} | {report.sparsity:.2%} |" in text
    assert f"| all parameters | {report.parameter_zeros:,} | {report.parameters:,} |" in text
    assert sum(f"| {layer.name} |" in text for layer in report.layers) == len(report.layers)
    card = SparsityCard.load(folder)
    for name, value in card.metrics.items():
        assert (
            f"| {name} | {card.dense_metrics[name]:.4f} | {value:.4f} | {value - card.dense_metrics[name]:+.4f} |"
            in text
        )


def test_the_folder_is_complete_and_has_no_local_paths(folder):
    absent = {SCHEDULE_PLOT_FILE} if SparsityCard.load(folder).oneshot else set()  # one prune step is no schedule
    assert {path.name for path in folder.iterdir()} == {"README.md", *PUBLISHED_FILES} - absent
    for path in folder.glob("*.*"):
        if path.suffix != ".png":
            assert not re.search(r"/(work|root|home|Users|tmp)/", path.read_text(encoding="utf-8")), path
