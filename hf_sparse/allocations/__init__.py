"""Allocations: how the target sparsity is distributed over layers. One file each."""

from . import erdos_renyi, owl, uniform
from .base import ALLOCATIONS, Allocation, LayerSize, outlier_ratio, register_allocation


__all__ = ["ALLOCATIONS", "Allocation", "LayerSize", "outlier_ratio", "register_allocation"]
__all__ += ["erdos_renyi", "owl", "uniform"]
