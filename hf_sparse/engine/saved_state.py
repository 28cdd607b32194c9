"""Checks the description of a saved pruner, `Pruner.state_dict`, before anything is computed from it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any


_MAX_COUNT = 2**63 - 1
_MAX_DIMENSIONS = 64  # of a torch tensor
_COUNTERS = ("count", "stale")


def check_saved_state(values: Mapping[str, Any]) -> None:
    """Checks the JSON values of `Pruner.state_dict`: their types, and that every region lies within its weight.

    The time that this takes is proportional to the number of values, whatever they are.

    Raises:
        ValueError: naming the value that is not as `state_dict` writes it.
    """
    for key in ("shapes", "boxes", "counters"):
        if not isinstance(values.get(key), Mapping):
            raise ValueError(f"{key} must be an object, but is {reprlib.repr(values.get(key))}")
    shapes = values["shapes"]
    for name, shape in shapes.items():
        if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(shape) > _MAX_COUNT:
            raise ValueError(f"the shape of {reprlib.repr(name)} is {reprlib.repr(shape)}")
    for key in ("boxes", "counters"):
        if unknown := values[key].keys() - shapes.keys():
            raise ValueError(f"{key} has the unknown weight {reprlib.repr(min(unknown))}")
    for name, regions in values["boxes"].items():
        if not isinstance(regions, (list, tuple)) or not all(_is_region(region, shapes[name]) for region in regions):
            raise ValueError(f"{reprlib.repr(name)} of shape {shapes[name]} has the regions {reprlib.repr(regions)}")
    for name, counters in values["counters"].items():
        is_known = isinstance(counters, Mapping) and all(counter in _COUNTERS for counter in counters)
        if not is_known or not _are_counts(list(counters.values())):
            raise ValueError(f"the counters of {reprlib.repr(name)} are {reprlib.repr(counters)}")


def is_count(value: Any) -> bool:
    """Whether a JSON value is an integer from 0 that fits in 64 bits.

    Example:
        >>> [is_count(value) for value in (3, -1, 3.0, True, 10**100)]
        [True, False, False, False, False]
    """
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _are_counts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(map(is_count, values))


def _is_region(region: Any, shape: list[int]) -> bool:
    if not isinstance(region, (list, tuple)) or len(region) != 2:
        return False
    start, stop = region
    if not (_are_counts(start) and _are_counts(stop) and len(start) == len(stop) == len(shape)):
        return False
    return all(first <= last <= size for first, last, size in zip(start, stop, shape, strict=True))
