"""Where weights live: the only room that knows of processes, DTensor and ZeRO."""

from .build import build_shards
from .communicator import SINGLE_PROCESS, Communicator, get_communicator, init_distributed
from .offload import input_device, is_offloaded, iter_parameters, onload
from .redistribute import Transfer, redistribute
from .regions import ShardRegion, full_region, regions_of_range
from .restore import load_local_part
from .shards import Shard, full_shape
from .zero import is_deepspeed, observe_zero_gradients


__all__ = [
    "SINGLE_PROCESS",
    "ShardRegion",
    "Transfer",
    "Communicator",
    "Shard",
    "get_communicator",
    "load_local_part",
    "regions_of_range",
    "iter_parameters",
    "input_device",
    "is_deepspeed",
    "is_offloaded",
    "init_distributed",
    "redistribute",
    "onload",
    "build_shards",
    "full_shape",
    "observe_zero_gradients",
    "full_region",
]
