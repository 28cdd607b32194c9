"""Every recipe trains with every script."""

import pytest
import run_clm
import run_glue
import run_qa
from helpers.scripts import PLACES, SCRIPTS, WORDS, read_json, sentiment_rows, train_args, write_rows
from safetensors.torch import load_file

from hf_sparse import PruningConfig


RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """Files of rows by the kind of script."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(8)) for start in range(0, 400, 8)]
    (folder / "lines.txt").write_text("\n".join(lines))
    questions = [
        {"id": f"q{number}", "question": "where ?", "context": f"anna lives in {place} .", "answers": answers}
        for number, place in enumerate(PLACES * 4)
        for answers in [{"text": [place], "answer_start": [14]}]
    ]
    return {
        "glue": write_rows(folder / "rows.jsonl", sentiment_rows(16)),
        "qa": write_rows(folder / "questions.jsonl", questions),
        "clm": str(folder / "lines.txt"),
    }


@pytest.fixture(params=["glue", "qa", "clm"])
def run(request, texts, tmp_path):
    """Returns a function that trains for 6 steps with more arguments."""
    script, model, shape = {
        "glue": (run_glue, "tiny_bert", ["--max_seq_length", "16"]),
        "qa": (run_qa, "tiny_bert_qa", ["--max_seq_length", "24", "--doc_stride", "4"]),
        "clm": (run_clm, "tiny_llama", ["--block_size", "16"]),
    }[request.param]
    words = ["--model_name_or_path", request.getfixturevalue(model), *shape, "--train_file", texts[request.param]]
    words += ["--validation_file", texts[request.param], "--do_train", "--do_eval"]
    return lambda *more: script.main([*words, *train_args(tmp_path / "out", max_steps=6), *more])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reaches_its_target_with_every_script(run, recipe, tmp_path):
    run("--pruning_config", str(recipe), "--logging_steps", "1")
    config = PruningConfig.from_file(recipe)
    report = read_json(tmp_path / "out" / "pruning_report.json")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    zeros = sum(int((weights[layer["name"]] == 0).sum()) for layer in report["layers"])
    target = config.resolve_groups()["weights"].target
    # Of coupled units a whole number is pruned in each layer.
    assert zeros / report["selected_weights"] == pytest.approx(target, abs=1e-3 if config.pattern != "neuron" else 0.2)
    history = read_json(tmp_path / "out" / "trainer_state.json")["log_history"]
    assert any("loss_distill" in entry for entry in history) == config.distills
    assert {"eval_accuracy", "eval_f1", "perplexity"} & read_json(tmp_path / "out" / "eval_results.json").keys()
