"""What a criterion or a solver observes while the model runs: sums and counts, so that two of them merge by adding."""

from .gradients import GradientStat, all_finite
from .inputs import Gram, InputNorms


__all__ = ["GradientStat", "Gram", "InputNorms", "all_finite"]
