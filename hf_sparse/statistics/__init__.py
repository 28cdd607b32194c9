"""What a criterion or a solver observes while the model runs: sums and counts, so that two of them merge by adding."""

from .gradients import GradientStatistic, all_finite
from .inputs import GramMatrix, InputNorms


__all__ = ["GradientStatistic", "GramMatrix", "InputNorms", "all_finite"]
