"""The kernel for sums of saliencies over optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .tensor_table import BLOCK, FLOATS, TensorTable, address, length_of


def add_saliencies(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], decay: float, weighted: bool, function: str
) -> None:
    """Updates sums of saliencies in one pass over all weights:

        total <- decay * total + function(weight * gradient)

    Args:
        rows: contiguous (weight, gradient, total) of one device; totals are float32, weights of one dtype and
            gradients of one dtype.
        decay: weight of the earlier steps.
        weighted: whether the gradient is multiplied by the weight.
        function: "abs", "square" or "neg".
    """
    table = TensorTable(rows)
    dtypes = FLOATS[rows[0][0].dtype], FLOATS[rows[0][1].dtype]
    _add_saliencies[table.grid](table.data, decay, weighted, function, *dtypes, table.aligned, BLOCK // 2)


@triton.jit
def _add_saliencies(
    table,
    decay,
    weighted: tl.constexpr,
    function: tl.constexpr,
    weight_dtype: tl.constexpr,
    gradient_dtype: tl.constexpr,
    aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weight = address(table, 0, 3, weight_dtype, aligned)
    gradient = address(table, 1, 3, gradient_dtype, aligned)
    total = address(table, 2, 3, tl.float32, aligned)
    length = length_of(table, 3, aligned)
    places = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        inside = places < length - start
        new = tl.load(gradient + start + places, mask=inside, other=0).to(tl.float32)
        earlier = tl.load(total + start + places, mask=inside, other=0)
        if weighted:
            new = tl.load(weight + start + places, mask=inside, other=0).to(tl.float32) * new
        if function == "abs":
            new = tl.abs(new)
        elif function == "square":
            new = new * new
        else:
            new = -new
        # Rounded once, as torch.add with alpha does on all devices.
        tl.store(total + start + places, tl.fma(earlier, decay, new), mask=inside)
