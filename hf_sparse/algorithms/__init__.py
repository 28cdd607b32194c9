"""Algorithms: how training finds the zeros. One file each."""

from . import gradual
from .base import ALGORITHMS, DEFAULT_ALGORITHM, Algorithm, register_algorithm
from .learned_mask import LearnedMask, MaskContext


__all__ = ["ALGORITHMS", "DEFAULT_ALGORITHM", "Algorithm", "LearnedMask", "MaskContext", "register_algorithm"]
__all__ += ["gradual"]
