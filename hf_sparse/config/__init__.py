"""Options of pruning: what (base), when (schedule), how without training (oneshot), and their resolved form."""

from .base import PruningConfigError, merge_group_options, upgrade_options
from .oneshot import OneshotConfig
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
