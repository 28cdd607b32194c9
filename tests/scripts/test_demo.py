"""The demo of the README, with fewer steps."""

from demo import main
from transformers import ViTForImageClassification


def test_demo_prunes_and_saves_what_plain_transformers_opens(tmp_path, plots, capsys):
    result = main(["--num_train_epochs", "1", "--output_dir", str(tmp_path), "--disable_tqdm", "True"])
    assert result["sparsity"] == round(0.8 * 131072) / 131072
    model = ViTForImageClassification.from_pretrained(tmp_path)
    zeros = sum(int((w == 0).sum()) for name, w in model.named_parameters() if ".layer" in name and w.ndim == 2)
    assert zeros == round(0.8 * 131072)
    assert (tmp_path / "pruning_schedule.png").is_file() and (tmp_path / "pruning_layers.png").is_file()
    assert "accuracy on 360 test images" in capsys.readouterr().out


def test_a_pattern_brings_its_own_target(tmp_path):
    options = ["--pattern", "2:4", "--num_train_epochs", "1", "--output_dir", str(tmp_path), "--disable_tqdm", "True"]
    assert main(options)["sparsity"] == 0.5
