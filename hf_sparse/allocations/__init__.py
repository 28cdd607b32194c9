"""How much of the target each layer owes."""

from ..selection.budgets import largest_remainder
from . import erdos_renyi, owl, uniform
from .base import ALLOCATIONS, LayerSize, register_allocation
from .owl import outlier_share


__all__ = ["ALLOCATIONS", "LayerSize", "largest_remainder", "outlier_share", "register_allocation"]
__all__ += ["erdos_renyi", "owl", "uniform"]
