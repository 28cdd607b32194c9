"""Shared by the example scripts: arguments, logging, loading of models, and the train and finish steps."""

import json
import logging
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import transformers
import yaml
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
)

from hf_sparse import UploadError, load_plugin
from hf_sparse.hub.card_metadata import HELP, CardMetadata
from hf_sparse.local_paths import is_local, published_name


logger = logging.getLogger("scripts.common")

# YAML 1.1 reads 5e-5 as text (it requires 5.0e-5), and a learning rate that is text fails only during training.
_FLOAT_WITHOUT_POINT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass
class PluginArguments:
    """Plug-ins with methods of your own. They are loaded before the options of pruning are checked."""

    plugin: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files (my_methods.py) or modules (my_package.methods) that register methods of your own.",
            "action": "extend",
        },
    )

    def __post_init__(self):
        for plugin in [self.plugin] if isinstance(self.plugin, str) else self.plugin:
            load_plugin(plugin)


@dataclass
class ModelArguments:
    """Checkpoint, configuration and tokenizer to start from."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the pretrained model."})
    config_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the configuration. Left out: that of the model."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer. Left out: that of the model."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads and prepared data."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the fast tokenizer where there is one."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: str | None = field(
        default=None, metadata={"help": "Hub access token. Left out: the one stored by `hf auth login`."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code from the model repository. Read that code first."}
    )
    base_model: str | None = field(default=None, metadata={"help": HELP["base_model"]})
    license: str | None = field(default=None, metadata={"help": HELP["license"]})
    datasets: list[str] | None = field(default=None, metadata={"help": HELP["datasets"], "nargs": "+"})
    pipeline_tag: str | None = field(default=None, metadata={"help": HELP["pipeline_tag"]})
    dense_results: str | None = field(
        default=None,
        metadata={"help": "all_results.json of a run without pruning, for the comparison in the model card."},
    )

    def __post_init__(self):
        self.card_metadata()

    def card_metadata(self) -> CardMetadata:
        """Returns what the user says of the model for its card."""
        return CardMetadata(self.base_model, self.license, self.datasets, self.pipeline_tag)

    def hub_kwargs(self) -> dict:
        """Returns the arguments shared by all `from_pretrained` calls."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


def parse_args(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """Parses a command line, or the one .json or .yaml file that it names, into the given dataclasses.

    Adds the option `--plugin`, and `--no_X` for each boolean option X.

    Args:
        dataclass_types: the dataclasses, in the order in which their instances are returned.
        argv: arguments without the name of the program; `sys.argv[1:]` if None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser((PluginArguments, *dataclass_types))
    if len(argv) != 1 or not argv[0].endswith((".json", ".yaml", ".yml")):
        _, *parsed = parser.parse_args_into_dataclasses(args=_expand_negations(argv, dataclass_types))
        return tuple(parsed)
    path = Path(argv[0])
    if not path.is_file():
        raise FileNotFoundError(f'argument file "{path}" does not exist.')
    # JSON is a subset of YAML.
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f'argument file "{path}" must hold one mapping of argument names to values.')
    _, *parsed = parser.parse_dict({name: _as_number(value) for name, value in values.items()})
    return tuple(parsed)


def _expand_negations(argv: list[str], dataclass_types: tuple) -> list[str]:
    """Replaces `--no_X` and `--no-X` of boolean options by `--X false`.

    HfArgumentParser adds `--no_X` only where the default is True, and that of an option of pruning is None.
    """
    hints = [typing.get_type_hints(dataclass_type) for dataclass_type in dataclass_types]
    flags = {name for types in hints for name, kind in types.items() if kind in (bool, bool | None)}
    expanded = []
    for argument in argv:
        match = re.fullmatch(r"--no[-_]([\w-]+)", argument)
        name = match[1].replace("-", "_") if match else None
        expanded += [f"--{name}", "false"] if name in flags else [argument]
    return expanded


def _as_number(value):
    return float(value) if isinstance(value, str) and _FLOAT_WITHOUT_POINT.fullmatch(value) else value


def setup_logging(training_args: TrainingArguments) -> None:
    """Logs to stdout: INFO on the main process unless `--log_level` says otherwise, warnings on the others."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    if training_args.should_log and training_args.log_level == "passive":
        level = logging.INFO
    else:
        level = training_args.get_process_log_level()
    for name in ("scripts", "hf_sparse"):
        logging.getLogger(name).setLevel(level)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    logger.info(
        f"process {training_args.process_index} of {training_args.world_size} on {training_args.device}, "
        f"16-bit training: {training_args.fp16 or training_args.bf16}"
    )


def require_work(training_args: TrainingArguments, model_args: ModelArguments) -> None:
    """Raises an error for a run with nothing to do, or without the file that it would read at its end."""
    if model_args.dense_results is not None and not Path(model_args.dense_results).is_file():
        raise FileNotFoundError(f'dense_results "{model_args.dense_results}" does not exist.')
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("nothing to do: pass --do_train, --do_eval or --do_predict.")


def resume_point(training_args: TrainingArguments) -> str | bool | None:
    """Converts `--resume_from_checkpoint` to the argument of `Trainer.train`: True, None or an existing folder.

    On the command line True is the text "True", which the Trainer would take for the name of a folder.
    """
    value = training_args.resume_from_checkpoint
    if value is None or isinstance(value, bool):
        return value or None
    if value.lower() in ("true", "false"):
        return value.lower() == "true" or None
    if not Path(value).is_dir():
        raise FileNotFoundError(
            f'resume_from_checkpoint "{value}" is not a folder. Pass the path of a checkpoint-N folder, or True for '
            f'the last checkpoint in "{training_args.output_dir}".'
        )
    return value


def load_tokenizer(model_args: ModelArguments):
    """Loads the tokenizer. Without a padding token, the end-of-text token is used for padding."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, use_fast=model_args.use_fast_tokenizer, **model_args.hub_kwargs())
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model_args: ModelArguments, **kwargs):
    """Loads the configuration; `kwargs` override its fields."""
    name = model_args.config_name or model_args.model_name_or_path
    return AutoConfig.from_pretrained(name, **model_args.hub_kwargs(), **kwargs)


def use_mean_loss(model) -> None:
    """Declares to the Trainer that the loss of this model is the mean over one micro-batch.

    The Trainer assumes that every model with `forward(..., **kwargs)` divides its loss by `num_items_in_batch`. BERT's
    heads for classification and question answering accept **kwargs and ignore that number, so that their loss and
    gradients would be n times too large with n accumulation steps, and again times the number of processes under DDP.
    Heads that use the number return the same mean without it. Here each example is one item, so the mean is right for
    both.
    """
    model.accepts_loss_kwargs = False


def sequence_length(requested: int, tokenizer) -> int:
    """Returns the length to truncate to: the requested one, or the tokenizer's limit if that is shorter."""
    if requested > tokenizer.model_max_length:
        logger.warning(
            f"max_seq_length {requested} is more than the tokenizer's limit; using {tokenizer.model_max_length}."
        )
    return min(requested, tokenizer.model_max_length)


def build_collator(tokenizer, pad_to_max_length: bool, training_args):
    """Returns the collator: rows of one length need no padding, others are padded per batch, in 16-bit training to a
    multiple of 8 tokens."""
    if pad_to_max_length:
        return default_data_collator
    in_16_bit = training_args.fp16 or training_args.bf16
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if in_16_bit else None)


def card_kwargs(model_args: ModelArguments, data_args, task: str) -> dict:
    """Returns the arguments of `create_model_card` that describe the origin of the model and its data."""
    kwargs = {"finetuned_from": model_args.model_name_or_path, "tasks": task}
    if data_args.dataset_name is not None:
        name, config = published_name(data_args.dataset_name), data_args.dataset_config_name
        kwargs |= {"dataset_tags": data_args.dataset_name, "dataset": f"{name} {config}" if config else name}
        kwargs |= {"dataset_args": config} if config else {}
    return kwargs | model_args.card_metadata().to_dict()


def trainers_card_kwargs(kwargs: dict) -> dict:
    """Returns the arguments for a run without pruning, whose card is Trainer's: without the path of a local model."""
    base = kwargs.get("base_model", kwargs["finetuned_from"])
    return {**kwargs, "finetuned_from": None if is_local(base) else base}


def train(trainer, n_samples: int | None) -> None:
    """Trains, saves the model and the tokenizer, and writes train_results.json and trainer_state.json."""
    result = trainer.train(resume_from_checkpoint=resume_point(trainer.args))
    metrics = dict(result.metrics)
    if n_samples is not None:
        metrics["train_samples"] = n_samples
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def report(trainer, split: str, metrics: dict) -> None:
    """Prints metrics and writes them to {split}_results.json and all_results.json."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def finish(trainer, card_kwargs: dict, model_args: ModelArguments) -> None:
    """Pushes the model to the Hub with `--push_to_hub`, else writes its card. Exits with code 1 if an upload fails."""
    if model_args.dense_results is not None:
        trainer.dense_metrics = json.loads(Path(model_args.dense_results).read_text(encoding="utf-8"))
    if trainer.sparsity_callback is None or trainer.sparsity_callback.pruner is None:
        card_kwargs = trainers_card_kwargs(card_kwargs)
    try:
        if trainer.args.push_to_hub:
            trainer.push_to_hub(**card_kwargs)
        else:
            trainer.create_model_card(**card_kwargs)
    except UploadError as error:
        sys.exit(str(error))
    trainer.accelerator.end_training()  # of several processes, none may exit while its backend still runs
