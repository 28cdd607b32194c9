"""Sums and counts over training steps or calibration tokens, from which scores and weight updates are computed.

Statistics of two batches or ranks are combined by adding their totals and counts.
"""

from .gradients import GradientStatistic, ProductSaliency, all_finite, observe_all
from .inputs import GramMatrix, InputNorms
from .weighted_inputs import WeightedGram, WeightedInputs, WeightedMoments


__all__ = ["GradientStatistic", "GramMatrix", "InputNorms", "ProductSaliency", "all_finite", "observe_all"]
__all__ += ["WeightedGram", "WeightedInputs", "WeightedMoments"]
