"""Two checkpoints made by hand: their totals, and what happened to each weight of the first."""

import json

import pytest
import torch
from helpers.tiny import bert
from safetensors.torch import save_file

from hf_sparse.inspection import InspectionError, compare_checkpoints
from hf_sparse.inspection.compare import LayerComparison


def save(folder, **tensors):
    folder.mkdir(exist_ok=True)
    save_file(
        {f"{name}.weight": torch.as_tensor(values) for name, values in tensors.items()}, folder / "a.safetensors"
    )
    return folder


def test_every_zero_is_compared(tmp_path):
    first = {
        "kept": [[0.0, 1.0], [-0.0, 2.0]],
        "lost": [[0.0, 1.0], [0.0, 2.0]],
        "gone": [[0.0, 1.0]],
        "cut": [[0.0, 1.0]],
        "dense": [[3.0, 1.0]],
        "bias": [0.0, 0.0],  # not selected, so its zeros are not compared
        "embed": [[0.0, 1.0]],  # nor is an embedding
        "code": [[0.0, 0.0, 1.0]],
    }
    second = first | {
        "kept": torch.tensor([[0.0, 0.0], [0.0, 5.0]], dtype=torch.bfloat16),
        "lost": [[0.0, 1.0], [1e-30, 2.0]],
        "cut": [[0.0], [1.0]],
        "bias": [1.0, 1.0],
        "embed": [[2.0, 1.0]],
        "code": torch.zeros(1, 3, dtype=torch.int8),
        "more": [[0.0]],
    }
    del second["gone"]
    found = compare_checkpoints(save(tmp_path / "1", **first), save(tmp_path / "2", **second))
    assert {layer.name: layer for layer in found.layers} == {
        "kept.weight": LayerComparison("kept.weight", zeros=2, kept=2, new=1, changed=1),
        "lost.weight": LayerComparison("lost.weight", zeros=2, kept=1, new=0),
        "gone.weight": LayerComparison("gone.weight", 1, 0, 0, 0, "missing in the second"),
        "cut.weight": LayerComparison("cut.weight", 1, 0, 0, 0, "2x1 in the second, not 1x2"),
        "dense.weight": LayerComparison("dense.weight", 0, 0, 0),
        "code.weight": LayerComparison("code.weight", 2, 0, 0, 0, "I8 in the second: its zeros cannot be counted"),
    }
    assert (found.kept_all, found.total) == (False, LayerComparison("selected", 8, 3, 1, 1))
    assert (found.only_in_first, found.only_in_second) == (("gone.weight",), ("more.weight",))
    values = found.to_dict()
    assert (values["zeros"], values["kept"], values["lost"], values["new"]) == (8, 3, 5, 1)
    sizes = [(tmp_path / side / "a.safetensors").stat().st_size for side in "12"]
    size_row = [f"{size / 1e6:,.1f}" for size in sizes] + [f"{sizes[1] / sizes[0]:.1%}"]
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert lines == [
        "first second second / first",
        "parameters 21 17 81.0%",  # codes are not counted
        "zeros 11 6 54.5%",
        "selected weights 17 13 76.5%",
        "zeros of these 8 6 75.0%",
        "sparsity of these 47.06% 46.15%",
        f"weight files, MB {' '.join(size_row)}",
        "",
        "layer problem zeros still zero lost new zeros changed",
        "code.weight I8 in the second: its zeros cannot be counted 2 0 2 0 0",
        "cut.weight 2x1 in the second, not 1x2 1 0 1 0 0",
        "dense.weight 0 0 0 0 0",
        "gone.weight missing in the second 1 0 1 0 0",
        "kept.weight 2 2 0 1 1",
        "lost.weight 2 1 1 0 0",
        "selected 8 3 5 1 1",
        "",
        f"Only in {tmp_path / '1'}: gone.weight.",
        f"Only in {tmp_path / '2'}: more.weight.",
    ]


def test_metrics_are_those_of_the_cards(tmp_path):
    one, two, three = (save(tmp_path / side, up=[[0.0, 1.0]]) for side in "123")
    metrics = {"eval_accuracy": 0.75, "eval_samples": "many", "test_f1": 0.5}
    (one / "pruning_card.json").write_text(json.dumps({"metrics": metrics}))
    results = [
        {
            "task": {"type": "t"},
            "dataset": {"type": "d", "name": "D"},
            "metrics": [{"type": "accuracy", "value": 0.875}],
        }
    ]
    card = f"---\nmodel-index: {json.dumps([{'name': 'm', 'results': results}])}\n---\n# m\n"
    (two / "README.md").write_text(card)
    found = compare_checkpoints(one, two)
    assert (found.first.metrics, found.second.metrics) == ({"accuracy": 0.75, "test_f1": 0.5}, {"accuracy": 0.875})
    lines = [line.split() for line in str(found).splitlines()]
    assert ["accuracy", "0.7500", "0.8750"] in lines and ["test_f1", "0.5000", "-"] in lines
    (three / "README.md").write_text(card.replace("0.875", "[").replace("name", ":"))
    (three / "pruning_shrink.json").touch()
    found = compare_checkpoints(one, three)
    assert found.second.metrics == {} and f"{three} was made smaller" in str(found)


def test_a_body_matches_a_model_with_a_task_head(tmp_path):
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.view(-1)[::2] = 0
    model.bert.save_pretrained(tmp_path / "body")
    model.save_pretrained(tmp_path / "model")
    there = compare_checkpoints(tmp_path / "body", tmp_path / "model")
    back = compare_checkpoints(tmp_path / "model", tmp_path / "body")
    assert (there.prefix, back.prefix) == ("+bert.", "-bert.")
    assert there.total == back.total == LayerComparison("selected", 24 * 24 // 2, 24 * 24 // 2, 0)
    assert there.second.weights == back.first.weights == there.first.weights
    assert there.only_in_second == back.only_in_first == ("classifier.bias", "classifier.weight")
    assert there.only_in_first == back.only_in_second == ()
    assert "Compared by name, with +bert. in the second." in str(there)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(InspectionError, match="no tensor name in common"):
        compare_checkpoints(save(tmp_path / "1", a=[[0.0]]), save(tmp_path / "2", b=[[0.0]]))
