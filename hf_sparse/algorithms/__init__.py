"""Algorithms: how training finds the zeros. One file each."""

from . import acdc, elsa, gradual, granet, gumbel_nm, gumbel_sigmoid, movement, rigl, set, soft_movement, sr_ste
from .base import ALGORITHMS, DEFAULT_ALGORITHM, Algorithm, register_algorithm
from .constrained import ConstrainedTraining
from .dynamic import DynamicSparsity
from .learned_mask import LearnedMask, MaskContext


__all__ = ["ALGORITHMS", "DEFAULT_ALGORITHM", "Algorithm", "register_algorithm"]
__all__ += ["ConstrainedTraining", "DynamicSparsity", "LearnedMask", "MaskContext"]
__all__ += [
    "acdc",
    "elsa",
    "gradual",
    "granet",
    "gumbel_nm",
    "gumbel_sigmoid",
    "movement",
    "rigl",
    "set",
    "soft_movement",
    "sr_ste",
]
