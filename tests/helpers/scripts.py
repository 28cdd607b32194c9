"""Tiny models and files for the tests of the example scripts. Nothing is downloaded."""

import importlib
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


for variable in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(variable, "1")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


GOOD, BAD, FILL = ("good", "great", "fine"), ("bad", "poor", "awful"), ("the", "film", "is", "a", "story", "and")
PLACES = ("paris", "rome", "oslo", "bonn")
NAMES = ("anna", "ben", "carl", "dora")
WORDS = [*GOOD, *BAD, *FILL, *PLACES, *NAMES, "lives", "in", "where", "does", "live", "?", "."]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_script_loggers():
    """Resets the log levels, which a run sets."""
    yield
    logging.getLogger("scripts").setLevel(logging.NOTSET)


def bert_tokenizer(max_length: int = 64) -> BertTokenizer:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: index for index, word in enumerate(vocab)}, model_max_length=max_length)


def bert_config(**kwargs) -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )


def save(model_class, config, tokenizer, folder: Path) -> str:
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    return save(BertForSequenceClassification, bert_config(), bert_tokenizer(), folder)


@pytest.fixture(scope="session")
def tiny_bert_qa(tmp_path_factory) -> str:
    return save(BertForQuestionAnswering, bert_config(), bert_tokenizer(), tmp_path_factory.mktemp("bert_qa"))


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> str:
    config = GPT2Config(vocab_size=len(WORDS) + 2, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return save(GPT2LMHeadModel, config, word_tokenizer(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return save(LlamaForCausalLM, config, word_tokenizer(), tmp_path_factory.mktemp("llama"))


def sentiment_rows(count: int) -> list[dict]:
    """Returns sentences in which one word determines the label, 0 (bad) and 1 (good) alternating."""
    rows = []
    for index in range(count):
        word = (BAD, GOOD)[index % 2][index // 2 % 3]
        rows.append({"sentence": f"the {FILL[index % 6]} is {word}", "label": index % 2})
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    """Writes rows in the format of the file's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("".join(separator.join(str(value) for value in line) + "\n" for line in lines))
    return str(path)


def train_args(output_dir: Path, **kwargs) -> list[str]:
    """Returns the arguments of a short run on the CPU."""
    options = {
        "output_dir": output_dir,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | kwargs
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def zero_fraction(state_dict: dict, is_pruned) -> tuple[int, int]:
    """Returns the numbers of zeros and of weights of the matrices whose name `is_pruned` accepts."""
    chosen = [tensor for name, tensor in state_dict.items() if tensor.dim() == 2 and is_pruned(name)]
    return sum(int((tensor == 0).sum()) for tensor in chosen), sum(tensor.numel() for tensor in chosen)


def is_encoder_matrix(name: str) -> bool:
    """Returns whether the weight is a matrix of BERT's layers, not of embeddings, pooler or task head."""
    return name.startswith("bert.encoder.") and name.endswith(".weight")


def run_in_process(command: str, *more: str) -> None:
    """Runs a command such as "python scripts/run_glue.py --do_train", with more arguments, in this process."""
    program, script, *words = shlex.split(command)
    if program != "python":
        raise ValueError(f"{command} starts another program")
    importlib.import_module(Path(script).stem).main([*words, *more])


def run_script(script: str, argument: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a script in a new process."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(SCRIPTS.parent)]))
    command = [sys.executable, str(SCRIPTS / script), argument]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
