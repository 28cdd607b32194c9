"""Importance criteria, one file each. Importing a file here makes its criterion selectable by name."""

from . import (
    block_influence,
    fisher,
    fluctuation,
    gradient,
    greedy_movement,
    magnitude,
    mfac,
    obert,
    obs,
    random_scores,
    ria,
    snip,
    snip_momentum,
    taylor,
    wanda,
)
from .base import (
    CRITERIA,
    Criterion,
    GradientCriterion,
    GradientHistoryCriterion,
    ObservingCriterion,
    TensorEntries,
    UnitCriterion,
    register_criterion,
)


__all__ = ["CRITERIA", "Criterion", "GradientCriterion", "GradientHistoryCriterion", "ObservingCriterion"]
__all__ += ["TensorEntries", "UnitCriterion", "register_criterion"]
__all__ += ["block_influence", "fisher", "fluctuation", "gradient", "greedy_movement", "magnitude", "mfac"]
__all__ += ["obert", "obs", "random_scores", "ria", "snip", "snip_momentum", "taylor", "wanda"]
