"""Runs the code and commands of a page of the documentation, in their order, on tiny models and files.

Python blocks share their names, and `model`, `train_dataset` and `eval_dataset`, which are there from the start. A
block whose first line is a comment with a file name, such as "# recipe.yaml", is written as that file. The comment
"<!-- not run: the reason -->" above a block leaves it out; so does a missing library that it imports.
"""

import importlib.util
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertTokenizer
from typer.testing import CliRunner

import hf_sparse.cli.app
from helpers.scripts import run_in_process
from helpers.tiny_texts import llama, save, texts, word_tokenizer, write_rows
from hf_sparse import Pruner, PruningConfig


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LIBRARIES = ("trl", "peft", "sentence_transformers", "openvino", "onnxruntime")
# Programs whose commands are for the reader alone.
NOT_RUN = ("pip", "git", "cd", "make", "hf", "bash", "accelerate", "torchrun")
TRAINING = shlex.split("--max_steps 6 --report_to none --use_cpu --disable_tqdm True --save_strategy no")
CALIBRATION = shlex.split("--length 16 --samples 8 --device cpu")
# More arguments for each command and script, which make it small.
SMALL = {
    "run_glue": TRAINING,
    "run_qa": TRAINING,
    "run_clm": [*TRAINING, "--block_size", "16"],
    "run_oneshot": CALIBRATION,
    "prune": CALIBRATION,
    "bench": ["--runtime", "torch", "--seconds", "0"],
}


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, and why it is not run ("": it is)."""

    language: str
    text: str
    not_run: str = ""

    @property
    def file(self) -> str:
        """The name of the file that the block is, "" if it is none."""
        named = re.match(r"# ([\w./-]+\.(?:py|ya?ml))\n", self.text)
        return named[1] if named else ""

    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(text: str) -> Iterator[Block]:
    pattern = r"(?:^[ ]*<!-- not run: (.+?) -->\n+)?^([ ]*)```(\w+)[^\n]*\n(.*?)^\2```"
    for reason, _, language, code in re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL):
        yield Block(language, textwrap.dedent(code), reason)


def fill_workplace(folder: Path) -> None:
    """Writes the models and files that the pages take for granted; the current folder must be `folder`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    sizes = {"hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), **sizes)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained("path/to/model")
    for name in ("path/to/model", "google-bert/bert-base-uncased"):
        BertForSequenceClassification(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name, options in {
        "out": {"pattern": "2:4"},
        "out-finetuned": {"pattern": "2:4"},
        "pruned": {"pattern": "neuron", "target_sparsity": 0.5},
    }.items():
        model = BertForSequenceClassification.from_pretrained("path/to/model")
        pruning = PruningConfig(criterion="magnitude", **options)
        report = Pruner(model, pruning).update(1, 1)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        report.save(f"{name}/pruning_report.json")
        pruning.save(f"{name}/pruning_config.json")
    rows = [{"sentence": f"a very {word} film", "label": label} for label, word in enumerate(("bad", "good"))] * 16
    for name in ("train.json", "dev.json"):
        Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    save(Path("path/to/llm"), llama(), word_tokenizer())
    for name, count in (("train.jsonl", 60), ("dev.jsonl", 20)):
        write_rows(Path(name), [{"text": text} for text in texts(count)])
    (folder / "scripts").symlink_to(ROOT / "scripts")


def first_names() -> dict[str, Any]:
    """Returns the names that the Python code of a page finds."""
    dataset = [{"input_ids": torch.tensor([2, 8, 9, 5 + label, 7, 3]), "labels": label} for label in (0, 1)] * 8
    model = AutoModelForSequenceClassification.from_pretrained("path/to/model")
    return {"model": model, "train_dataset": dataset, "eval_dataset": dataset}


@dataclass
class PageRun:
    """Runs a page in the current folder, which `fill_workplace` has filled.

    Args:
        names: of its Python code.
        output: of its commands.
        ran: the blocks and commands that ran.
    """

    names: dict[str, Any] = field(default_factory=first_names)
    output: str = ""
    ran: list[str] = field(default_factory=list)

    def run(self, text: str) -> "PageRun":
        for block in blocks(text):
            if block.not_run:
                continue
            if block.file:
                Path(block.file).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                self.run_python(block)
            elif block.language == "bash":
                for command in block.commands():
                    self.run_command(command)
        return self

    def run_python(self, block: Block) -> None:
        libraries = re.findall(rf"^(?:from|import) ({'|'.join(LIBRARIES)})\b", block.text, flags=re.MULTILINE)
        if all(importlib.util.find_spec(library) for library in libraries):
            exec(compile(block.text, "<page>", "exec"), self.names)  # noqa: S102 - our own documentation
            self.ran.append(block.text)

    def run_command(self, command: str) -> None:
        line, _, target = command.partition(" > ")
        words = shlex.split(line, comments=True)
        if words[0] in NOT_RUN:
            return
        if words[0] == "hf-sparse":
            self.run_hf_sparse(words, target)
        else:
            run_in_process(shlex.join(words), *SMALL.get(Path(words[1]).stem, ()))
        self.ran.append(command)
        if "--output_dir" in words:
            check_zeros(Path(words[words.index("--output_dir") + 1]))

    def run_hf_sparse(self, words: list[str], target: str) -> None:
        if words[1] == "export" and not importlib.util.find_spec("openvino"):
            return
        result = CliRunner().invoke(hf_sparse.cli.app.app, [*words[1:], *SMALL.get(words[1], ())])
        if result.exit_code:
            raise AssertionError(f"{shlex.join(words)}: {result.output}") from result.exception
        self.output += result.output
        if target:
            Path(target.strip()).write_text(result.stdout, encoding="utf-8")


def check_zeros(folder: Path) -> None:
    """Raises an AssertionError unless the report of a folder, if there is one, agrees with its weights."""
    path = folder / "pruning_report.json"
    if path.exists() and not (folder / "pruning_shrink.json").exists():
        report, weights = json.loads(path.read_text(encoding="utf-8")), load_file(folder / "model.safetensors")
        zeros = sum(int((weights[layer["name"]] == 0).sum()) for layer in report["layers"])
        if not zeros == report["selected_zeros"] > 0:
            raise AssertionError(f"{folder} has {zeros} zeros, its report says {report['selected_zeros']}")
