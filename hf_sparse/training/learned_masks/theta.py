"""The trained tensors of learned masks, and their optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ...algorithms.learned_mask import Theta
from .parts import WeightParts


_MOMENTS = ("exp_avg", "exp_avg_sq")
_BETAS, _EPS = (0.9, 0.999), 1e-8


class TrainedTensors:
    """theta of all weights, trained by Adam (betas 0.9 and 0.999, eps 1e-8, no weight decay).

    A part is updated as soon as its gradient is known, while it is in the cache.

    Args:
        weights: with their parts on this rank.

    Attributes:
        theta: name of a weight -> its tensors, of the shape of its shard's tensor.
        updates: number of updates so far; the one that is being made counts.
    """

    def __init__(self, weights: Sequence[WeightParts]):
        self.weights = {weight.name: weight for weight in weights}
        self.theta: dict[str, Theta] = {}
        self.updates = 0
        self._moments: dict[str, dict[str, Theta]] = {}
        self._views: dict[str, list[dict[str, list[torch.Tensor]]]] = {}

    def start(self, theta: Mapping[str, Theta]) -> None:
        """Starts from initial values of theta, by the name of its weight, with moments of Adam that are zero."""
        self._set(theta, {moment: {name: _zeros_like(own) for name, own in theta.items()} for moment in _MOMENTS})

    def _set(self, theta: Mapping[str, Theta], moments: dict[str, dict[str, Theta]]) -> None:
        self.theta, self._moments = dict(theta), moments
        self._views = {}
        for name, own in self.theta.items():
            weight = self.weights[name]
            tensors = {key: [own[key], *(moments[moment][name][key] for moment in _MOMENTS)] for key in own}
            views = {key: [weight.views(tensor) for tensor in together] for key, together in tensors.items()}
            count = len(weight.views(weight.shard.tensor))
            self._views[name] = [
                {key: [parts[index] for parts in together] for key, together in views.items()}
                for index in range(count)
            ]

    def of_parts(self, weight: WeightParts) -> list[Theta]:
        """Returns views of theta for each part of a weight."""
        return [{key: tensors[0] for key, tensors in views.items()} for views in self._views[weight.name]]

    @torch.no_grad()
    def update(self, weight: WeightParts, part: int, gradients: Theta, learning_rate: float) -> None:
        """Updates theta of one part of a weight.

        Args:
            part: index among the parts.
            gradients: of theta; overwritten.
            learning_rate: of this step.
        """
        # The corrections of both moments are in the step size and in eps.
        correction = math.sqrt(1 - _BETAS[1] ** self.updates)
        step_size = learning_rate * correction / (1 - _BETAS[0] ** self.updates)
        for key, gradient in gradients.items():
            theta, mean, square = self._views[weight.name][part][key]
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            denominator = torch.sqrt(square, out=gradient).add_(_EPS * correction)
            theta.addcdiv_(mean, denominator, value=-step_size)

    def untrained(self) -> list[str]:
        """Returns the names of weights whose gradients were missing or zero in all updates so far; none before the
        first update."""
        squares = self._moments.get("exp_avg_sq", {}) if self.updates else {}
        return [
            name
            for name, tensors in squares.items()
            if any(tensor.numel() for tensor in tensors.values()) and not any(bool(t.any()) for t in tensors.values())
        ]

    # Saving and resuming

    @property
    def keys(self) -> list[str]:
        """The names of the trained tensors of a weight."""
        return sorted({key for theta in self.theta.values() for key in theta})

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Returns theta and its moments: kind -> name of a weight -> tensor (float32)."""
        kinds = {"theta": self.theta} | self._moments
        return {
            f"{kind}.{key}": {name: own[key].float() for name, own in tensors.items()}
            for kind, tensors in kinds.items()
            for key in self.keys
        }

    def load(self, read: Callable[[str], dict[str, torch.Tensor]], keys: Iterable[str], updates: int) -> None:
        """Restores what `state` has returned.

        Args:
            read: returns the tensors of a kind, by the name of their weight.
            keys: the names of the trained tensors of a weight.
            updates: number of updates that they have had.

        Raises:
            ValueError: a tensor is missing.
        """
        loaded: dict[str, dict[str, Theta]] = {}
        for kind in ("theta", *_MOMENTS):
            own: dict[str, Theta] = {name: {} for name in self.weights}
            for key in keys:
                tensors = read(f"{kind}.{key}")
                for name, weight in self.weights.items():
                    if name not in tensors:
                        raise ValueError(f'"{kind}.{key}" of "{name}" is missing.')
                    own[name][key] = computed(tensors[name].to(weight.shard.tensor.device), weight.shard.tensor.dtype)
            loaded[kind] = own
        self._set(loaded["theta"], {moment: loaded[moment] for moment in _MOMENTS})
        self.updates = updates


def computed(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns a tensor in the dtype that weights of `dtype` (that of the tensor) are computed in: float32, or float64
    for weights in float64. Itself where it is of that dtype."""
    return tensor.to(torch.promote_types(dtype or tensor.dtype, torch.float32))


def _zeros_like(tensors: Theta) -> Theta:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
