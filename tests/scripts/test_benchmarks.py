"""Each benchmark runs, at a size too small to measure speed, and prints its rows."""

import importlib.util
import json
import re
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
from helpers.scripts import SCRIPTS
from helpers.tiny_texts import bert_tokenizer, classifier, save, texts, write_rows


ALONE = ["--repeats", "1", "--threads", "1"]
SMALL = ["--layers", "1", "--hidden", "64"]
WAYS = ("hf_sparse", "torch.nn.utils.prune")
# By name: options, and the lines that are printed last, as patterns in which N is a number.
BENCHES = {
    "rank": (
        ["--millions", "1", "--side-by-side", *ALONE],
        [
            "exact selection by .w. over 1M weights in 2 layers",
            r"1 thread.* a read takes [\d.]+ ms",
            "  50% over all layers: N reads",
            "  90% over all layers: N reads",
            "  90%, at most 92% of each: N reads",
            "  90% of each layer: N reads",
            "  writing the int8 masks: N reads",
            *(f"  90% over the same weights in {count} layers: N reads, N ms" for count in (12, 200, 2000)),
            "peak beyond the weights: N%",
            "cat [+] kthvalue: N reads, peak N%",
        ],
    ),
    "nm": (
        ["--millions", "1", "--layer", "64", "128", "--side-by-side", *ALONE],
        [
            f"{name}, 1 thread.*: {way} N reads"
            for name in ("1M weights", "one layer, 64 x 128")
            for way in ("2:4 masks of .w. in", "topk and scatter in")
        ],
    ),
    "step": (
        [
            "--steps",
            "16",
            "--batch",
            "2",
            "--tokens",
            "8",
            "--threads",
            "1",
            "--trainings",
            "gradual",
            "distill",
            *SMALL,
        ],
        [
            "steps of 2 x 8 tokens, medians over steps",
            *(
                f"{criterion} +1 thread.*: step +N ms without, ratio in situ N, whole steps interleaved N, "
                "1.00 byte of mask per weight, a prune step N steps"
                for criterion in ("magnitude", "snip_momentum")
            ),
            *(
                f"{name} +1 thread.*: step +N ms without, unstructured, ratio N [(]N to N[)], with a prune step N"
                for name in ("gradual", "distill")
            ),
        ],
    ),
    "dist": (
        ["--model", "tiny", "--modes", "fsdp2", "--settings", "snip_momentum global", "magnitude row"],
        [
            "tiny, 2 processes of one thread.*",
            "mode +setting +received .*",
            r"fsdp2 +snip_momentum global +[1-9]\d* kB +N% +[1-9]\d* kB +[1-9]\d* +N MB +N% +N +N",
            r"fsdp2 +magnitude row +[1-9]\d* kB +N% +[1-9]\d* kB +[1-9]\d* +N MB +N% +N *",
        ],
    ),
    "structured": (
        ["--repeats", "1", "--threads", "1", *SMALL],
        [
            rf"{pattern} +{criterion} +1 thread.*: single weights N ms, ratio N [(]N to N[)]"
            for pattern in ("neuron", "head")
            for criterion in ("magnitude", "snip_momentum")
        ],
    ),
    "others": (
        ["--batch", "2", "--tokens", "8", *SMALL, *ALONE],
        [
            "a prune step over [\\d,]+ weights, in reads of them .*",
            *(rf"80% of single weights +{name} +N reads, N zero, N state-dict keys changed" for name in WAYS),
            "2:4 +hf_sparse +N reads, N zero, 0 state-dict keys changed",
            "2:4 +torch.ao.pruning +N reads, N zero, N state-dict keys changed",
            "a training step of 2 x 8 tokens, relative to one without pruning",
            *(rf"{name} +N" for name in ("plain", "hf_sparse", "hf_sparse, snip_momentum", "torch.nn.utils.prune")),
        ],
    ),
    "oneshot": (
        ["--intermediate", "64", "--vocabulary", "50", "--samples", "2", "--length", "8", *SMALL, *ALONE]
        + ["--methods", "magnitude", "wanda", "sparsegpt 2:4", "wanda+tuning"],
        [
            r"0M weights to prune to 50% in a model of 0 MB, 2 x 8 tokens in batches of 1, 1 thread.*",
            "method +form +seconds +forwards = forward [+] stats [+] solve +peak +solving +plain +prototype",
            *(
                rf"{name} +{form} +N +N = +N [+] +N [+] +N +Nx +Nx.*"
                for name, forms in {
                    "magnitude": [2],
                    "wanda": [2, 1, "plain"],
                    "sparsegpt 2:4": [2, 1, "plain"],
                    "wanda[+]tuning": [2],
                }.items()
                for form in forms
            ),
        ],
    ),
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    return importlib.import_module("bench")


def last_lines(printed: str, patterns: list[str]) -> None:
    """Asserts that the output ends with lines of these patterns, in which N is a number."""
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) >= len(patterns), printed
    for line, pattern in zip(lines[-len(patterns) :], patterns, strict=True):
        assert re.fullmatch(re.sub(r"\bN", r"[\\d.]+", pattern), line), f"{line!r} is not {pattern!r}"


@pytest.mark.parametrize("name", BENCHES)
def test_the_benchmark_prints_its_rows(bench, capsys, monkeypatch, name):
    options, patterns = BENCHES[name]
    monkeypatch.setattr(bench.oneshot, "check", lambda: None)
    bench.main([name, *options])
    last_lines(capsys.readouterr().out, patterns)


def test_the_quality_of_structured_pruning_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    structured_quality = importlib.import_module("structured_quality")
    model = save(tmp_path / "model", classifier(), bert_tokenizer())
    data = write_rows(tmp_path / "texts.json", [{"sentence": text} for text in texts(12)])
    methods = ["fluctuation+bias", "default", "obs+lstsq"]
    options = ["--rows", "both 50%", "--min_words", "3", "--methods", *methods]
    structured_quality.main([model, data, data, *options])
    number = r"-?[\d.]+"
    rows = [rf"both 50% +{re.escape(name)} +{number} +1.\d\d passes +\d+ factors +{number} s" for name in methods]
    last_lines(capsys.readouterr().out, rows)


def test_the_quality_of_methods_is_measured_once_per_row(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    quality = importlib.import_module("oneshot_quality")
    model = save(tmp_path / "model", classifier(), bert_tokenizer())
    rows = [{"sentence": text, "label": number % 2} for number, text in enumerate(texts(12))]
    files = [write_rows(tmp_path / name, rows) for name in ("train.json", "dev.json", "test.json")]
    options = ["--samples", "8", "--length", "8", "--output", str(tmp_path / "rows.jsonl")]
    options += ["--part", 'kept={"solver": "none"}', "--methods", "magnitude", "wanda+kept"]
    quality.main([model, *files, "--targets", "25%", *options])
    number = r"[\d.]+"
    printed = [
        rf"\| {t} \| {m} \|( {number} \|){{4}} {s} \|"
        for t, m, s in (
            ("25%", "magnitude", "25.00%"),
            (r"25%", r"wanda\+kept", "25.00%"),
            ("2:4", "magnitude", "50.00%"),
            ("2:4", r"wanda\+kept", "50.00%"),
        )
    ]
    last_lines(capsys.readouterr().out, printed[:2])
    stored = (tmp_path / "rows.jsonl").read_text()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"target": ')  # cut off
    quality.main([model, *files, "--targets", "25%", "2:4", *options])
    last_lines(capsys.readouterr().out, printed)
    assert (tmp_path / "rows.jsonl").read_text().startswith(stored)
    assert len(importlib.import_module("rows").read_rows(tmp_path / "rows.jsonl")) == 4
    with pytest.raises(SystemExit, match='"wande" is no part of a method: known are block_influence'):
        quality.main([model, *files, "--methods", "wande"])


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Returns a function that measures runs of a tiny model in which one word decides the label."""
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    quality = importlib.import_module("training_quality")
    model = save(tmp_path / "model", classifier(), bert_tokenizer())
    rows = [{"sentence": text, "label": number % 2} for number, text in enumerate(texts(12))]
    files = [write_rows(tmp_path / name, rows) for name in ("train.json", "dev.json", "test.json")]
    names = ("train_file", "validation_file", "test_file")
    data = ["--model_name_or_path", model, *(f"--{name}={file}" for name, file in zip(names, files, strict=True))]
    data += ["--max_seq_length", "16", "--use_cpu", "--output", str(tmp_path / "rows.jsonl")]
    return lambda *words: quality.main([*data, *map(str, words)])


def test_the_quality_of_training_is_measured_once_per_row(training, tmp_path, capsys, monkeypatch):
    number = r"[\d.]+"

    def line(target, method, runs, zeros):
        spread = rf"{number} ± {number}" if runs > 1 else number
        return rf"\| {target} \| {method} \| 1 \| {spread} \| {spread} \| {runs} \| {number} \| {zeros} \|"

    part = 'layer={"scope": "layer", "prune_end": 0.5}'
    training("--targets", "2:4", "--methods", "magnitude+layer", "--epochs", 1, "--part", part)
    last_lines(capsys.readouterr().out, [line("2:4", r"magnitude\+layer", 1, "50.00%")])
    (stored,) = importlib.import_module("rows").read_rows(tmp_path / "rows.jsonl")
    assert stored["dev"] == stored["test"] and 0 <= stored["dev"] <= 1  # of the same rows
    assert stored["options"] == {"pattern": "2:4", "criterion": "magnitude", "scope": "layer", "prune_end": 0.5}

    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(stored | {"seed": 1}) + "\n")
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no such file")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):  # the other two are there
        training("--targets", "2:4", "--methods", "magnitude+layer", "--epochs", 1, "--part", part, "--seeds", 0, 1, 2)
    captured = capsys.readouterr()
    assert captured.err == "2:4 magnitude+layer failed: no such file\n"
    last_lines(captured.out, [line("2:4", r"magnitude\+layer", 2, "50.00%")])
    training("--table")
    last_lines(capsys.readouterr().out, [line("2:4", r"magnitude\+layer", 2, "50.00%")])


def test_the_error_of_one_of_several_threads_ends_all(bench):
    del bench  # its folder is imported from
    turns, order = importlib.import_module("turns"), []

    def work(name, switch):
        for step in range(3):
            switch()
            order.append(f"{name}{step}")
            if name == "b" and step == 1:
                raise ValueError("b fails")

    with pytest.raises(ValueError, match="b fails"):
        turns.run_in_turns([partial(work, name) for name in "abc"])
    assert order == ["a0", "b0", "c0", "a1", "b1"]


def test_all_trainings_in_turns_have_valid_options(bench, tmp_path):
    options = SimpleNamespace(steps=16, batch=2)
    for name, given in bench.step.TRAININGS.items():
        arguments = bench.step.sparse_arguments(str(tmp_path), name, options)
        assert arguments.resolve_groups()["weights"].target >= 0.5
        assert given.items() <= vars(arguments).items()


def test_no_benchmark_is_left_out(bench):
    assert BENCHES.keys() == bench.BENCHES.keys()


def test_both_ways_of_one_shot_pruning_give_the_same_masks_and_errors(bench, capsys):
    bench.oneshot.check()  # which fails if they do not
    compared = [method for method in bench.oneshot.METHODS.values() if method.plain is not None]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(compared)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one", "ddp", "zero1", "zero2", "zero3", "tp"])
def test_every_way_to_split_weights_is_measured(bench, capsys, mode):
    if mode.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    bench.main(["dist", "--model", "tiny", "--modes", mode, "--every-rank"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(mode)]
    assert [row[:28].split() for row in rows] == [
        [mode, *setting.split()] for setting in bench.dist.SETTINGS for _ in range(1 if mode == "one" else 2)
    ]
