"""Checks before training that a teacher fits the student: same inputs, same outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from ...config.distillation import DistillationOptions
from .distiller import forward_arguments
from .teacher import TeacherError


logger = logging.getLogger(__name__)

# The classes whose logits are of the vocabulary, so that labels of a config mean nothing.
_LANGUAGE_MODELS = {
    name
    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT")
    for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values()
}
_QUESTION_ANSWERING = set(modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the logits of a token are of the next one: in causal language models, with or without images.

    Example:
        >>> shifts_labels(nn.Linear(2, 2))
        False
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    name = type(model).__name__.removeprefix("FSDP")
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return name in causal or getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")


def check_fit(options: DistillationOptions, student: nn.Module, teacher: nn.Module) -> None:
    """Compares the configs of teacher and student.

    Raises:
        TeacherError: they differ in what their inputs and outputs mean.
    """
    mine, other = (getattr(model, "config", None) for model in (student, teacher))
    if not isinstance(mine, PreTrainedConfig) or not isinstance(other, PreTrainedConfig):
        return
    errors = list(_differences(options, type(student).__name__.removeprefix("FSDP"), mine, other))
    if errors:
        raise TeacherError("\n".join(errors))


def check_hidden_states(student: nn.Module, teacher: nn.Module) -> None:
    """Checks that both models can be asked for their hidden states.

    Raises:
        TeacherError: a forward does not take output_hidden_states.

    Example:
        >>> check_hidden_states(nn.Linear(2, 2), nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        hf_sparse.training.distillation.teacher.TeacherError: `distill_hidden` compares hidden states, but the \
forward of the model (Linear) does not take output_hidden_states: add it, or leave `distill_hidden` out.
    """
    for kind, model in {"model": student, "teacher": teacher}.items():
        accepted = forward_arguments(model)
        if accepted is not None and "output_hidden_states" not in accepted:
            raise TeacherError(
                f"`distill_hidden` compares hidden states, but the forward of the {kind} ({type(model).__name__}) "
                "does not take output_hidden_states: add it, or leave `distill_hidden` out."
            )


def _differences(
    options: DistillationOptions, student_class: str, student: PreTrainedConfig, teacher: PreTrainedConfig
) -> Iterator[str]:
    name = options.distill_teacher
    mine, other = _sizes(student), _sizes(teacher)
    if None not in (mine["vocab_size"], other["vocab_size"]) and mine["vocab_size"] != other["vocab_size"]:
        yield (
            f"`distill_teacher` is {name}, with a vocabulary of {other['vocab_size']:,} tokens, but that of the model "
            f"has {mine['vocab_size']:,}: use a teacher with the tokenizer of the model."
        )
    sizes = (mine["hidden_size"], other["hidden_size"])
    if options.distill_hidden and None not in sizes and sizes[0] != sizes[1]:
        yield (
            f"`distill_hidden` compares hidden states, but those of {name} have size {sizes[1]}, those of the model "
            f"{sizes[0]}: use a teacher of the same hidden size, or `distill_hidden=0`."
        )
    if bool(getattr(student, "is_encoder_decoder", False)) != bool(getattr(teacher, "is_encoder_decoder", False)):
        yield f"`distill_teacher` is {name}, and either it or the model has no decoder after an encoder: use one kind."
    if not options.distill_alpha or student_class in _LANGUAGE_MODELS or student_class in _QUESTION_ANSWERING:
        return
    if student.num_labels != teacher.num_labels:
        yield (
            f"`distill_teacher` is {name}, with {teacher.num_labels} labels, but the model has {student.num_labels}: "
            "use a teacher that is fine-tuned for the same task, or `distill_alpha=0` and `distill_hidden`."
        )
    else:
        yield from _label_errors(str(name), student, teacher)
    problems = (getattr(student, "problem_type", None), getattr(teacher, "problem_type", None))
    if None not in problems and problems[0] != problems[1]:
        yield (
            f"`distill_teacher` is {name}, whose problem_type is {problems[1]}, but that of the model is "
            f"{problems[0]}: use a teacher that is fine-tuned for the same task."
        )


def _sizes(config: PreTrainedConfig) -> dict[str, int | None]:
    return {name: getattr(config.get_text_config(), name, None) for name in ("vocab_size", "hidden_size")}


def _label_errors(name: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Iterator[str]:
    """Yields an error if the same labels have other numbers, and warns of other names."""
    mine, other = (_named_labels(config) for config in (student, teacher))
    if not mine or not other or mine == other:
        return
    if set(mine) == set(other):
        listed = ", ".join(f"{label} is {number}" for label, number in other.items())
        yield (
            f"`distill_teacher` is {name}, which numbers the labels otherwise than the model ({listed}): give the "
            "model the label2id of the teacher."
        )
    else:
        logger.warning(
            "`distill_teacher` %s names its labels %s, the model %s: the same order is assumed.",
            name,
            ", ".join(other),
            ", ".join(mine),
        )


def _named_labels(config: PreTrainedConfig) -> dict[str, int]:
    """Returns the numbers of the labels by their names in lower case; {} where they have no names of their own."""
    labels: Mapping[Any, Any] = config.id2label or {}
    if all(str(label) in (f"LABEL_{number}", str(number)) for number, label in labels.items()):
        return {}
    return {str(label).lower(): int(number) for number, label in labels.items()}


def check_tokenizer(name: str, tokenizer: Any, token: str | None = None) -> None:
    """Compares the tokenizer of a run, or of its processor, with the one beside the teacher, if there is one.

    Raises:
        TeacherError: a number means different tokens.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    try:
        other = AutoTokenizer.from_pretrained(name, **({"token": token} if token else {}))
    except (OSError, ValueError, ImportError, KeyError) as error:
        logger.warning(
            "`distill_teacher` %s has no tokenizer to compare with that of the model, and must have the same. (%s)",
            name,
            error,
        )
        return
    mine, theirs = ({number: word for word, number in each.get_vocab().items()} for each in (tokenizer, other))
    differing = sorted(number for number in mine.keys() & theirs.keys() if mine[number] != theirs[number])
    if differing:
        number = differing[0]
        raise TeacherError(
            f"`distill_teacher` is {name}, whose tokenizer is another one: token {number} is {theirs[number]!r} "
            f"there, and {mine[number]!r} here ({len(differing):,} differ). Use a teacher with the tokenizer of the "
            "model."
        )
