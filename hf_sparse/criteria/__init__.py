"""Importance criteria, one file each. Importing a file here makes its criterion selectable by name."""

from . import fisher, gradient, magnitude, movement, random_scores, snip, snip_momentum, taylor, wanda
from .base import CRITERIA, Criterion, GradientCriterion, register_criterion


__all__ = ["CRITERIA", "Criterion", "GradientCriterion", "register_criterion"]
__all__ += ["fisher", "gradient", "magnitude", "movement", "random_scores", "snip", "snip_momentum", "taylor", "wanda"]
