"""Where weights live: the only room that knows of processes, DTensor and ZeRO."""

from .boxes import Box, boxes_of_range, whole
from .moves import Load, move
from .processes import ALONE, OneProcess, all_processes
from .saved import assemble
from .shards import Shard, place, shape_of
from .zero import is_deepspeed, watch_gradients


__all__ = [
    "ALONE",
    "Box",
    "Load",
    "OneProcess",
    "Shard",
    "all_processes",
    "assemble",
    "boxes_of_range",
    "is_deepspeed",
    "move",
    "place",
    "shape_of",
    "watch_gradients",
    "whole",
]
