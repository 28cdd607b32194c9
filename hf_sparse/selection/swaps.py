"""Refines masks by swaps: in each row a kept weight is pruned and a pruned one restored while the error falls.

Shapes: R output rows, C inputs; K candidates of a row; D groups of M inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..numerics import chunk_size, prefers_numpy
from ..patterns import Pattern
from ..statistics import GramMatrix


_CANDIDATES = 1
"""Kept weights, and pruned ones, whose exchange with every other weight is evaluated in each round. More take longer
and lower the error by 0.3% at most."""

_LEAST_DECREASE = 1e-6
"""The share of a row's error by which a swap must lower it: less is rounding in float32."""

_Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of each row the change of the error by a swap, the input to prune and the input to restore."""


def supports_swaps(pattern: Pattern) -> bool:
    """Whether masks of the pattern stay valid when single weights are exchanged, in a row or in its groups of inputs.

    Example:
        >>> from hf_sparse.patterns import get_pattern
        >>> [supports_swaps(get_pattern(text)) for text in ("unstructured", "2:4", "4x1")]
        [True, True, False]
    """
    return pattern.flat or pattern.n_of_m[1] > 1


def refine_mask(
    weight_RC: torch.Tensor, mask_RC: torch.Tensor, gram: GramMatrix, swaps: int, pattern: Pattern
) -> torch.Tensor:
    """Returns a mask with as many kept weights in every row, and a smaller error of the outputs.

    The error of a row is e·G·e, with e = w·(1 - mask) and the Gram matrix G of the inputs. Pruning the kept weight i
    and restoring the pruned weight j changes it by

        2·w_i·g_i + w_i²·G_ii  -  2·w_j·g_j + w_j²·G_jj  -  2·w_i·w_j·G_ij,    g = G·e

    In each round every row makes the best swap that is found: the kept weight that is cheapest to prune is paired with
    all pruned ones, and the pruned one that is best to restore with all kept ones; where none of these pairs lowers
    the error, all pairs are compared. A row is finished after `swaps` swaps, or when no swap lowers its error by more
    than rounding. With N:M, weights are exchanged within their groups, and all pairs are compared.

    Weights that are zero are never restored, so that zeros that are to be kept are.

    Args:
        weight_RC: the weights before pruning, of any floating dtype; computed with in that of G.
        mask_RC: bool, True is kept.
        gram: of the inputs.
        swaps: the most swaps of one row.
        pattern: of the mask: unstructured or N:M.

    Returns:
        A new mask (R, C), on the device of `mask_RC`. The error of no row is larger than before.

    Raises:
        ValueError: the pattern has units of several weights, or the Gram matrix is of another size.

    Example:
        >>> from hf_sparse.patterns import get_pattern
        >>> gram = GramMatrix(4)
        >>> gram.observe(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
        >>> weight = torch.tensor([[1.0, 1.0, 1.5, -1.5]])  # the last two cancel each other
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> refine_mask(weight, mask, gram, swaps=1, pattern=get_pattern("unstructured"))
        tensor([[ True,  True, False, False]])

    Reference: Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", 2025.
    """
    if not supports_swaps(pattern):
        raise ValueError(f'masks of pattern "{pattern}" cannot be refined by swaps of single weights')
    columns = weight_RC.shape[1]
    if len(gram.total) != columns:
        raise ValueError(f"the weight has {columns} inputs, but the Gram matrix is of {len(gram.total)}")
    gram_CC = gram.matrix()
    weight_RC = weight_RC.detach().to(gram_CC.device, gram_CC.dtype)
    old_RC = mask_RC.to(gram_CC.device)
    new_RC = old_RC.clone(memory_format=torch.contiguous_format)
    gradient_RC, error_R = _gradient_and_error(weight_RC, old_RC, gram_CC)
    pairs = _PairsOfRow(gram_CC) if pattern.flat else _PairsOfGroups(gram_CC, pattern.n_of_m[1])
    step = max(1, chunk_size(gram_CC.device) // max(1, columns * pairs.width))
    for start in range(0, len(weight_RC), step):
        rows = slice(start, start + step)
        _swap_in_rows(weight_RC[rows], new_RC[rows], gradient_RC[rows], error_R[rows], pairs, swaps)
    # Rounding accumulates in the gradients. It decides for no row whose error is larger when it is computed anew.
    lower_R = _gradient_and_error(weight_RC, new_RC, gram_CC)[1] < error_R
    return torch.where(lower_R[:, None], new_RC, old_RC).to(mask_RC.device)


def _gradient_and_error(
    weight_RC: torch.Tensor, kept_RC: torch.Tensor, gram_CC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lost_RC = weight_RC.masked_fill(kept_RC, 0.0)
    gradient_RC = lost_RC @ gram_CC
    return gradient_RC, (gradient_RC * lost_RC).sum(1)


def _swap_in_rows(
    weight_RC: torch.Tensor,
    kept_RC: torch.Tensor,
    gradient_RC: torch.Tensor,
    error_R: torch.Tensor,
    pairs: _Pairs,
    swaps: int,
) -> None:
    """Swaps weights in `kept_RC`, in place. Overwrites the gradients."""
    rows_R = torch.arange(len(weight_RC), device=weight_RC.device)
    square_RC = weight_RC.square() * pairs.squares_C
    kept_squares_RC = square_RC.masked_fill(~kept_RC, torch.inf)
    pruned_squares_RC = square_RC.masked_fill_(kept_RC | (weight_RC == 0), torch.inf)
    for _ in range(swaps):
        product_RC = (weight_RC * gradient_RC).mul_(2)
        prune_RC = kept_squares_RC + product_RC
        restore_RC = torch.sub(pruned_squares_RC, product_RC, out=product_RC)
        best = pairs.find(weight_RC, prune_RC, restore_RC)
        lower_R = best[0] < -_LEAST_DECREASE * error_R
        if not bool(lower_R.all()):
            stuck = (~lower_R).nonzero()[:, 0]
            found = pairs.find_in_all(weight_RC[stuck], prune_RC[stuck], restore_RC[stuck])
            if found is not None:
                for one, new in zip(best, found, strict=True):
                    one[stuck] = new
                lower_R = best[0] < -_LEAST_DECREASE * error_R
            left = lower_R.nonzero()[:, 0]
            if not len(left):
                return
            best = best[0][left], best[1][left], best[2][left]
            rows_R, error_R, weight_RC, gradient_RC = rows_R[left], error_R[left], weight_RC[left], gradient_RC[left]
            kept_squares_RC, pruned_squares_RC = kept_squares_RC[left], pruned_squares_RC[left]
        change_R, pruned_R, restored_R = best
        kept_RC[rows_R, pruned_R] = False
        kept_RC[rows_R, restored_R] = True
        error_R = error_R + change_R
        for input_R, sign, old_RC, new_RC in (
            (pruned_R, 1, kept_squares_RC, pruned_squares_RC),
            (restored_R, -1, pruned_squares_RC, kept_squares_RC),
        ):
            input_R1 = input_R[:, None]
            weight_R1 = weight_RC.gather(1, input_R1)
            gradient_RC.addcmul_(weight_R1, pairs.gram_CC[input_R], value=sign)
            square_R1 = old_RC.gather(1, input_R1).masked_fill_(weight_R1 == 0, torch.inf)
            new_RC.scatter_(1, input_R1, square_R1)
            old_RC.scatter_(1, input_R1, torch.inf)


class _Pairs(ABC):
    """The pairs of a kept and a pruned weight that may be exchanged.

    Args:
        gram_CC: the Gram matrix.
        width: the number of pairs, for each input of a row, that are compared at once.
    """

    def __init__(self, gram_CC: torch.Tensor, width: int):
        self.gram_CC, self.squares_C, self.width = gram_CC, gram_CC.diagonal(), width

    @abstractmethod
    def find(self, weight_RC: torch.Tensor, prune_RC: torch.Tensor, restore_RC: torch.Tensor) -> _Best:
        """Returns the best swap of each row.

        Args:
            weight_RC: the weights.
            prune_RC: the change of the error by pruning each weight alone; inf where it cannot be pruned.
            restore_RC: the change by restoring each weight alone; inf where it cannot be restored.
        """

    def find_in_all(self, weight_RC: torch.Tensor, prune_RC: torch.Tensor, restore_RC: torch.Tensor) -> _Best | None:
        """Returns the best of all swaps of each row, for rows where `find` has found none that lowers the error; None
        if it has compared all."""
        return None


class _PairsOfRow(_Pairs):
    """All pairs of a row."""

    def __init__(self, gram_CC: torch.Tensor):
        super().__init__(gram_CC, min(_CANDIDATES, len(gram_CC)))

    def find(self, weight_RC: torch.Tensor, prune_RC: torch.Tensor, restore_RC: torch.Tensor) -> _Best:
        cheapest_RK = _lowest(prune_RC, self.width)
        change_R, pruned_R, restored_R = self._best_partner(weight_RC, cheapest_RK, prune_RC, restore_RC)
        cheapest_RK = _lowest(restore_RC, self.width)
        other_R, restored_too_R, pruned_too_R = self._best_partner(weight_RC, cheapest_RK, restore_RC, prune_RC)
        first_R = change_R <= other_R
        return (
            torch.where(first_R, change_R, other_R),
            torch.where(first_R, pruned_R, pruned_too_R),
            torch.where(first_R, restored_R, restored_too_R),
        )

    def find_in_all(self, weight_RC: torch.Tensor, prune_RC: torch.Tensor, restore_RC: torch.Tensor) -> _Best | None:
        order_RC = prune_RC.argsort(1)
        step = max(1, chunk_size(weight_RC.device) // weight_RC.numel())
        best: _Best | None = None
        for first in range(0, int(prune_RC.isfinite().sum(1).max()), step):
            found = self._best_partner(weight_RC, order_RC[:, first : first + step], prune_RC, restore_RC)
            if best is not None:
                better_R = found[0] < best[0]
                change_R, pruned_R, restored_R = (
                    torch.where(better_R, new, old) for new, old in zip(found, best, strict=True)
                )
                found = change_R, pruned_R, restored_R
            best = found
        return best

    def _best_partner(
        self, weight_RC: torch.Tensor, candidates_RK: torch.Tensor, own_RC: torch.Tensor, other_RC: torch.Tensor
    ) -> _Best:
        """The least change by the exchange of a candidate with any other weight, that candidate, and the other one."""
        change_RKC = self.gram_CC[candidates_RK]
        change_RKC *= weight_RC.gather(1, candidates_RK)[:, :, None]
        torch.addcmul(other_RC[:, None], change_RKC, weight_RC[:, None], value=-2, out=change_RKC)
        change_R, which_R = (change_RKC.amin(2) + own_RC.gather(1, candidates_RK)).min(1)
        rows_R = torch.arange(len(weight_RC), device=weight_RC.device)
        return change_R, candidates_RK[rows_R, which_R], _lowest(change_RKC[rows_R, which_R], 1)[:, 0]


class _PairsOfGroups(_Pairs):
    """The pairs in groups of adjacent inputs."""

    def __init__(self, gram_CC: torch.Tensor, size: int):
        super().__init__(gram_CC, size)
        self._diagonal_DMM = torch.stack([gram_CC[i : i + size, i : i + size] for i in range(0, len(gram_CC), size)])

    def find(self, weight_RC: torch.Tensor, prune_RC: torch.Tensor, restore_RC: torch.Tensor) -> _Best:
        weight_RDM, prune_RDM, restore_RDM = (
            x.unflatten(1, (-1, self.width)) for x in (weight_RC, prune_RC, restore_RC)
        )
        change_RDMM = self._diagonal_DMM * weight_RDM[..., None]
        torch.addcmul(restore_RDM[:, :, None], change_RDMM, weight_RDM[:, :, None], value=-2, out=change_RDMM)
        change_RDMM += prune_RDM[..., None]
        index_R = _lowest(change_RDMM.flatten(1), 1)[:, 0]
        change_R = change_RDMM.flatten(1).gather(1, index_R[:, None])[:, 0]
        pruned_R = index_R // self.width
        return change_R, pruned_R, pruned_R // self.width * self.width + index_R % self.width


def _lowest(values_RC: torch.Tensor, count: int) -> torch.Tensor:
    """The positions (R, count) of the lowest values of each row."""
    if count > 1:
        return values_RC.topk(count, 1, largest=False)[1]
    if prefers_numpy(values_RC.device):
        return torch.from_numpy(values_RC.numpy().argmin(1))[:, None]
    return values_RC.argmin(1, keepdim=True)
