"""What a criterion observes while the model runs: sums and counts, so that two of them merge by adding."""

from .gradients import GradientStat, all_finite


__all__ = ["GradientStat", "all_finite"]
