"""Cards: one checked by eye, what is regenerated and what is kept, and zeros counted in the weights."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import bert
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from hf_sparse import PruningConfig, SparsityReport
from hf_sparse.hub.card import CardVersion, SparsityCard, recount_zeros, render_card, rewrite_card, write_card
from hf_sparse.hub.card.merge import SECTION_END, SECTION_START
from hf_sparse.inspection import InspectionError
from hf_sparse.oneshot import OneshotConfig
from hf_sparse.reporting.report import LayerReport


GOLDEN = Path(__file__).with_name("golden.md")
NASTY = "a|b`c` <i>d</i> --> {{ e }} {% f %}\n---\n# g: [h](i) 'j\" \\k"

SECTIONS = ("Evaluation", "Details", "Use", "Reproduce", "Limits")


def card(**values) -> SparsityCard:
    """Two layers of 16 weights, 8 and 4 of them zero; 40 parameters, 14 zero."""
    layers = (
        LayerReport("a.weight", "attention", "2:4", (4, 4), 16, 8),
        LayerReport("b.weight", "ffn", "1x4", (4, 4), 16, 4),
    )
    groups = {"attention": {"targets": ["a"], "pattern": "2:4"}, "ffn": {"targets": ["b"], "pattern": "1x4"}}
    config = PruningConfig(target_sparsity=0.25, groups=groups, prune_end=0.5, prune_every=0.25).to_dict()
    defaults = {
        "model_name": "my-model",
        "report": SparsityReport(layers, 40, 14, 0.375),
        "config": config,
        "metadata": {"base_model": "user/dense", "datasets": ["glue"], "license": "mit", "language": "en"},
        "task": "text-classification",
        "dataset": {"type": "glue", "name": "GLUE SST2", "args": "sst2"},
        "dense_metrics": {"eval_accuracy": 0.875, "eval_loss": 0.25},
        "repo_id": "user/my-model",
        "metrics": {"eval_accuracy": 0.8125, "eval_loss": 0.3125, "test_accuracy": 0.75, "eval_runtime": 9.0},
        "max_steps": 100,
        "processes": 2,
        "command": "python train.py --output_dir my-model",
        "auto_class": "AutoModelForSequenceClassification",
        "version": "0.1.0",
    }
    return SparsityCard(**defaults | values)


def test_the_golden_card():
    """Checked by eye: shares, difference, steps (25, 50 of 100: prune steps after steps 1, 26, 50)."""
    images = ("pruning_schedule.png", "pruning_layers.png")
    assert str(render_card(card(), images)) == GOLDEN.read_text(encoding="utf-8").rstrip("\n")


def test_the_metadata_has_the_counts(tmp_path):
    data = ModelCard.load(write_card(tmp_path, card())).data
    assert data["sparsity"] == {
        "selected": 0.375,
        "selected_zeros": 12,
        "selected_weights": 32,
        "parameters": 0.35,
        "parameter_zeros": 14,
        "parameter_count": 40,
        "pattern": ["2:4", "1x4"],
        "criterion": "snip_momentum",
        "scope": "global",
        "library": "hf_sparse",
    }
    assert (data.base_model, data.datasets, data.license) == ("user/dense", ["glue"], "mit")
    assert data.tags == ["sparse", "pruned", "2:4", "1x4"] and data.metrics == ["accuracy"]
    assert isinstance(data, ModelCardData) and data.model_name == "my-model"
    found = [(result.metric_type, result.metric_value, result.dataset_split) for result in data.eval_results]
    assert found == [("accuracy", 0.8125, None), ("accuracy", 0.75, "test")]


def test_unknown_values_are_left_out():
    text = render_card(
        card(dense_metrics={}, command=None, max_steps=None, auto_class=None, processes=1, task=None)
    ).text
    assert "difference" not in text and "The dense model was not evaluated." in text
    assert "```bash" not in text and "from_pretrained" not in text and "![" not in text
    assert "Scheduler: iterative (cubic curve).\n" in text and "processes" not in text
    text = render_card(card(metrics={})).text
    assert "were not evaluated" in text and "averages" not in text
    assert "model-index" not in card(metrics={}).hub_metadata()


def test_what_a_checkpoint_has_not_reached_is_not_claimed():
    """Prune steps after steps 1, 26 and 50 of 100."""
    config = PruningConfig(target_sparsity=0.5, prune_end=0.5, prune_every=0.25, rewind=0.1).to_dict()
    for step, told, rewound in (
        (30, "These weights are those of optimizer step 30, after 2 of 3 prune steps.", False),
        (60, "These weights are those of optimizer step 60, after 3 of 3 prune steps.", True),
        (100, None, True),
        (None, None, True),
    ):
        text = render_card(card(config=config, step=step)).text
        assert "3 prune steps, after optimizer steps 1 to 50 of 100." in text
        assert (told or "3 prune steps") in text and ("These weights are those" in text) == (told is not None)
        assert ("Rewound after the last prune step" in text) == rewound


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("unstructured", "no speed-up is claimed"),
        ("2:4", "sparse tensor cores"),
        ("1:4", "check whether yours support 1:4"),
        ("4x1", "Blocks of 4x1 weights"),
        ("channel", "output rows"),
        ("channel:out", "output rows"),
        ("channel:in", "input columns"),
        ("my-own", "no speed-up is claimed"),
    ],
)
def test_limits_of_each_pattern(pattern, words):
    report = SparsityReport((LayerReport("a", "weights", pattern, (4, 4), 16, 8),), 16, 8)
    limits = render_card(card(report=report)).text.split("### Limits")[1]
    assert words in limits and "as large as" in limits


def test_options_of_methods_are_in_the_settings():
    """Those that differ from their defaults, of each group."""
    groups = {
        "a": {"targets": ["a"], "criterion": "snip_momentum", "criterion_kwargs": {"decay": 0.5}},
        "b": {"targets": ["b"], "criterion": "snip_momentum", "criterion_kwargs": {"decay": 0.9}},
    }
    text = render_card(card(config=PruningConfig(target_sparsity=0.5, groups=groups).to_dict())).text
    assert "| a | unstructured | snip\\_momentum (decay=0.5) |" in text.replace("snip_", "snip\\_")
    assert "| b | unstructured | snip_momentum | global | 50% |" in text
    solver = {"solver": "sparsegpt", "solver_kwargs": {"dampening": 0.5}, "allocation": "owl"}
    config = OneshotConfig(target_sparsity=0.5, **solver, allocation_kwargs={"lambda_": 0.25}).to_dict()
    text = render_card(card(config=config, oneshot=True)).text
    row = "| unstructured | selected by the solver | layer | owl (lambda\\_=0.25) | sparsegpt (dampening=0.5) | 50% |"
    assert row in text
    swapped = card(config=OneshotConfig(target_sparsity=0.5, swaps=25).to_dict(), oneshot=True)
    assert "| pattern | criterion | scope | swaps | target |" in render_card(swapped).text
    assert "| unstructured | wanda | row | 25 | 50% |" in render_card(swapped).text
    assert swapped.hub_metadata()["sparsity"]["swaps"] == 25
    permuted = card(config=OneshotConfig(pattern="2:4", permute=True).to_dict(), oneshot=True)
    assert "| pattern | criterion | scope | permute | target |" in render_card(permuted).text
    assert "| 2:4 | wanda | row | yes | 50% |" in render_card(permuted).text
    assert permuted.hub_metadata()["sparsity"]["permute"] is True


def test_a_group_that_only_keeps_zeros_has_no_criterion():
    groups = {"a": {"targets": ["a"], "target_sparsity": 0.5, "scheduler": "oneshot"}, "b": {"targets": ["b"]}}
    text = render_card(card(config=PruningConfig(keep_zeros=True, groups=groups).to_dict())).text
    assert "| a | unstructured | snip_momentum | global | 50% |\n| b | unstructured | - | - | existing zeros |" in text
    assert "Scheduler: oneshot, 70 prune steps" in text and "cubic" not in text


def test_plugins_are_named_where_their_methods_were_used():
    settings = [{**card().settings[0], "criterion": "mine", "scheduler": "slow"}]
    text = render_card(card(settings=settings, plugins=["my_methods.py"])).text
    needed = (
        'needs the plug-in "my_methods.py", which registers criterion "mine", scheduler "slow"; loading it does not.'
    )
    assert needed in text and "Scheduler: slow, 3 prune steps" in text
    settings[0]["criterion"] = "taylor"
    text = render_card(card(settings=settings, plugins=["a.py", "b.py"])).text
    assert 'needs the plug-ins "a.py", "b.py", which register scheduler "slow"' in text
    assert "plug-in" not in render_card(card(plugins=["my_methods.py"])).text
    config = card().config | {"sparsity_decay_type": "bent"}
    text = render_card(card(config=config, settings=card().settings, plugins=["a.py"])).text
    assert 'needs the plug-in "a.py", which registers curve "bent"' in text


def test_a_card_knows_the_plugins_that_are_loaded(monkeypatch):
    monkeypatch.setattr("hf_sparse.plugins._loaded", {"my_methods.py": None})
    assert card().plugins == ["my_methods.py"]


def test_the_card_of_a_preset_says_which_and_has_all_that_it_chose():
    config = OneshotConfig(target_sparsity=0.5, quality="best")
    text = render_card(card(settings=[], config=config.to_dict(), oneshot=True)).text
    assert "without training. Options that were not given are those of quality best." in text
    chosen = {name: getattr(config, name) for name in ("solver", "allocation", "reconstruct")}
    assert all(f"{name}: {str(value).lower()}\n" in text for name, value in chosen.items())
    assert "quality" not in render_card(card(settings=[], config=OneshotConfig().to_dict(), oneshot=True)).text


def test_settings_of_an_earlier_version_are_made_from_the_config():
    assert (
        card(settings=[{"group": "weights", "solver": "zero", "criterion": "magnitude"}]).settings == card().settings
    )
    # The default scope of one-shot pruning with magnitude was another one.
    old = {"group": "weights", "criterion": "magnitude", "scope": "global"}
    config = OneshotConfig(target_sparsity=0.5, criterion="magnitude")
    (settings,) = card(settings=[old], config=config.to_dict(), oneshot=True).settings
    assert settings["scope"] == "global" != next(iter(config.resolve_groups().values())).scope


@pytest.mark.parametrize("mark", [SECTION_END, SECTION_START, f"```\n{SECTION_END}\n```", f"~~~\n{SECTION_END}"])
def test_a_command_with_the_marks_of_the_section_is_written_stably(tmp_path, mark):
    """Written again and again, with text of a person after the section."""
    values = {"command": f"python run.py \\\n{mark}\n# after\n{mark}"}
    path = write_card(tmp_path, card(**values))
    path.write_text(path.read_text(encoding="utf-8") + "\n# Mine\n\nA text.\n", encoding="utf-8")
    text = write_card(tmp_path, card(**values)).read_text(encoding="utf-8")
    assert text.count("### Reproduce") == 1 and text.endswith("\n# Mine\n\nA text.\n")
    assert text.count(values["command"]) == 1
    for _ in range(2):
        assert write_card(tmp_path, card(**values)).read_text(encoding="utf-8") == text
    plain = write_card(tmp_path, card(command="python run.py")).read_text(encoding="utf-8")
    assert plain.count(SECTION_START) == plain.count(SECTION_END) == 1
    assert plain.endswith("\n# Mine\n\nA text.\n")


def test_markup_in_names_does_not_change_the_structure(tmp_path):
    """The same lines as with plain names, and the same values when the metadata is read back."""
    nasty = NASTY + f"\n{SECTION_END}\n"
    layers = (LayerReport(nasty, "weights", "2:4", (4, 4), 16, 8),)
    groups = {nasty: {"targets": [nasty], "pattern": "2:4"}}
    values = {
        "model_name": nasty,
        "report": SparsityReport(layers, 40, 14),
        "config": PruningConfig(groups=groups).to_dict(),
        "metadata": {"datasets": [nasty], "license": nasty},
        "dataset": {"type": nasty, "name": nasty},
        "metrics": {f"eval_{nasty}": 0.5},
        "dense_metrics": {f"eval_{nasty}": 0.5},
        "calibration": nasty,
        "repo_id": nasty,
    }
    path = write_card(tmp_path, card(**values))
    text = path.read_text(encoding="utf-8")
    found = ModelCard.load(path)
    assert found.data.license == nasty and found.data.datasets == [nasty] and found.data.model_name == nasty
    assert found.data.eval_results[0].dataset_name == nasty
    headings = [line for line in found.text.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## Sparsity", *(f"### {name}" for name in SECTIONS)]
    assert text.splitlines().count(SECTION_START) == text.splitlines().count(SECTION_END) == 1
    assert write_card(tmp_path, card(**values)).read_text(encoding="utf-8") == text
    assert render_card(SparsityCard.load(tmp_path)).content.rstrip("\n") == text.rstrip("\n")


def test_a_card_names_block_reconstruction_and_its_options(tmp_path):
    options = {"reconstruct": True, "reconstruct_kwargs": {"steps": 50}}
    config = OneshotConfig(target_sparsity=0.5, **options).to_dict()
    text = write_card(tmp_path, card(config=config, oneshot=True)).read_text()
    assert (
        "(reconstruct: steps 50, learning rate chosen, samples chosen, window 3, holdout 0.125, inputs sparse)" in text
    )
    assert "reconstruct: true" in text and rewrite_card(tmp_path).read_text() == text
    assert (
        "reconstruct" not in render_card(card(config=OneshotConfig(target_sparsity=0.5).to_dict(), oneshot=True)).text
    )


def test_a_card_of_one_shot_pruning(tmp_path):
    """The criterion that was left out is Wanda's, whose scope is the row."""
    layers = (
        LayerReport("a", "weights", "unstructured", (4, 4), 16, 8, 0.125),
        LayerReport("b", "weights", "x", (1,), 1, 0),
    )
    config = OneshotConfig(target_sparsity=0.5, sequential=False).to_dict()
    calibration = "128 texts of 2,048 tokens"
    values = {"report": SparsityReport(layers, 40, 8), "config": config, "oneshot": True, "calibration": calibration}
    text = write_card(tmp_path, card(**values)).read_text()
    assert "| unstructured | wanda | row | 50% |" in text and "sequential: false" in text
    assert "Pruned in one shot, without training. Calibration data: 128 texts of 2,048 tokens." in text
    assert "| a | 4x4 | unstructured | 8 | 16 | 50.00% | 0.1250 |" in text and "relative to the square" in text
    assert "| b | 1 | x | 0 | 1 | 0.00% | - |" in text
    assert rewrite_card(tmp_path).read_text() == text
    (tmp_path / "pruning_card.json").unlink()
    assert "Pruned in one shot" in rewrite_card(tmp_path).read_text()


def test_a_card_is_generated_from_its_files_alone(tmp_path):
    first = write_card(tmp_path, card()).read_bytes()
    assert rewrite_card(tmp_path).read_bytes() == first
    stored = json.loads((tmp_path / "pruning_card.json").read_text())
    assert stored["command"] == "python train.py --output_dir my-model" and "report" not in stored
    (tmp_path / "README.md").unlink()
    assert rewrite_card(tmp_path).read_bytes() == first


def test_a_card_of_report_and_config_alone(tmp_path):
    card().save(tmp_path)
    (tmp_path / "pruning_card.json").unlink()
    (tmp_path / "all_results.json").write_text('{"eval_accuracy": 0.5, "train_runtime": 3}')
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    text = rewrite_card(tmp_path).read_text()
    assert "| eval_accuracy | 0.5000 |" in text and "AutoModelForCausalLM" in text and f"# {tmp_path.name}" in text


def test_a_card_without_report_or_with_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="pruning_report.json does not exist: a card is generated from"):
        rewrite_card(tmp_path)
    card().save(tmp_path)
    for name in ("pruning_report.json", "pruning_config.json", "pruning_card.json"):
        content = (tmp_path / name).read_text()
        for damaged in (content[: len(content) // 2], "[]", '{"layers": 1, "metrics": []}'):
            (tmp_path / name).write_text(damaged)
            with pytest.raises(ValueError, match="damaged|fault"):
                rewrite_card(tmp_path)
        (tmp_path / name).write_text(content)


def test_edits_are_kept_and_the_section_is_regenerated(tmp_path):
    path = write_card(tmp_path, card())
    text = path.read_text().replace("license: mit", "license: apache-2.0").replace("- sparse\n", "- sparse\n- mine\n")
    text = text.replace("- pruned", "- pruned\n- more").replace("# my-model\n", "# My title\n\nMy words.\n")
    text = text.replace("| a.weight", "| tampered") + "\n## Mine\n\nstays\n"
    path.write_text(text)
    fewer = replace(card(), metrics={"eval_accuracy": 0.5})
    text = write_card(tmp_path, fewer).read_text()
    assert (
        "license: apache-2.0" in text and "# My title\n\nMy words.\n" in text and text.endswith("## Mine\n\nstays\n")
    )
    assert "| eval_accuracy | 0.8750 | 0.5000 | -0.3750 |" in text
    assert "tampered" not in text and "value: 0.8125" not in text
    assert ModelCard.load(path).data.tags == ["sparse", "mine", "pruned", "more", "2:4", "1x4"]
    assert write_card(tmp_path, fewer).read_text() == text


def test_local_edits_and_edits_on_the_hub_are_merged(tmp_path):
    outer = "---\nlicense: mit\n---\n# m\nresults 1\n\n## A\n-\n\n## B\n-\n"
    write_card(tmp_path, card(), outer, [])
    here = CardVersion.read(tmp_path / "README.md", tmp_path / "pruning_card.json")
    there = replace(here, text=here.text.replace("## A\n-", "## A\nfrom the Hub"))
    here = replace(here, text=here.text.replace("## B\n-", "## B\nfrom here"))
    text = write_card(tmp_path, card(), outer.replace("results 1", "results 2"), [there, here]).read_text()
    assert "# m\nresults 2\n" in text and "## A\nfrom the Hub\n" in text and "## B\nfrom here\n" in text
    again = [CardVersion.read(tmp_path / "README.md", tmp_path / "pruning_card.json")]
    assert write_card(tmp_path, card(), outer.replace("results 1", "results 2"), again).read_text() == text


def test_a_rewritten_card_keeps_edits_on_the_hub(tmp_path, monkeypatch):
    outer = "---\nlicense: mit\n---\n# m\n\n## A\n-\n\n## B\n-\n"
    path = write_card(tmp_path, card(repo_id=None), outer, [])
    hub = CardVersion.read(path, tmp_path / "pruning_card.json")
    hub = replace(hub, text=hub.text.replace("## A\n-", "## A\nfrom the Hub").replace("- sparse", "- sparse\n- there"))
    path.write_text(path.read_text().replace("## B\n-", "## B\nfrom here").replace("- sparse", "- sparse\n- here"))
    monkeypatch.setattr("hf_sparse.hub.card.writing.download_card", lambda repo, token: hub)
    for _ in range(2):
        text = rewrite_card(tmp_path, "user/m").read_text()
        assert "## A\nfrom the Hub\n" in text and "## B\nfrom here\n" in text and 'from_pretrained("user/m")' in text
        assert {"here", "there"} < set(ModelCard(text).data.tags)
    again = [CardVersion.read(path, tmp_path / "pruning_card.json")]
    text = write_card(tmp_path, card(), outer, again).read_text()  # edits are still recognised
    assert "from the Hub" in text and "from here" in text


def test_a_damaged_card(tmp_path, caplog):
    """A damaged pruning_card.json loses no edits; invalid metadata is an error."""
    path = write_card(tmp_path, card())
    path.write_text(path.read_text() + "\nMy words.\n")
    (tmp_path / "pruning_card.json").write_text("{")
    assert write_card(tmp_path, card()).read_text().endswith("My words.\n")
    assert "is damaged" in caplog.text
    path.write_text(path.read_text().replace("license: mit", "license: [mit"))
    with pytest.raises(
        ValueError, match="the metadata of README.md is not valid YAML: correct it, or delete the file"
    ):
        write_card(tmp_path, card())


def test_no_token_in_any_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the-token-of-the-environment")
    tokens = ["the-given-token", "the-token-of-the-environment", "hf_" + "a1" * 17]
    write_card(tmp_path, card(command=" ".join(tokens), calibration=tokens[0]), secrets=tokens[:1])
    for path in tmp_path.iterdir():
        assert not any(token in path.read_text() for token in tokens), path


def test_zeros_are_counted_in_the_files(tmp_path, caplog):
    """Also of sharded files; files of another model change nothing."""
    weights = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4), "c": torch.zeros(8)}
    weights["a.weight"][:2] = 0
    weights["b.weight"][0, :3] = -0.0
    report = card().report
    assert recount_zeros(tmp_path, report) == report
    save_file({"a.weight": weights["a.weight"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in ("b.weight", "c")}, tmp_path / "model-00002-of-00002.safetensors")
    files = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    index = {"weight_map": files | {"c": files["b.weight"]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = recount_zeros(tmp_path, report)
    assert [layer.zeros for layer in found.layers] == [8, 3] and (found.zeros, found.parameter_zeros) == (11, 13)
    card().save(tmp_path)
    assert "| selected weights | 11 | 32 | 34.38% |" in rewrite_card(tmp_path).read_text()
    assert json.loads((tmp_path / "pruning_report.json").read_text())["selected_zeros"] == 11
    save_file({"b.weight": torch.ones(2), "c": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert recount_zeros(tmp_path, report) == report
    assert "does not hold 1 of the weights in the report, such as b.weight" in caplog.text
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"cut")
    with pytest.raises(InspectionError, match="cut short"):
        rewrite_card(tmp_path)


def test_random_edits_outside_of_the_section_are_kept(tmp_path):
    """Lines taken out, doubled and put in at random places of a trainer's card."""
    outer = "---\nlicense: mit\n---\n\n# m\nresults\n\n## A\n-\n\n```\n# code\n```\n\n## B\n-\n"
    choice = random.Random(0)
    for round in range(30):
        folder = tmp_path / str(round)
        path = write_card(folder, card(), outer, [])
        head, body = path.read_text().split("\n---\n", 1)
        before, section, after = (
            body.partition(SECTION_START)[0],
            *body.partition(SECTION_START)[2].split(f"{SECTION_END}\n", 1),
        )
        mine = f"mine {round}"
        parts = [before.splitlines(), after.splitlines()]
        lines = choice.choice(parts)
        lines.insert(choice.randrange(len(lines) + 1), choice.choice([mine, f"## {mine}", f"- {mine}"]))
        text = "\n".join([*parts[0], SECTION_START]) + section + "\n".join([SECTION_END, *parts[1], ""])
        path.write_text(f"{head}\n---\n{text}")
        written = write_card(folder, card(), outer, [CardVersion.read(path, folder / "pruning_card.json")]).read_text()
        assert written.count(mine) == 1 and written.count(SECTION_START) == written.count(SECTION_END) == 1


def test_auto_classes():
    from hf_sparse.hub.auto_classes import auto_class

    assert auto_class(type(bert()).__name__) == "AutoModelForSequenceClassification"
    assert auto_class("T5ForConditionalGeneration") == "AutoModelForSeq2SeqLM"
    assert auto_class("MixtralForCausalLM") == "AutoModelForCausalLM"
    assert auto_class(None) is None
