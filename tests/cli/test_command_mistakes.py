"""Mistakes in commands of `hf-sparse`: one line each, with options as they are typed, exit code 2, and no output."""

import shutil

import pytest
from helpers.tiny_texts import llama, save, texts, word_tokenizer, write_rows

from hf_sparse.cli.app import app


PRUNE = "prune {model} {out} --target-sparsity 0.5 --calibration-file {texts}"

MISTAKES = [
    ("reprot {model}", "No such command 'reprot'. Did you mean 'report'"),
    ("report", "Missing argument"),
    ("report {model} --expekt 2:4", "--expekt"),
    ("report {model} --min-sparsity high", "Invalid value for '--min-sparsity'"),
    ("report {model} --min-sparsity 50", "--min-sparsity"),
    ("report {model} --expect 2;4", "2;4"),
    ("report {model} --verify", "pruning_report.json"),
    ("report {torn}", "model.safetensors"),
    ("compare {model} ./nowhere", "./nowhere does not exist"),
    ("report ./nowhere", "./nowhere does not exist"),
    ("methods --family criterium", 'Did you mean "criterion"?'),
    ("card {model}", "pruning_report.json does not exist"),
    ("push ./nowhere user/model", "nowhere"),
    (
        "push {model} user/model --token-from-env hf_secret",
        "--token-from-env takes the name of an environment variable",
    ),
    ("shrink ./nowhere {out}", 'there is no folder "./nowhere".'),
    ("shrink {torn} {out}", "is damaged or not a safetensors file"),
    ("shrink {model} {out} --layers first", '--layers is "first": write numbers with commas'),
    ("shrink {model} {texts}/out", "is a file: name another folder."),
    ("export {model} {out}", "Missing option '--to'"),
    ("export {model} {out} --to tflite", '--to is "tflite": it must be onnx or openvino.'),
    ("export {model} {out} --to openvino --int8", "--int8 needs --calibration-file"),
    ("export {model} {texts}/out --to onnx", "is a file: name another folder."),
    ("export {model} {out} --to onnx --calibration-file no.txt", 'calibration file "no.txt" does not exist'),
    ("export {model} {out} --to onnx --calibration-file {texts} --text-column words", 'no column "words"'),
    ("bench ./nowhere", 'there is no folder "./nowhere".'),
    ("bench {model} {model}", "a model is named twice"),
    ("bench {model} --runtime tensorrt", '--runtime is "tensorrt": it must be one of'),
    ("bench {model} --device cuda", "--device is cuda, but torch finds no CUDA device here: use --device cpu."),
    ("bench {model} --batch 0", "--batch is [0]"),
    ("bench {model} --plot {texts}/figure.png", "is a file"),
    (f"{PRUNE} --target-sparsitty 0.5", "--target-sparsity"),
    (f"{PRUNE} --device cuda", "--device is cuda, but torch finds no CUDA device here: use --device cpu."),
    (f"{PRUNE} --device-map sequental", 'Did you mean "sequential"?'),
    (f"{PRUNE} --device-map cuda", "--device-map is cuda, but torch finds no CUDA device here: use --device-map cpu."),
    (
        f'{PRUNE} --device-map {{{{"model":"gpu"}}}}',
        """--device-map maps "model" to 'gpu': it must be a device such""",
    ),
    (f"{PRUNE} --samples 0", "--samples is 0: it must be 1 or more."),
    (f"{PRUNE} --samples 4 --length 1", "--length is 1: it must be 2 or more."),
    (f"{PRUNE} --samples many", "Invalid value for '--samples'"),
    (f"{PRUNE} --text-column words", 'there is no column "words": the data have "text".'),
    (f"{PRUNE} --criterion wandaa", 'Did you mean "wanda"?'),
    (f"{PRUNE} --pattern 2:3", "leave --target-sparsity out"),
    (f"{PRUNE} --solver-kwargs damp", "--solver-kwargs is 'damp': it must be a JSON object"),
    (f"{PRUNE} --pruning-config no.yaml", "--pruning-config no.yaml cannot be read"),
    (f"{PRUNE} --plugin no.py", "no.py: there is no such file"),
    (f"{PRUNE} --tokenizer-name ./nowhere", "--tokenizer-name: there is no folder"),
    (PRUNE.replace("{model}", "./nowhere"), 'there is no folder "./nowhere".'),
    (PRUNE.replace("{model}", "{torn}"), "is damaged or not a safetensors file"),
    (PRUNE.replace("{out}", "{model}"), "is not empty: name another folder, or pass --overwrite."),
    (PRUNE.replace("{out}", "{texts}/out"), "is a file: name another folder."),
    (PRUNE.replace("{texts}", "no.txt"), 'calibration file "no.txt" does not exist'),
    (
        f"{PRUNE} --streaming --dataset-split dev",
        "--dataset-split, --streaming have no effect without --dataset-name:",
    ),
    (f"{PRUNE} --validation-file dev.txt", "--validation-file has no effect without --eval: give that too, or leave"),
    (f"{PRUNE} --offload-folder x", "--offload-folder has no effect without --device-map"),
    (f"{PRUNE} --model-revision v1", "--model-revision is of models on the Hub, and"),
    ("export {model} {out} --to onnx --samples 7", "--samples has no effect without --calibration-file"),
    ("prune {model} --target-sparsity 0.5", "missing output folder: pass OUTPUT_DIR"),
    (
        "prune {model} {out} --target-sparsity 0.5",
        "needs calibration data: pass --calibration-file or",
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Paths by the names in the command lines."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_rows(folder / "texts.jsonl", [{"text": text} for text in texts(60)])
    model = save(folder / "model", llama(), word_tokenizer())
    shutil.copytree(model, folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"model": model, "torn": folder / "torn", "texts": folder / "texts.jsonl", "out": folder / "out"}


@pytest.mark.parametrize("command, text", MISTAKES)
def test_a_mistake_is_one_line(places, capfd, command, text):
    words = [word.format(**places) for word in command.split()]
    with pytest.raises(SystemExit) as done:
        app(words, prog_name="hf-sparse")
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line and not line.startswith("Generating")]
    assert done.value.code == 2 and len(lines) == 1, err
    assert lines[0].startswith("hf-sparse: ") and text in lines[0]
    assert not places["out"].exists()
    # Nothing was loaded for it.
    assert out == ""
