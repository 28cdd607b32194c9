"""The demo of the README, with fewer steps."""

from demo import main, parse
from transformers import ViTForImageClassification


def options(folder) -> list[str]:
    return ["--num_train_epochs", "1", "--output_dir", str(folder), "--disable_tqdm", "True"]


def test_demo_prunes_and_saves_what_plain_transformers_opens(tmp_path, plots, capsys):
    folder = tmp_path / "demo"
    result = main(options(folder))
    assert result["sparsity"] == round(0.8 * 131072) / 131072
    model = ViTForImageClassification.from_pretrained(folder)
    zeros = sum(int((w == 0).sum()) for name, w in model.named_parameters() if ".layer" in name and w.ndim == 2)
    assert zeros == round(0.8 * 131072)
    assert (folder / "pruning_schedule.png").is_file() and (folder / "pruning_layers.png").is_file()
    printed = capsys.readouterr().out
    assert f"after 1 more {result['dense']:.1%} dense, {result['sparse']:.1%} with 80.0% of 131,072" in printed
    assert "\nsize: 552 kB dense, 552 kB now; compressed" in printed and "Zeros alone make no model smaller" in printed


def test_what_the_demo_suggests_makes_the_model_smaller(tmp_path, capsys):
    result = main([*options(tmp_path / "demo"), *"--pattern neuron --target_sparsity 0.5 --shrink".split()])
    model = ViTForImageClassification.from_pretrained(tmp_path / "demo")
    dense = ViTForImageClassification.from_pretrained(tmp_path / "demo-dense")
    assert model.config.intermediate_size == dense.config.intermediate_size // 2
    printed = capsys.readouterr().out
    assert (
        f"\nspeed: {result['speed']:.2f} times that of the dense model\n" in printed and "Zeros alone" not in printed
    )


def test_a_pattern_brings_its_own_target():
    assert parse(["--pattern", "2:4"]).target_sparsity is None and parse([]).target_sparsity == 0.8
