"""Allocations: how the target sparsity is distributed over layers. One file each."""

from . import dlp, erdos_renyi, global_budget, lsa, owl, uniform
from .base import ALLOCATIONS, Allocation, DenseLayer, LayerSize, MeasuringAllocation, register_allocation


__all__ = ["ALLOCATIONS", "Allocation", "DenseLayer", "LayerSize", "MeasuringAllocation", "register_allocation"]
__all__ += ["dlp", "erdos_renyi", "global_budget", "lsa", "owl", "uniform"]
