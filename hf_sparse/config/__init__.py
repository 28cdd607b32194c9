"""Options of pruning: what (base), when (schedule), how without training (oneshot), and their resolved form."""

from .base import PruningConfigError
from .oneshot import OneshotConfig
from .options import merge_group_options, upgrade_options
from .pruning import PruningConfig
from .reconstruction import Reconstruction
from .resolved import ResolvedGroup


__all__ = [
    "OneshotConfig",
    "PruningConfig",
    "PruningConfigError",
    "Reconstruction",
    "ResolvedGroup",
    "merge_group_options",
    "upgrade_options",
]
