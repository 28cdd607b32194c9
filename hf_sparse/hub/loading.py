"""Loads the model to prune, with the Auto class that its config names."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .auto_classes import auto_class
from .device_map import parse_device_map
from .sources import check_model


_ACCESS_OPTIONS = ("revision", "cache_dir", "token")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def auto_class_of(config: Any) -> str:
    """Returns the name of the transformers Auto class that loads a checkpoint with its head.

    Example:
        >>> from transformers import BertConfig
        >>> auto_class_of(BertConfig(architectures=["BertForMaskedLM"])), auto_class_of(BertConfig())
        ('AutoModelForMaskedLM', 'AutoModel')
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if name := auto_class(architecture):
        return name
    # The config of a model with remote code lists its Auto classes: the longest suffix that matches is the head's.
    candidates = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    matching = [name for name in candidates if architecture.endswith(name.removeprefix("AutoModel"))]
    return max(matching, key=len, default="AutoModel")


def load_model(
    name: str,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    offload_folder: str | None = None,
    **hub_options: Any,
) -> transformers.PreTrainedModel:
    """Loads a pretrained model with its head, in evaluation mode.

    Args:
        name: folder or Hub name.
        dtype: one of `DTYPES`; "auto" is the checkpoint's.
        device: of the model, unless `device_map` is given.
        device_map: see `parse_device_map`.
        offload_folder: folder for the weights that `device_map` offloads to disk.
        hub_options: cache_dir, revision, token, trust_remote_code.

    Raises:
        OSError: there is no such model.
        ValueError: an option is not valid, or a weight file is damaged.
    """
    if dtype not in DTYPES:
        raise ValueError(f'`dtype` is "{dtype}": it must be one of {", ".join(DTYPES)}.')
    check_model(name, **{option: value for option, value in hub_options.items() if option in _ACCESS_OPTIONS})
    try:
        config = transformers.AutoConfig.from_pretrained(name, **hub_options)
    except (OSError, ValueError) as error:
        raise OSError(f'"{name}" holds no model that transformers can open: {error}') from error
    placement: dict[str, Any] = {}
    if device_map is not None:
        placement["device_map"] = parse_device_map(device_map)
        if offload_folder:
            placement["offload_folder"] = offload_folder
    model_class = getattr(transformers, auto_class_of(config))
    model = model_class.from_pretrained(name, config=config, dtype=dtype, **placement, **hub_options)
    return (model if placement else model.to(device)).eval()


def load_tokenizer(name: str, **hub_options: Any) -> Any:
    """Loads the tokenizer of a model.

    Raises:
        OSError: there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(name, **hub_options)
    except (OSError, ValueError) as error:
        raise OSError(f'"{name}" has no tokenizer ({error}): name one with `tokenizer_name`.') from error
