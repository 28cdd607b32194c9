"""Loads the model that is to be pruned, by the class that its config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..hub.card import auto_class


DTYPES = ("auto", "bfloat16", "float16", "float32")


def auto_class_of(config: Any) -> str:
    """The name of the class of transformers that opens a checkpoint with its head.

    Example:
        >>> from transformers import BertConfig
        >>> auto_class_of(BertConfig(architectures=["BertForMaskedLM"])), auto_class_of(BertConfig())
        ('AutoModelForMaskedLM', 'AutoModel')
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if known := auto_class(architecture):
        return known
    # Code that comes with a checkpoint says which classes it has; the longest end that fits is the head's.
    own = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    fitting = [name for name in own if architecture.endswith(name.removeprefix("AutoModel"))]
    return max(fitting, key=len, default="AutoModel")


def load_model(
    name: str,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    offload_folder: str | None = None,
    **hub_options: Any,
) -> nn.Module:
    """A pretrained model with its head, on `device`, or spread out by `device_map`.

    Args:
        name: folder or Hub name.
        dtype: one of `DTYPES`; auto is the checkpoint's.
        device_map: auto, balanced, sequential, the name of a device, or a JSON object of modules and devices.
        offload_folder: where the weights go that the map sends to disk.
        hub_options: cache_dir, revision, token, trust_remote_code.

    Raises:
        OSError: there is no such model.
        ValueError: options that do not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f'dtype is "{dtype}": it must be one of {", ".join(DTYPES)}.')
    try:
        config = transformers.AutoConfig.from_pretrained(name, **hub_options)
    except (OSError, ValueError) as error:
        raise OSError(f'"{name}" is no model that can be opened, neither a folder nor on the Hub: {error}') from error
    spread = {}
    if device_map is not None:
        spread = {"device_map": _read_map(device_map)} | ({"offload_folder": offload_folder} if offload_folder else {})
    opener = getattr(transformers, auto_class_of(config))
    model = opener.from_pretrained(name, config=config, dtype=dtype, **spread, **hub_options)
    return (model if spread else model.to(device)).eval()


def load_tokenizer(name: str, **hub_options: Any) -> Any:
    """The tokenizer of a model.

    Raises:
        OSError: there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(name, **hub_options)
    except (OSError, ValueError) as error:
        raise OSError(
            f'"{name}" has no tokenizer to read texts with ({error}): name one with tokenizer_name.'
        ) from error


def _read_map(device_map: str) -> str | dict[str, str | int]:
    """A word, or a JSON object, or a file of one."""
    if device_map.endswith(".json") and Path(device_map).is_file():
        device_map = Path(device_map).read_text(encoding="utf-8")
    if not device_map.lstrip().startswith("{"):
        return device_map
    try:
        return json.loads(device_map)
    except json.JSONDecodeError as error:
        raise ValueError(f"device_map is no JSON object: {error}.") from error
