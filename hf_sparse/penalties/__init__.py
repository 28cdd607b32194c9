"""Penalties on weights during training, one file each. Importing a file here makes its penalty selectable by name."""

from . import group_lasso, l1
from .base import PENALTIES, Penalty, register_penalty


__all__ = ["PENALTIES", "Penalty", "group_lasso", "l1", "register_penalty"]
