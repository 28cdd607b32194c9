"""Layers as allocations measure them."""

from hf_sparse.allocations import DenseLayer
from hf_sparse.patterns import get_pattern
from hf_sparse.statistics import GramMatrix


def dense_layer(weight_RC, x_TC, pattern="unstructured", sensitivity=1.0):
    """A layer of one matrix whose inputs are the tokens x."""
    gram = GramMatrix(weight_RC.shape[1])
    gram.observe(x_TC)
    return DenseLayer([weight_RC], [gram], get_pattern(pattern), sensitivity)
