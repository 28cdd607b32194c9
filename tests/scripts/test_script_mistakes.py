"""Mistakes that users of the scripts make: one line each, with options as they are typed, and exit code 2."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_clm
import run_glue
import run_oneshot
import run_qa
import torch
from _program import run_program
from helpers.programs import run_launcher
from helpers.scripts import SCRIPTS as FOLDER
from helpers.scripts import sentiment_rows, write_rows
from transformers import PreTrainedModel


SCRIPTS = {"glue": run_glue, "qa": run_qa, "clm": run_clm, "oneshot": run_oneshot}
DATA = "--train_file {rows} --validation_file {rows}"
GLUE = f"--model_name_or_path {{bert}} --do_train --output_dir {{out}} --use_cpu {DATA}"
PRUNED = f"{GLUE} --target_sparsity 0.5"
QA = "--model_name_or_path {qa} --do_train --output_dir {out} --use_cpu"
CLM = "--model_name_or_path {gpt2} --do_train --output_dir {out} --use_cpu --train_file {text}"
ONESHOT = "--model_name_or_path {gpt2} --output_dir {out} --target_sparsity 0.5 --calibration_file {text}"

BEST = "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end --metric_for_best_model"

# Found before the weights of a model are loaded.
MISTAKES = [
    # Names of options.
    ("glue", f"{PRUNED} --target_sparsty 0.5", 'unknown option --target_sparsty. Did you mean "--target_sparsity"?'),
    ("glue", f"{GLUE} --frobnicate", "unknown option --frobnicate. --help lists all options."),
    ("glue", f"{GLUE} stray", "unknown option stray."),
    ("qa", f"{QA} --train_fil {{rows}} --batchsize 4", "unknown option --batchsize."),
    ("oneshot", f"{ONESHOT} --sovler sparsegpt", 'Did you mean "--solver"?'),
    ("glue", f"{GLUE} --max", "ambiguous option: --max could match"),
    ("glue", "--do_train --output_dir {out}", "the following arguments are required: --model_name_or_path"),
    ("glue", f"{GLUE} --learning_rate", "--learning_rate: expected one argument"),
    # Values.
    ("glue", f"{GLUE} --learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
    ("glue", f"{GLUE} --save_strategy sometimes", "--save_strategy: invalid choice: 'sometimes'"),
    ("glue", f"{GLUE} --target_sparsity 80", "--target_sparsity is 80.0: it must be a number from 0 to 1"),
    ("glue", f"{PRUNED} --pattern 4x", "pattern"),
    ("glue", f"{PRUNED} --criterion magnitud", 'criterion is "magnitud": known are'),
    ("glue", f"{PRUNED} --criterion wanda", '--criterion "wanda" needs inputs of the weights'),
    ("glue", f"{PRUNED} --scope rows", '--scope is "rows": it must be row or layer or global.'),
    ("glue", f"{PRUNED} --criterion_kwargs {{{{x", "--criterion_kwargs"),
    ("glue", f"{PRUNED} --scope global --allocation erdos_renyi", "use --scope layer, or leave one of them out."),
    (
        "glue",
        f"{PRUNED} --optim schedule_free_adamw --lr_scheduler_type constant",
        "--optim schedule_free_adamw keeps",
    ),
    ("glue", f"{GLUE} --task_name sst3", '--task_name "sst3" is not a GLUE task. Choose one of: cola, mnli'),
    ("clm", f"{CLM} --validation_split_percentage 0", "--validation_split_percentage 0 must be between 1 and 99."),
    ("clm", f"{CLM} --block_size 1000", "--block_size 1000 must be at least 2 and at most 32"),
    ("clm", f"{CLM} --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("clm", f"{CLM} --streaming", "pass --max_steps with --streaming."),
    ("oneshot", f"{ONESHOT} --dtype int8", '--dtype is "int8": it must be one of auto, bfloat16'),
    ("oneshot", f"{ONESHOT} --device cuda", "--device is cuda, but torch finds no CUDA device here"),
    ("oneshot", f"{ONESHOT} --device tpu9", '--device is "tpu9"'),
    (
        "oneshot",
        f"{ONESHOT} --device_map ballanced",
        '--device_map is "ballanced": it must be auto, balanced, balanced_low_0, sequential, a device such as',
    ),
    ("oneshot", f"{ONESHOT} --samples 0", "--samples is 0"),
    ("oneshot", f"{ONESHOT} --batch_size 0", "--batch_size is 0"),
    (
        "oneshot",
        f"{ONESHOT} --solver sparsegpt --scope global",
        "use --scope layer, or name a criterion, as in --criterion wanda.",
    ),
    # Combinations.
    ("glue", "--model_name_or_path {bert} --output_dir {out} --task_name sst2", "nothing to do: pass --do_train"),
    ("glue", "--model_name_or_path {bert} --output_dir {out} --do_train", "no data: pass --task_name, --dataset_name"),
    ("glue", f"{GLUE} --dataset_name imdb", "--dataset_name and data files exclude each other"),
    ("glue", f"{GLUE} --shrink", "--shrink is set, but nothing is pruned: add --pattern neuron and --target_sparsity"),
    (
        "glue",
        f"{GLUE} --pattern 4x1 --scope layer",
        "--pattern, --scope have no effect, because nothing is pruned: give --target_sparsity, as in --target_spar",
    ),
    ("glue", f"{PRUNED} --heterogeneous", "--heterogeneous needs --shrink: set --shrink, or leave --heterogeneous"),
    ("glue", f"{PRUNED} --rewind 0.9 --prune_end 0.5", "--rewind is 0.9, not before --prune_end, 0.5"),
    ("glue", f"{GLUE} --fp16", "--fp16 needs a GPU, and this run is on the CPU: use --bf16, or leave --fp16 out."),
    (
        "glue",
        f"{PRUNED} --eval_dense",
        "--eval_dense compares before and after training: add --do_train and --do_eval",
    ),
    (
        "glue",
        f"{PRUNED} --do_eval --eval_dense --dense_results {{rows}}",
        "--eval_dense and --dense_results exclude each other",
    ),
    ("oneshot", f"{ONESHOT} --eval", "--eval needs texts: pass --validation_file"),
    ("oneshot", f"{ONESHOT} --pattern 2:4 --target_sparsity 0.6", 'but --pattern "2:4" always gives 0.5'),
    ("glue", f"{GLUE} --report_to wandb", '--report_to is "wandb", which is not installed here: install it, or use'),
    ("glue", f"{GLUE} --push_to_hub", "--push_to_hub needs a token: log in with `hf auth login`"),
    ("glue", f"{PRUNED} --load_best_model_at_end", "--load_best_model_at_end"),
    # Files and folders.
    ("glue", f"{PRUNED} --pruning_config no.yaml", "--pruning_config no.yaml cannot be read: [Errno 2] No such file"),
    (
        "glue",
        f"{GLUE} --pruning_config {{recipe}}",
        'unknown option "target_sparsty". Did you mean "target_sparsity"?',
    ),
    ("glue", f"{PRUNED} --plugin no.py", "no.py: there is no such file"),
    ("glue", f"{PRUNED} --dense_results no.json", '--dense_results "no.json" does not exist'),
    ("glue", f"{PRUNED} --dense_results {{empty}}", "has no metrics: give all_results.json of a run with --do_eval"),
    ("glue", f"{GLUE} --resume_from_checkpoint nowhere", '--resume_from_checkpoint "nowhere" is not a folder'),
    ("glue", f"{GLUE} --resume_from_checkpoint True", "--resume_from_checkpoint is True, but there is no checkpoint"),
    ("glue", GLUE.replace("{out}", "{rows}/out"), "is a file: name another folder."),
    ("oneshot", ONESHOT.replace("{out}", "{rows}/out"), "is a file: name another folder."),
    ("oneshot", ONESHOT.replace("{out}", "{bert}"), "is not empty: name another folder, or pass --overwrite."),
    ("glue", GLUE.replace("{bert}", "./no/such/model"), '--model_name_or_path: there is no folder "./no/such/model".'),
    (
        "glue",
        GLUE.replace("{bert}", "no-such/model"),
        'there is no folder "no-such/model", and the Hub cannot be asked',
    ),
    ("glue", GLUE.replace("{bert}", "{bert}s"), "Did you mean"),
    ("qa", f"{QA.replace('{qa}', '{nothing}')} --train_file {{rows}}", "it has no config.json"),
    ("clm", CLM.replace("{gpt2}", "{torn}"), "is damaged or not a safetensors file"),
    ("oneshot", ONESHOT.replace("{gpt2}", "{torn}"), "is damaged or not a safetensors file"),
    ("glue", f"{PRUNED} --distill_teacher ./no/teacher", '--distill_teacher: there is no folder "./no/teacher".'),
    ("glue", f"{PRUNED} --distill_teacher {{torn}}", "--distill_teacher: "),
    ("glue", f"{GLUE} --tokenizer_name ./nowhere", '--tokenizer_name: there is no folder "./nowhere".'),
    # Data.
    ("glue", GLUE.replace("{rows}", "no.csv"), 'train file "no.csv" does not exist'),
    ("glue", GLUE.replace("{rows}", "{text}"), "must end with one of: .csv, .tsv, .json"),
    ("glue", f"{GLUE.replace('{rows}', '{nameless}')}", "no text column found: the data has words, label"),
    ("glue", f"{GLUE} --task_name mrpc", 'Name the text columns "sentence1" and "sentence2"'),
    ("glue", f"{GLUE} --do_predict", "--do_predict needs a split named"),
    ("qa", f"{QA} --train_file {{rows}}", "--doc_stride 128 must be at least 0 and less than the window of 64 tokens"),
    (
        "qa",
        f"{QA} --train_file {{rows}} --doc_stride 8",
        'the train split has no column "question", "context"',
    ),
    ("clm", CLM.replace("{text}", "{rows2}"), 'the train split has no column "text"'),
    ("oneshot", ONESHOT.replace("{text}", "no.txt"), 'calibration file "no.txt" does not exist'),
    # Metrics.
    (
        "glue",
        f"{PRUNED} {BEST} accuracyy",
        '--metric_for_best_model is "accuracyy", which no evaluation gives: it must be loss or accuracy. Did you '
        'mean "accuracy"?',
    ),
    ("glue", f"{PRUNED} --task_name cola {BEST} eval_matthews", 'Did you mean "eval_matthews_correlation"?'),
    ("clm", f"{CLM} {BEST} perplexity", 'is "perplexity", which no evaluation gives: it must be loss or accuracy.'),
    (
        "qa",
        f"{QA} --train_file {{rows}} {BEST} loss",
        'is "loss", which no evaluation gives: it must be exact_match or f1.',
    ),
    ("oneshot", f"{ONESHOT} --text_column words", 'there is no column "words": the data have "text".'),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_bert, tiny_bert_qa, tiny_gpt2):
    """Paths of models and files by the names in the command lines."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "text.txt").write_text("the film is good\n" * 50)
    (folder / "empty.json").write_text("{}")
    (folder / "recipe.yaml").write_text("target_sparsty: 0.5\n")
    (folder / "nothing").mkdir()
    shutil.copytree(tiny_gpt2, folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {
        "bert": tiny_bert,
        "qa": tiny_bert_qa,
        "gpt2": tiny_gpt2,
        "out": folder / "out",
        "rows": write_rows(folder / "rows.csv", sentiment_rows(8)),
        "rows2": write_rows(folder / "rows2.csv", sentiment_rows(8)),
        "nameless": write_rows(folder / "nameless.csv", [{"words": "a", "label": 0}]),
        **{
            path.stem: path for path in folder.iterdir() if path.stem in ("text", "empty", "recipe", "nothing", "torn")
        },
    }


@pytest.fixture
def run(places, capfd):
    """Runs a script in this process. Returns its exit code and what it has printed on stderr."""

    def run_script(script: str, command: str) -> SimpleNamespace:
        words = [word.format(**places) for word in command.split()]
        with pytest.raises(SystemExit) as done:
            run_program(SCRIPTS[script].main, SCRIPTS[script].CLASSES, words)
        return SimpleNamespace(code=done.value.code, err=capfd.readouterr().err)

    return run_script


@pytest.mark.parametrize("script, command, text", MISTAKES)
def test_a_mistake_is_one_line(run, monkeypatch, places, script, command, text):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    done = run(script, command)
    lines = [line for line in done.err.splitlines() if line and not line.startswith("Generating")]
    assert done.code == 2 and text in lines[-1], done.err
    assert lines[-1].startswith(f"run_{script}.py: ") and len(lines) == 1, done.err
    assert not Path(places["out"]).exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_seq_lenght: 16", 'unknown option max_seq_lenght. Did you mean "max_seq_length"?'),
        ("max_seq_length: long", "`max_seq_length` is 'long': it must be a whole number."),
        ("learning_rate: fast", "`learning_rate` is 'fast': it must be a number."),
        ("do_train: 1", "`do_train` is 1: it must be true or false."),
        ("target_sparsity: 80", "`target_sparsity` is 80: it must be a number from 0 to 1"),
        ("- do_train", "must hold one mapping of argument names to values."),
        ("do_train: [", "cannot be read"),
    ],
)
def test_a_mistake_in_a_file_of_arguments(run, places, tmp_path, text, message):
    """Options are named as in the file."""
    content = (
        "" if text.startswith("-") else f"model_name_or_path: {places['bert']}\noutput_dir: out\ntask_name: sst2\n"
    )
    (tmp_path / "arguments.yaml").write_text(f"{content}{text}\n")
    done = run("glue", str(tmp_path / "arguments.yaml"))
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err, done.err


def test_an_error_inside_torch_keeps_its_traceback(monkeypatch):
    """It is no mistake in an option."""
    one, two = torch.ones(1), torch.ones(2)
    monkeypatch.setattr(run_glue, "check_run", lambda *_: torch.nn.functional.binary_cross_entropy(one, two))
    with pytest.raises(ValueError, match="target size"):
        run_program(run_glue.main, run_glue.CLASSES, "--model_name_or_path m --output_dir o --task_name sst2".split())


def test_several_processes_print_a_mistake_once():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = run_launcher([*command, str(FOLDER / "run_oneshot.py"), "--samples", "8"], environment)
    assert done.returncode and done.stderr.count("run_oneshot.py: missing model: ") == 1, done.stderr


@pytest.mark.parametrize("rank, waits", [(None, []), ("0", []), ("1", [60.0])])
def test_a_process_that_is_not_ended_for_the_mistake_of_the_first_prints_its_own(run, monkeypatch, rank, waits):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    done = run("oneshot", "--sovler none")
    assert done.code == 2 and done.err.count("\n") == 1 and slept == waits


@pytest.mark.parametrize("task", [*run_glue.TASK_COLUMNS, None])
def test_the_metrics_of_an_evaluation_can_select_the_best_model(task, tmp_path):
    """Those that the script computes, and what Trainer adds."""
    strategy = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    names = run_glue.metric_names(task, task == "stsb")
    assert ("combined_score" in names) == (task in ("mrpc", "qqp", "stsb"))
    for name in (*names, *(f"eval_{name}" for name in names), "eval_samples_per_second"):
        args = run_glue.SparseTrainingArguments(
            str(tmp_path), do_train=True, use_cpu=True, metric_for_best_model=name, **strategy
        )
        run_glue.check_best_metric(args, names)
