"""Tunings: which few parameters are trained after pruning. One file each."""

from . import biases, masked_lora, norms
from .base import TUNINGS, Tuning, register_tune


__all__ = ["TUNINGS", "Tuning", "register_tune"]
__all__ += ["biases", "masked_lora", "norms"]
