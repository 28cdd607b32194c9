"""Wanda: pruning by weights and activations."""

from .base import Criterion, register_criterion


@register_criterion("wanda")
class Wanda(Criterion):
    """|w_ij|·‖x_j‖₂, with the norm of input j over all tokens of the calibration data. The paper compares within each
    output (scope "row"). One-shot only: training does not observe inputs.

    Example:
        >>> import torch
        >>> weight, norms = torch.tensor([[4.0, -1.0], [2.0, 0.5]]), torch.tensor([0.5, 8.0])
        >>> Wanda().score(weight, norms)
        tensor([[2., 8.],
                [1., 4.]])

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, eq. 1.
    """

    needs = "inputs"

    def score(self, weight, stat):
        return weight.detach().float().abs() * stat
