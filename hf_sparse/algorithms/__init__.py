"""Algorithms: how training finds the zeros. One file each."""

from . import elsa, gradual
from .base import ALGORITHMS, DEFAULT_ALGORITHM, Algorithm, register_algorithm
from .constrained import ConstrainedTraining
from .learned_mask import LearnedMask, MaskContext


__all__ = ["ALGORITHMS", "DEFAULT_ALGORITHM", "Algorithm", "ConstrainedTraining", "LearnedMask", "MaskContext"]
__all__ += ["elsa", "gradual", "register_algorithm"]
