"""Where weights live: the only room that knows of processes, DTensor and ZeRO."""

from .boxes import Box, boxes_of_range, whole
from .moves import Load, move
from .offload import each_parameter, input_device, is_offloaded, onboard
from .processes import ALONE, OneProcess, all_processes, join_processes
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
    "each_parameter",
    "input_device",
    "is_deepspeed",
    "is_offloaded",
    "join_processes",
    "move",
    "onboard",
    "place",
    "shape_of",
    "watch_gradients",
    "whole",
]
