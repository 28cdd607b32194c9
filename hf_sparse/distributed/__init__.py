"""Where weights live: the only room that knows of processes, DTensor and ZeRO."""

from .build import place
from .communicator import SINGLE_PROCESS, Communicator, get_communicator, init_distributed
from .offload import input_device, is_offloaded, iter_parameters, onload
from .redistribute import Transfer, move
from .regions import ShardRegion, regions_of_range, whole
from .restore import assemble
from .shards import Shard, shape_of
from .zero import is_deepspeed, observe_zero_gradients


__all__ = [
    "SINGLE_PROCESS",
    "ShardRegion",
    "Transfer",
    "Communicator",
    "Shard",
    "get_communicator",
    "assemble",
    "regions_of_range",
    "iter_parameters",
    "input_device",
    "is_deepspeed",
    "is_offloaded",
    "init_distributed",
    "move",
    "onload",
    "place",
    "shape_of",
    "observe_zero_gradients",
    "whole",
]
