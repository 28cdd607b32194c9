"""What the weights that survive become."""

from . import none, sparsegpt
from .base import SOLVERS, PruneRequest, Solver, output_energy, register_solver
from .hessian import HessianFactor


__all__ = ["SOLVERS", "HessianFactor", "Solver", "PruneRequest", "register_solver", "output_energy"]
__all__ += ["sparsegpt", "none"]
