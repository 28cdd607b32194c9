"""Sums and counts over training steps or calibration tokens, from which scores and weight updates are computed.

Statistics of two batches or ranks are combined by adding their totals and counts.
"""

from .gradient_history import GradientHistory
from .gradients import GradientStatistic, ObservedGradients, ProductSaliency, all_finite, observe_all
from .inputs import GramMatrix, InputNorms
from .weighted_inputs import WeightedGram, WeightedInputs, WeightedMoments


__all__ = ["GradientHistory", "GradientStatistic", "GramMatrix", "InputNorms", "ObservedGradients", "ProductSaliency"]
__all__ += ["all_finite", "observe_all", "WeightedGram", "WeightedInputs", "WeightedMoments"]
