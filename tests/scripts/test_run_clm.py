"""Runs run_clm.py on a tiny GPT-2 and a tiny Llama and small texts."""

import json
import math

import numpy as np
import pytest
import run_clm
import torch
from datasets import Dataset
from helpers.scripts import WORDS, read_json, train_args, word_tokenizer, write_rows, zero_fraction
from transformers import AutoModelForCausalLM, EvalPrediction, GPT2Config, LlamaConfig


@pytest.fixture
def text(tmp_path) -> str:
    """200 lines of 8 words in a fixed order."""
    lines = [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(8)) for start in range(0, 1600, 8)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "text.txt")


def arguments(model, output_dir, *more, **options) -> list[str]:
    return ["--model_name_or_path", model, *train_args(output_dir, **options), *more]


def test_training_reports_loss_perplexity_and_accuracy(tiny_llama, tmp_path, text):
    out = tmp_path / "out"
    parts = ["--train_file", text, "--do_train", "--do_eval", "--block_size", "16"]
    run_clm.main(arguments(tiny_llama, out, *parts, max_steps=60, learning_rate=0.01))
    metrics = read_json(out / "eval_results.json")
    # 5 % of 200 lines of 8 words are 80 words, or 5 blocks of 16; the other 1520 words are 95 blocks.
    assert metrics["eval_samples"] == 5 and read_json(out / "train_results.json")["train_samples"] == 95
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    # The order is fixed, so the next word can be learnt.
    assert metrics["eval_accuracy"] > 0.9 and metrics["perplexity"] < 2


def test_evaluation_alone_equals_the_model_called_directly(tiny_gpt2, tmp_path, text):
    """Blocks of 20 tokens have 19 predictions; the Trainer would divide by 20."""
    parts = ["--validation_file", text, "--do_eval", "--block_size", "20", "--max_eval_samples", "6"]
    run_clm.main(arguments(tiny_gpt2, tmp_path / "out", *parts, per_device_eval_batch_size=3))
    metrics = read_json(tmp_path / "out" / "eval_results.json")
    tokenizer, model = word_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    blocks = torch.tensor(tokenizer(open(text).read())["input_ids"][: 6 * 20]).reshape(6, 20)
    with torch.no_grad():
        output = model(input_ids=blocks, labels=blocks)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    right = (output.logits.argmax(-1)[:, :-1] == blocks[:, 1:]).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(right)


def test_a_model_from_scratch(tiny_gpt2, tmp_path, text):
    out = tmp_path / "out"
    parts = ["--model_type", "gpt2", "--config_overrides", "n_embd=8,n_layer=1,n_head=2,n_positions=16"]
    parts += ["--tokenizer_name", tiny_gpt2, "--train_file", text, "--do_train", *train_args(out, max_steps=1)]
    run_clm.main(parts)
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert (config.n_embd, config.n_layer, config.vocab_size) == (8, 1, len(WORDS) + 2)


def test_streaming_tables_with_the_texts_in_one_column(tiny_gpt2, tmp_path, text):
    rows = [{"number": index, "text": line} for index, line in enumerate(open(text).read().splitlines())]
    train, dev = write_rows(tmp_path / "train.jsonl", rows), write_rows(tmp_path / "dev.csv", rows[:20])
    out = tmp_path / "out"
    parts = ["--train_file", train, "--validation_file", dev, "--do_train", "--do_eval", "--streaming"]
    run_clm.main(arguments(tiny_gpt2, out, *parts, "--block_size", "16", "--max_eval_samples", "4"))
    assert read_json(out / "eval_results.json")["perplexity"] > 1
    assert "train_samples" not in read_json(out / "train_results.json")


def test_weights_are_loaded_in_the_given_type(tiny_gpt2, tmp_path, text):
    parts = ["--train_file", text, "--do_train", "--dtype", "bfloat16"]
    run_clm.main(arguments(tiny_gpt2, tmp_path / "out", *parts, max_steps=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "tokenizer_limit, positions, requested, expected",
    [
        (512, 2048, None, 512),
        (10**30, 256, None, 256),
        (10**30, 131072, None, 1024),
        (10**30, 131072, 4096, 4096),
        (512, 2048, 64, 64),
    ],
)
def test_block_size(tokenizer_limit, positions, requested, expected):
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = tokenizer_limit
    config = LlamaConfig(max_position_embeddings=positions)
    assert run_clm.choose_block_size(requested, tokenizer, config) == expected


def test_block_size_beyond_the_model_is_refused():
    tokenizer = word_tokenizer()
    for requested in (1, 33):
        with pytest.raises(ValueError, match=f"`block_size` {requested} must be at least 2 and at most 32"):
            run_clm.choose_block_size(requested, tokenizer, GPT2Config(n_positions=32))


def test_group_joins_rows_and_drops_the_rest():
    blocks = run_clm.group([[1, 2], [], [3, 4, 5], [6, 7]], block_size=3)
    assert blocks == {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[1, 2, 3], [4, 5, 6]]}


def test_token_accuracy_by_hand():
    # Predictions for tokens 1, 2, 3 are 5, 6, 7; the labels 5, 0 and -100 there: one of two is right.
    result = EvalPrediction(predictions=np.array([[5, 6, 7, 9]]), label_ids=np.array([[1, 5, 0, -100]]))
    assert run_clm.token_accuracy(result) == {"accuracy": 0.5}


def test_the_first_rows_are_split_off():
    data_args = run_clm.DataTrainingArguments(train_file="x.txt", validation_split_percentage=25)
    parts = run_clm.split_off_validation(Dataset.from_dict({"text": list("abcdefgh")}), data_args)
    assert list(parts["validation"]["text"]) == ["a", "b"] and list(parts["train"]["text"]) == list("cdefgh")
    with pytest.raises(ValueError, match="1 row.s. are too few to split off 25 %"):
        run_clm.split_off_validation(Dataset.from_dict({"text": ["a"]}), data_args)


@pytest.mark.parametrize(
    "parts, error, text",
    [
        (["--train_file", "{text}", "--do_train"], ValueError, "no model: pass `model_name_or_path`"),
        (["--model_type", "gpt2", "--train_file", "{text}"], ValueError, "needs `tokenizer_name`"),
        (["--model_type", "gtp2", "--tokenizer_name", "{model}"], ValueError, '`model_type` "gtp2" is not known'),
        (["{from}", "--config_overrides", "n_layer=1"], ValueError, "`config_overrides` only goes with `model_type`"),
        (["{from}", "--do_train"], ValueError, "no data: pass `dataset_name`"),
        (["{from}", "--train_file", "no.txt", "--do_train"], FileNotFoundError, '"no.txt" does not exist'),
        (["{from}", "--train_file", "{table}", "--do_train"], ValueError, 'the train split has no column "text"'),
        (["{from}", "--train_file", "{text}", "--do_train", "--block_size", "99"], ValueError, "at most 32"),
        (["{from}", "--train_file", "{short}", "--do_train"], ValueError, "shorter than one block of 32 tokens"),
        (["{from}", "--train_file", "{text}", "--do_eval", "--streaming"], ValueError, "pass `validation_file`"),
        (
            ["{from}", "--train_file", "{text}", "--do_train", "--streaming", "--max_steps", "-1"],
            ValueError,
            "pass `max_steps` with `streaming`",
        ),
    ],
)
def test_errors_are_raised_before_training(tiny_gpt2, tmp_path, text, parts, error):
    (tmp_path / "rows.txt").write_text("the film is fine\n" * 50)
    (tmp_path / "short.txt").write_text("the film\n")
    table = write_rows(tmp_path / "table.csv", [{"words": "a", "number": 1}])
    written = {"text": str(tmp_path / "rows.txt"), "short": str(tmp_path / "short.txt"), "table": table}
    written |= {"model": tiny_gpt2, "from": f"--model_name_or_path={tiny_gpt2}"}
    with pytest.raises(error) as caught:
        run_clm.main([*train_args(tmp_path / "out"), *(part.format(**written) for part in parts)])
    assert text in str(caught.value)


def is_block_matrix(name: str) -> bool:
    """Returns the weights of attention and MLP of both models, without embeddings and norms."""
    return name.startswith(("transformer.h.", "model.layers.")) and name.endswith(".weight")


def test_a_pruned_gpt2_has_its_zeros(tiny_gpt2, tmp_path, text):
    out = tmp_path / "out"
    parts = ["--train_file", text, "--do_train", "--do_eval", "--target_sparsity", "0.5"]
    run_clm.main(arguments(tiny_gpt2, out, *parts, max_steps=6))
    zeros, total = zero_fraction(AutoModelForCausalLM.from_pretrained(out).state_dict(), is_block_matrix)
    assert zeros == round(0.5 * total) and total > 0


def test_the_final_llama_has_fewer_heads_and_generates_the_same(tiny_llama, tmp_path, text):
    out = tmp_path / "out"
    parts = [
        "--train_file",
        text,
        "--do_train",
        "--do_eval",
        "--pattern",
        "head",
        "--target_sparsity",
        "0.5",
        "--shrink",
    ]
    run_clm.main(arguments(tiny_llama, out, *parts, max_steps=6, save_strategy="steps", save_steps=6))
    small, trained = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, out / "checkpoint-6"))
    assert (small.config.num_attention_heads, trained.config.num_attention_heads) == (1, 2)
    prompt = torch.tensor([[3, 4, 5]])
    texts = [model.generate(prompt, max_new_tokens=8, do_sample=False) for model in (small, trained)]
    assert torch.equal(*texts)


def test_the_script_prunes_a_llama(tiny_llama, tmp_path, text, capsys):
    """With a .json file of arguments."""
    content = {
        "model_name_or_path": tiny_llama,
        "train_file": text,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
        "target_sparsity": 0.5,
    }
    (tmp_path / "arguments.json").write_text(json.dumps(content))
    run_clm.main([str(tmp_path / "arguments.json")])
    assert "perplexity" in capsys.readouterr().out
    zeros, total = zero_fraction(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), is_block_matrix)
    assert zeros == round(0.5 * total) and total > 0
