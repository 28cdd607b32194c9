"""Solvers: how the remaining weights are updated after pruning. One file each."""

from . import admm, lstsq, none, sparsegpt
from .base import SOLVERS, PruneRequest, Solver, output_energy, register_solver
from .hessian import HessianFactor


__all__ = ["SOLVERS", "HessianFactor", "PruneRequest", "Solver", "output_energy", "register_solver"]
__all__ += ["admm", "lstsq", "none", "sparsegpt"]
