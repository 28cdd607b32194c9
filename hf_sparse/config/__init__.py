"""Options of pruning: what (base), when (schedule), how without training (oneshot), and their resolved form."""

from .base import PruningConfigError
from .oneshot import OneshotConfig
from .options import merge_group_options, upgrade_options
from .pruning import PruningConfig
from .resolved import ResolvedGroup


__all__ = [
    "OneshotConfig",
    "PruningConfig",
    "PruningConfigError",
    "ResolvedGroup",
    "merge_group_options",
    "upgrade_options",
]
