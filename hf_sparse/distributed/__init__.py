"""What each rank holds of the weights, and how ranks exchange it.

The only package that imports torch.distributed, DeepSpeed or accelerate.
"""

from .build import build_shards
from .communicator import (
    SINGLE_PROCESS,
    Communicator,
    get_communicator,
    init_distributed,
    parse_device,
    raise_on_all_ranks,
)
from .copies import write_copies
from .offload import input_device, is_offloaded, iter_parameters, onload
from .optimizer_state import elementwise_state_keys, optimizer_name, optimizer_state, reset_optimizer_state
from .redistribute import Transfer, redistribute
from .regions import ShardRegion, full_region, regions_of_range
from .resharding import load_local_part
from .shards import Shard, full_shape
from .zero import is_deepspeed, observe_zero_gradients


__all__ = [
    "SINGLE_PROCESS",
    "Communicator",
    "Shard",
    "ShardRegion",
    "Transfer",
    "build_shards",
    "elementwise_state_keys",
    "full_region",
    "full_shape",
    "get_communicator",
    "init_distributed",
    "parse_device",
    "input_device",
    "is_deepspeed",
    "is_offloaded",
    "iter_parameters",
    "load_local_part",
    "observe_zero_gradients",
    "onload",
    "optimizer_name",
    "optimizer_state",
    "reset_optimizer_state",
    "write_copies",
    "raise_on_all_ranks",
    "redistribute",
    "regions_of_range",
]
