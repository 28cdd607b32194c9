"""What the weights that survive become."""

from . import sparsegpt, zero
from .factor import Factor
from .solver import SOLVERS, Solver, Wanted, register_solver, squared_output


__all__ = ["SOLVERS", "Factor", "Solver", "Wanted", "register_solver", "squared_output"]
__all__ += ["sparsegpt", "zero"]
