"""Sums and counts over training steps or calibration tokens, from which scores and weight updates are computed.

Statistics of two batches or ranks are combined by adding their totals and counts.
"""

from .gradients import GradientStatistic, all_finite
from .inputs import GramMatrix, InputNorms


__all__ = ["GradientStatistic", "GramMatrix", "InputNorms", "all_finite"]
