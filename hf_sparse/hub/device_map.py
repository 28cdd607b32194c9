"""Where accelerate puts the parts of a model."""

from __future__ import annotations

from typing import Any

import torch

from ..distributed import parse_device
from ..files import parse_json, read_json
from ..registry import format_value, nearest


STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate divides a model by itself."""


def parse_device_map(text: str) -> str | dict[str, Any]:
    """Returns the argument `device_map` of `from_pretrained` for an option on a command line.

    Args:
        text: one of `STRATEGIES`, a device, or a JSON object that maps modules to devices, numbers of GPUs or "disk",
            or the name of a .json file with one.

    Raises:
        ValueError: it is none of these, or there is no such device.

    Example:
        >>> parse_device_map("auto"), parse_device_map('{"model.layers.0": "cpu", "lm_head": "disk"}')
        ('auto', {'model.layers.0': 'cpu', 'lm_head': 'disk'})
        >>> parse_device_map("ballanced")
        Traceback (most recent call last):
        ...
        ValueError: `device_map` is "ballanced": it must be auto, balanced, balanced_low_0, sequential, a device such \
as cpu or cuda:0, or a JSON object that maps modules to devices, also in a .json file. Did you mean "balanced"?
    """
    is_file = text.endswith(".json")
    if text in STRATEGIES:
        return text
    if not is_file and not text.lstrip().startswith("{"):
        if not _is_device(text):
            raise ValueError(
                f'`device_map` is "{text}": it must be {", ".join(STRATEGIES)}, a device such as cpu or cuda:0, or a '
                "JSON object that maps modules to devices, also in a .json file."
                f"{nearest(text, [*STRATEGIES, 'cpu', 'cuda'])}"
            )
        parse_device(text, "device_map")
        return text
    try:
        places = read_json(text) if is_file else parse_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"`device_map` is not a JSON object: {error}.") from error
    if not isinstance(places, dict) or not places:
        raise ValueError(f"`device_map` must map modules to devices, but is {format_value(places)}.")
    for module, place in places.items():
        if not (type(place) is int and place >= 0) and place != "disk" and not _is_device(place):
            raise ValueError(
                f'`device_map` maps "{module}" to {format_value(place)}: it must be a device such as cpu or cuda:0, '
                "the number of a GPU, or disk."
            )
        if isinstance(place, str) and place != "disk":
            parse_device(place, "device_map")
    return places


def _is_device(name: object) -> bool:
    try:
        return isinstance(name, str) and torch.device(name).type != "meta"
    except RuntimeError:
        return False
