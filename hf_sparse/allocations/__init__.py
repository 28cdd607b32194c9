"""How much of the target each layer owes."""

from . import erdos_renyi, uniform
from .allocation import ALLOCATIONS, LayerSize, apportion, register_allocation


__all__ = ["ALLOCATIONS", "LayerSize", "apportion", "register_allocation", "erdos_renyi", "uniform"]
