"""Shared by the example scripts that train: checks, logging, loading of models, and the train and finish steps."""

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import transformers
from huggingface_hub import get_token
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, default_data_collator
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint

from hf_sparse import SparseTrainingArguments, SparsityCallback, UploadError
from hf_sparse.config.distillation import SELF
from hf_sparse.files import DENSE_RESULTS_FILE, check_writable, read_json, write_json
from hf_sparse.hub.card import select_metrics
from hf_sparse.hub.card_metadata import HELP, CardMetadata
from hf_sparse.hub.next_steps import format_next_steps
from hf_sparse.hub.sources import check_model, check_tokenizer_source
from hf_sparse.local_paths import is_local, published_name
from hf_sparse.registry import nearest


logger = logging.getLogger("scripts.common")

# Trainer adds these to the metrics of every evaluation.
_SPEED_METRICS = ("runtime", "samples_per_second", "steps_per_second")


@dataclass
class ModelArguments:
    """Checkpoint, configuration and tokenizer to start from."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the pretrained model."})
    config_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the configuration. Default: that of the model."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer. Default: that of the model."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads and prepared data."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the fast tokenizer where there is one."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: str | None = field(
        default=None, metadata={"help": "Hub access token. Default: the one stored by `hf auth login`."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code from the model repository. Read that code first."}
    )
    base_model: str | None = field(default=None, metadata={"help": HELP["base_model"]})
    license: str | None = field(default=None, metadata={"help": HELP["license"]})
    datasets: list[str] | None = field(default=None, metadata={"help": HELP["datasets"], "nargs": "+"})
    pipeline_tag: str | None = field(default=None, metadata={"help": HELP["pipeline_tag"]})
    eval_dense: bool = field(
        default=False,
        metadata={
            "help": "Evaluate the model before training too, for the comparison in the model card: of a model that is "
            "fine-tuned for the task already."
        },
    )
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


def setup_logging(training_args: SparseTrainingArguments) -> None:
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


def check_run(training_args: SparseTrainingArguments, model_args: ModelArguments) -> None:
    """Checks what needs neither the model nor the data, before either is loaded.

    Raises:
        ValueError, OSError: options that contradict each other, or a file, folder or model that does not exist.
    """
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("nothing to do: pass `do_train`, `do_eval` or `do_predict`.")
    _check_comparison(training_args, model_args)
    SparsityCallback().check(training_args, None)
    if training_args.do_train and (error := training_args.unused_error()) is not None:
        raise ValueError(error)
    if training_args.shrink and not training_args.prunes:
        raise ValueError('`shrink` is set, but nothing is pruned: add `pattern="neuron"` and `target_sparsity=0.5`.')
    if training_args.fp16 and training_args.device.type == "cpu":
        raise ValueError("`fp16` needs a GPU, and this run is on the CPU: use `bf16`, or leave `fp16` out.")
    if training_args.push_to_hub and (training_args.hub_token or get_token()) is None:
        raise ValueError("`push_to_hub` needs a token: log in with `hf auth login`, or leave `push_to_hub` out.")
    available = get_available_reporting_integrations()
    if missing := [name for name in training_args.report_to if name not in available]:
        raise ValueError(
            f'`report_to` is "{missing[0]}", which is not installed here: install it, or use '
            f"{' or '.join(f'`report_to={name}`' for name in [*available, 'none'])}."
        )
    if training_args.should_save:
        check_writable(training_args.output_dir, f"`output_dir` {training_args.output_dir}")
    if training_args.do_train:
        resume_point(training_args)
    _check_sources(training_args, model_args)


def _check_comparison(training_args: SparseTrainingArguments, model_args: ModelArguments) -> None:
    if model_args.eval_dense and not (training_args.do_train and training_args.do_eval):
        raise ValueError("`eval_dense` compares before and after training: add `do_train` and `do_eval`.")
    if model_args.eval_dense and model_args.dense_results is not None:
        raise ValueError("`eval_dense` and `dense_results` exclude each other: leave one of them out.")
    if model_args.dense_results is not None:
        if not Path(model_args.dense_results).is_file():
            raise FileNotFoundError(f'`dense_results` "{model_args.dense_results}" does not exist.')
        if not select_metrics(read_json(model_args.dense_results)):
            raise ValueError(
                f'`dense_results` "{model_args.dense_results}" has no metrics: give all_results.json of a run with '
                "`do_eval`."
            )


def _check_sources(training_args: SparseTrainingArguments, model_args: ModelArguments) -> None:
    """Checks that models and tokenizers exist, which transformers takes half a minute to find out."""
    access = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    named = access | {"revision": model_args.model_revision}
    if model_args.model_name_or_path is not None:
        check_model(model_args.model_name_or_path, "model_name_or_path", **named)
    if model_args.tokenizer_name is not None:
        check_tokenizer_source(model_args.tokenizer_name, "tokenizer_name", **named)
    teacher = training_args.distill_teacher
    if training_args.do_train and teacher not in (None, SELF):
        check_model(teacher, "distill_teacher", cache_dir=None, token=training_args.hub_token)


def check_best_metric(training_args: SparseTrainingArguments, names: Iterable[str]) -> None:
    """Checks before training what Trainer finds out at the first evaluation.

    Args:
        names: of the metrics of an evaluation during training, without "eval_".

    Raises:
        ValueError: `metric_for_best_model` is none of them.
    """
    given = training_args.metric_for_best_model
    if given is None or not training_args.do_train or training_args.eval_strategy == "no":
        return
    prefix = "eval_" if given.startswith("eval_") else ""
    names = [f"{prefix}{name}" for name in names]
    if given not in names and given.removeprefix("eval_") not in _SPEED_METRICS:
        raise ValueError(
            f'`metric_for_best_model` is "{given}", which no evaluation gives: it must be {" or ".join(names)}.'
            f"{nearest(given, names)}"
        )


def resume_point(training_args: SparseTrainingArguments) -> str | bool | None:
    """Converts `--resume_from_checkpoint` to the argument of `Trainer.train`: True, None or an existing folder.

    On the command line True is the text "True", which the Trainer would take for the name of a folder.
    """
    value = training_args.resume_from_checkpoint
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(value, str) and not Path(value).is_dir():
        raise FileNotFoundError(
            f'`resume_from_checkpoint` "{value}" is not a folder. Pass the path of a checkpoint-N folder, or True for '
            f'the last checkpoint in "{training_args.output_dir}".'
        )
    output = training_args.output_dir
    if value is True and not (Path(output).is_dir() and get_last_checkpoint(output)):
        raise FileNotFoundError(
            f'`resume_from_checkpoint` is True, but there is no checkpoint in "{output}": leave it out to start anew.'
        )
    return value or None


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
            f"`max_seq_length` {requested} is more than the tokenizer's limit; using {tokenizer.model_max_length}."
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
    return {**kwargs, "finetuned_from": None if base is None or is_local(base) else base}


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


def check_dense_head(model_args: ModelArguments, loading_info: dict) -> None:
    """Raises an error for `--eval_dense` where the checkpoint has no head for the task.

    Args:
        loading_info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
    """
    new = sorted(loading_info["missing_keys"]) + sorted(name for name, *_ in loading_info["mismatched_keys"])
    if model_args.eval_dense and new:
        raise ValueError(
            f'`eval_dense`: "{model_args.model_name_or_path}" lacks {len(new)} weights for this task, such as '
            f'"{new[0]}", so that its metrics would be those of random weights. Fine-tune it without pruning first, '
            "and pass the all_results.json of that run as `dense_results`."
        )


def measure_dense(trainer, evaluate: Callable[[], dict[str, float]], model_args: ModelArguments) -> None:
    """Gives the trainer the metrics of the dense model, measured before training or those of another run."""
    if model_args.dense_results is not None:
        trainer.dense_metrics = read_json(model_args.dense_results)
    if not model_args.eval_dense:
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "`eval_dense` evaluates before training, when FSDP and DeepSpeed have not split the model: pass the "
            "all_results.json of a run without pruning as `dense_results`."
        )
    trainer.dense_metrics = evaluate()
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / DENSE_RESULTS_FILE, trainer.dense_metrics)


def report(trainer, split: str, metrics: dict) -> None:
    """Prints metrics and writes them to {split}_results.json and all_results.json."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def finish(trainer, card_kwargs: dict) -> None:
    """Pushes the model to the Hub with `--push_to_hub`, else writes its card, and prints what can be done next. Exits
    with code 1 if an upload fails."""
    if trainer.sparsity_callback is None or trainer.sparsity_callback.pruner is None:
        card_kwargs = trainers_card_kwargs(card_kwargs)
    try:
        if trainer.args.push_to_hub:
            trainer.push_to_hub(**card_kwargs)
        else:
            trainer.create_model_card(**card_kwargs)
    except UploadError as error:
        sys.exit(str(error))
    if trainer.is_world_process_zero():
        print(_closing_lines(trainer))
    trainer.accelerator.end_training()  # of several processes, none may exit while its backend still runs


def _closing_lines(trainer) -> str:
    """Returns the comparison with the dense model, or how to get one, and what can be done next."""
    lines, output = [""], trainer.args.output_dir
    dense, found = select_metrics(trainer.dense_metrics), select_metrics(trainer.saved_metrics)
    shared = [name for name in found if name in dense]
    for name in shared:
        lines.append(f"{name}: {dense[name]:.4f} dense, {found[name]:.4f} now ({found[name] - dense[name]:+.4f})")
    if trainer.args.prunes and trainer.args.do_eval and not shared:
        lines.append(
            "to compare with the dense model: run the same command without the options of pruning and with another "
            "--output_dir, then this one with --dense_results OTHER/all_results.json; or, if the model is fine-tuned "
            "for the task already, add --eval_dense."
        )
    if not trainer.args.do_train:
        return "\n".join(lines).lstrip("\n")
    lines.append(f"saved to {output}, with its model card, {Path(output) / 'README.md'}")
    if not trainer.args.prunes:
        lines.append(
            f"next: prune it by the same command with --target_sparsity 0.8, --dense_results "
            f"{Path(output) / 'all_results.json'} and another --output_dir"
        )
        return "\n".join(lines)
    return "\n".join([*lines, format_next_steps(output, is_pushed=trainer.args.push_to_hub)])
