"""Naive Wanda and SparseGPT: before each part is pruned, the whole model runs over all batches, with hooks on its
layers that store their inputs in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers.architectures import Architecture, tokens_that_count

from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import SOLVERS


@torch.no_grad()
def inputs_of(model, architecture: Architecture, names: Sequence[str], batches) -> dict[str, list[torch.Tensor]]:
    """Maps the name of a weight to the inputs (T, I) of each of its matrices, float64."""
    found: dict[str, list] = {name: [] for name in names}
    now, handles = {}, []

    def plain(name):
        def called(module, args, kwargs):
            x = next(iter((*args, *kwargs.values())))
            found[name].append([tokens_that_count(name, x, now["batch"]).double()])

        return called

    def of_experts(path):
        def called(module, args):
            reached = list(zip(*architecture.experts(args, module), strict=True))
            for name, inputs in zip((f"{path}.gate_up_proj", f"{path}.down_proj"), reached, strict=True):
                found[name].append([x.double() for x in inputs])

        return called

    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(path)
        if path.endswith(".experts"):
            handles.append(module.register_forward_pre_hook(of_experts(path)))
        else:
            handles.append(module.register_forward_pre_hook(plain(f"{path}.weight"), with_kwargs=True))
    try:
        for batch in batches:
            now["batch"] = batch
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [torch.cat(parts) for parts in zip(*calls, strict=True)] for name, calls in found.items()}


def matrices(name: str, weight: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views (R, C) of a weight, transposed if the number of inputs says so; those of GPT-2 always are."""
    parts = list(weight) if weight.ndim == 3 else [weight]
    transposed = weight.shape[-1] != inputs[0].shape[1] or ".c_" in name
    return [part.t() if transposed else part for part in parts]


def wanda(weight_RC: torch.Tensor, x_TC: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """The weight without those of each row with the smallest |w_j|·‖x_j‖."""
    scores = weight_RC.double().abs() * x_TC.square().sum(0).sqrt()
    pruned = scores.argsort(dim=1, stable=True)[:, : round(share * weight_RC.shape[1])]
    return weight_RC.masked_fill(torch.zeros_like(weight_RC, dtype=torch.bool).scatter(1, pruned, True), 0.0)


def wanda_and_swaps(weight_RC: torch.Tensor, x_TC: torch.Tensor, swaps: int) -> torch.Tensor:
    """What Wanda keeps after the best swap of each row, as often as given, while the error of the outputs falls."""
    kept_RC, weights = wanda(weight_RC, x_TC) != 0, weight_RC.double()
    for _ in range(swaps):
        for weight_C, kept_C in zip(weights, kept_RC, strict=True):
            pairs = torch.cartesian_prod(kept_C.nonzero()[:, 0], (~kept_C).nonzero()[:, 0])
            numbers, lost_NC = torch.arange(len(pairs)), (weight_C * ~kept_C).repeat(len(pairs) + 1, 1)
            lost_NC[numbers, pairs[:, 0]] = weight_C[pairs[:, 0]]
            lost_NC[numbers, pairs[:, 1]] = 0.0
            best = int((x_TC @ lost_NC.t()).square().sum(0).argmin())  # the last is that without a swap
            kept_C.copy_(weight_C - lost_NC[best] != 0)
    return weight_RC.masked_fill(~kept_RC, 0.0)


def sparsegpt(weight_RC: torch.Tensor, x_TC: torch.Tensor, share: float = 0.5, text: str = "unstructured"):
    """The result of the solver for these inputs."""
    gram = (x_TC.t() @ x_TC).float()
    return SOLVERS["sparsegpt"]().solve(weight_RC, gram, get_pattern(text), share)[0]


@torch.no_grad()
def prune(model, architecture: Architecture, parts: Sequence[Sequence[str]], batches, method) -> None:
    """Prune the weights of each part in turn, all of a part from what reaches them before any of it is pruned."""
    for names in parts:
        inputs = inputs_of(model, architecture, names, batches)
        for name in names:
            weight = model.get_parameter(name)
            for matrix, x in zip(matrices(name, weight, inputs[name]), inputs[name], strict=True):
                matrix.copy_(method(matrix, x))


def by_blocks(architecture: Architecture, names: Sequence[str]) -> list[list[str]]:
    """The weights of each block, after those before the blocks, and before those after them."""
    first = [name for name in names if name.startswith(architecture.first)]
    blocks = [[name for name in names if name.startswith(block)] for block in architecture.blocks]
    rest = [name for name in names if not any(name in part for part in (first, *blocks))]
    return [part for part in (first, *blocks, rest) if part]


@torch.no_grad()
def in_order(model, names: Sequence[str], batch) -> list[list[str]]:
    """The weights one by one, in the order in which a forward calls them."""
    order, handles = [], []
    for name in names:
        handles.append(
            model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
                lambda *called, name=name: order.append([name])
            )
        )
    model(**batch)
    for handle in handles:
        handle.remove()
    return order
