"""CardMetadata: what the files of a model do not say of it, and a user gives for the metadata of its card."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..local_paths import is_path


HELP = {
    "base_model": "Model card: Hub name of the base model. Default: the model that was pruned, if it is on the Hub.",
    "license": "Model card: license of the model, as in apache-2.0.",
    "datasets": "Model card: Hub names of the datasets that the model was trained on.",
    "pipeline_tag": "Model card: task of the model as the Hub names it, as in text-classification.",
}
"""The option of each field, for command lines."""


@dataclass(frozen=True)
class CardMetadata:
    """Metadata of a model card that a user gives. They replace what was found, and what the card had.

    Args:
        base_model: Hub name of the model that was pruned; of several, for merged models, a list.
        license: the Hub's name of a license.
        datasets: Hub names of data sets.
        pipeline_tag: the Hub's name of the task.

    Raises:
        ValueError: a value that the Hub would refuse.

    Example:
        >>> CardMetadata(license="mit", datasets="glue").to_dict()
        {'license': 'mit', 'datasets': ['glue']}
        >>> CardMetadata(base_model="/home/me/bert")
        Traceback (most recent call last):
            ...
        ValueError: `base_model` is "/home/me/bert": it must be the name of a model on the Hub, as in "user/name". ...
    """

    base_model: str | list[str] | None = field(default=None, metadata={"help": HELP["base_model"]})
    license: str | None = field(default=None, metadata={"help": HELP["license"]})
    datasets: list[str] | str | None = field(default=None, metadata={"help": HELP["datasets"]})
    pipeline_tag: str | None = field(default=None, metadata={"help": HELP["pipeline_tag"]})

    def __post_init__(self) -> None:
        errors = [
            f'`{option}` is "{name}": it must be the name of a {kind} on the Hub, as in "user/name". A local '
            f"one is named without its folders if `{option}` is left out."
            for option, kind in (("base_model", "model"), ("datasets", "dataset"))
            for name in _as_list(getattr(self, option))
            if not is_hub_name(name)
        ]
        for option, example in (("license", "apache-2.0"), ("pipeline_tag", "text-classification")):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, str) and value and value == value.strip().lower()):
                errors.append(f'`{option}` is "{value}": write it in lower case as the Hub does, as in {example}.')
        if errors:
            raise ValueError(" ".join(errors))

    def to_dict(self) -> dict[str, Any]:
        """Returns the values that were given, under the Hub's names."""
        values = {item.name: getattr(self, item.name) for item in fields(self)} | {"datasets": _as_list(self.datasets)}
        return {name: value for name, value in values.items() if value not in (None, [], "")}


def is_hub_name(name: Any) -> bool:
    """Whether a repository on the Hub can have this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not is_path(name)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
