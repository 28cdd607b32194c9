"""ResolvedGroup: the options of one parameter group with every default filled in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..algorithms import ALGORITHMS, Algorithm
from ..algorithms.gradual import Gradual
from ..allocations import ALLOCATIONS, Allocation
from ..criteria import CRITERIA, Criterion
from ..model.coupling import UnitGroup
from ..model.layers import PrunableLayer
from ..patterns import Pattern
from ..penalties import PENALTIES, Penalty
from ..requires import Requires
from ..schedulers import SCHEDULERS, Scheduler
from ..solvers import SOLVERS, Solver


UNIT_INPUTS = Requires.INPUT_NORMS | Requires.INPUT_VARIANCES | Requires.GRAM
"""What criteria can require of the inputs of the matrices that read coupled units."""


DEFAULT_MAX_SPARSITY = 0.995
"""Default of `max_sparsity_per_layer`, so that a global ranking leaves something of each layer; 1 sets no bound."""


def resolve_max_sparsity(given: float, target: float, pattern: Pattern) -> float:
    """Returns the largest sparsity of a layer.

        max(DEFAULT_MAX_SPARSITY, 1 - (1 - target) / 2) for the default, so that each layer keeps half of what the
        target leaves of an average one, where that is less than the default leaves

    Patterns that fix the sparsity of each layer (N:M), or whose units are whole layers, have no default bound.

    Args:
        given: the option.
        target: of the group.
        pattern: of the group.

    Example:
        >>> from hf_sparse.patterns import get_pattern
        >>> resolve_max_sparsity(0.9, 0.8, get_pattern("4x1"))
        0.9
    """
    if given != DEFAULT_MAX_SPARSITY:
        return given
    is_bounded = pattern.has_layers and pattern.max_sparsity == 1
    return max(given, 1 - (1 - target) / 2) if is_bounded else 1.0


@dataclass(frozen=True)
class ResolvedGroup:
    """A parameter group: layers that share criterion, pattern, scope, allocation, solver and schedule.

    Made once from a config; the engine, one-shot pruning, cards, reports and inspection read it, and fill in nothing.

    Args:
        name: of the group.
        pattern: the pruning granularity.
        criterion: the importance criterion; None if the solver selects the pruned units.
        solver: the weight update after pruning.
        scope: "row", "layer" or "global".
        allocation: the distribution of the target over layers.
        scheduler: the sparsity at each prune step.
        target: the sparsity at the last prune step; 0 if only zeros are kept.
        min_sparsity_per_layer, max_sparsity_per_layer: bounds of each layer's sparsity, from 0 to 1.
        targets, exclude: which layers, see `select_layers`.
        on_indivisible: "error" or "skip", for weights that the pattern does not divide.
        keep_zeros: whether zeros that weights have at the start are kept.
        swaps: the most swaps in each row that refine the mask before the solver.
        permute: whether channels are put in the order in which N:M keeps the most.
        algorithm: how training finds the zeros.
        penalty: the term of the training loss that draws weights towards zero; None without one.
        layers: the weights that are pruned, once the model is known.
        units: for a coupled pattern the units of the model. The weights that they divide are the `layers`.
        biases: name -> shape of the biases that belong to `units`, and are pruned with them.
    """

    name: str
    pattern: Pattern
    criterion: Criterion | None
    solver: Solver
    scope: str
    allocation: Allocation
    scheduler: Scheduler
    target: float
    min_sparsity_per_layer: float = 0.0
    max_sparsity_per_layer: float = 1.0
    targets: list[str] | None = None
    exclude: list[str] | None = None
    on_indivisible: str = "error"
    keep_zeros: bool = False
    swaps: int = 0
    permute: bool = False
    algorithm: Algorithm = Gradual()
    penalty: Penalty | None = None
    layers: tuple[PrunableLayer, ...] = ()
    units: tuple[UnitGroup, ...] = ()
    biases: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def requires(self) -> Requires:
        """What must be computed before the group can be pruned: the union over its methods."""
        if not self.target:
            return Requires.NOTHING
        requires = self.solver.requires | self.allocation.requires
        requires |= Requires.GRAM if self.swaps else Requires.NOTHING
        return requires if self.criterion is None else requires | self.criterion.requires

    @property
    def ranks_all_layers(self) -> bool:
        """Whether the units of all layers compete, so that no layer can be pruned by itself. With N:M, of which the
        scope changes nothing, channels are permuted layer by layer."""
        return self.scope == "global" and self.criterion is not None and not self.permute

    @property
    def requires_calibration(self) -> bool:
        """Whether one-shot pruning needs the layers' inputs as they are when all earlier blocks are pruned."""
        if not self.target:
            return False
        if self.units:
            return not self.selects_units_first or bool(self.solver.requires & Requires.GRAM)
        scored_by_norms = bool(self.requires & Requires.INPUT_NORMS) and not self.ranks_all_layers
        if self.permute:
            return True
        return self.criterion is None or scored_by_norms or bool(self.requires & Requires.GRAM)

    @property
    def requires_dense_pass(self) -> bool:
        """Whether one-shot pruning needs the layers' inputs in the dense model, before anything is pruned."""
        if self.units:
            return bool(self.target and self._criterion_requires & UNIT_INPUTS) and self.selects_units_first
        ranked_by_norms = bool(self.requires & Requires.INPUT_NORMS) and self.ranks_all_layers
        return ranked_by_norms or bool(self.requires & Requires.DENSE_INPUTS)

    @property
    def observed_layers(self) -> tuple[PrunableLayer, ...]:
        """The layers whose inputs are observed, where inputs are: of coupled units those that read them."""
        readers = {part.name for units in self.units for part in units.readers}
        return tuple(layer for layer in self.layers if layer.name in readers) if self.units else self.layers

    @property
    def selects_units_first(self) -> bool:
        """Whether one-shot pruning selects coupled units in the dense model: because no inputs are needed, because
        units of all layers compete, or because units are read in several blocks (the heads of T5)."""
        several = any(len(units.readers) > 1 for units in self.units)
        return self.ranks_all_layers or several or not self._criterion_requires & UNIT_INPUTS

    @property
    def scores_units_by_weights(self) -> bool:
        """Whether the weights alone score coupled units."""
        return not self._criterion_requires & Requires.CALIBRATION_DATA

    @property
    def _criterion_requires(self) -> Requires:
        return Requires.NOTHING if self.criterion is None else self.criterion.requires

    @property
    def criterion_name(self) -> str | None:
        """The registered name of the criterion."""
        return None if self.criterion is None else CRITERIA.name_and_options(self.criterion)[0]

    @property
    def algorithm_name(self) -> str:
        """The registered name of the algorithm."""
        return ALGORITHMS.name_and_options(self.algorithm)[0]

    @property
    def solver_name(self) -> str:
        """The registered name of the solver."""
        return SOLVERS.name_and_options(self.solver)[0]

    @property
    def penalty_name(self) -> str | None:
        """The registered name of the penalty."""
        return None if self.penalty is None else PENALTIES.name_and_options(self.penalty)[0]

    @property
    def allocation_name(self) -> str:
        """The registered name of the allocation."""
        return ALLOCATIONS.name_and_options(self.allocation)[0]

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that has a mask, by name: weights, and the biases of coupled units."""
        return {layer.name: layer.shape for layer in self.layers} | dict(self.biases)

    def num_units(self, layer: PrunableLayer) -> int:
        """Returns the number of units of a layer, where units are parts of one."""
        return layer.num_matrices * self.pattern.num_units(layer.matrix_shape)

    def with_layers(self, layers: Iterable[PrunableLayer]) -> ResolvedGroup:
        """Returns the group with the layers of a model.

        Raises:
            ValueError: units of different sizes would compete globally.
        """
        group = replace(self, layers=tuple(layers))
        sizes = {layer.numel // group.num_units(layer) for layer in group.layers}
        if group.scope == "global" and len(sizes) > 1:
            raise ValueError(
                f'`scope` "global" ranks units of one size, but with `pattern` "{group.pattern}" they hold '
                f'{sorted(sizes)} weights: use `scope="layer"`, or groups of layers with equal units.'
            )
        return group

    def with_units(
        self, units: Sequence[UnitGroup], layers: Iterable[PrunableLayer], biases: Mapping[str, tuple[int, ...]]
    ) -> ResolvedGroup:
        """Returns the group with the coupled units of a model, the weights that they divide, and their biases."""
        return replace(self, units=tuple(units), layers=tuple(layers), biases=dict(biases))

    def to_dict(self) -> dict[str, Any]:
        """Returns the group as JSON values, with the options of its methods, for reports and cards.

        A group without a target prunes nothing: only its name, pattern and target are given.
        """
        values: dict[str, Any] = {"group": self.name, "pattern": str(self.pattern)}
        methods = (("criterion", CRITERIA, self.criterion), ("solver", SOLVERS, self.solver))
        for name, registry, method in (*methods, ("allocation", ALLOCATIONS, self.allocation)):
            chosen, options = (None, {}) if method is None or not self.target else registry.name_and_options(method)
            values[name] = chosen
            if options:
                values[f"{name}_kwargs"] = options
        if self.algorithm != Gradual() and self.target:
            values["algorithm"], options = ALGORITHMS.name_and_options(self.algorithm)
            values |= {"algorithm_kwargs": options} if options else {}
        if self.penalty is not None and self.target:
            values["penalty"], options = PENALTIES.name_and_options(self.penalty)
            values |= {"penalty_kwargs": options} if options else {}
        if self.permute and self.target:
            values["permute"] = True
        values["scope"] = self.scope if self.target else None
        if self.swaps and self.target:
            values["swaps"] = self.swaps
        scheduler = next((name for name in SCHEDULERS.names() if SCHEDULERS[name] is type(self.scheduler)), None)
        values["scheduler"] = scheduler if self.target and self.algorithm.follows_scheduler else None
        return values | {"target": self.target}
