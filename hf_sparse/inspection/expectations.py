"""What a checkpoint was expected to hold and does not: for tests that run without a person looking."""

from __future__ import annotations

from .contents import CheckpointContents, TensorContents
from .files import InspectionError
from .structure import readable_pattern


def unmet_expectations(
    contents: CheckpointContents,
    min_sparsity: float | None = None,
    pattern: str | None = None,
    verify: bool = False,
) -> list[str]:
    """The expectations that are not met, in sentences; [] if all are.

    Args:
        contents: of the checkpoint.
        min_sparsity: the least share of the selected weights that must be zero.
        pattern: that the zeros of every selected weight must have, as in `PruningConfig`.
        verify: whether the report beside the weights must agree with them.

    Raises:
        InspectionError: there is nothing to hold against the expectation.
        ValueError: the pattern is unknown, or cannot be told from zeros.
    """
    if pattern is not None:
        readable_pattern(pattern)
    if min_sparsity is not None and not 0 <= min_sparsity <= 1:
        raise ValueError(f"the least sparsity is {min_sparsity}, but a share is from 0 to 1.")
    if not contents.selected and (min_sparsity is not None or pattern is not None):
        raise InspectionError(f"{contents.place} holds no weight that looks prunable: there is nothing to check.")
    if verify and contents.stored is None:
        raise InspectionError(f"no pruning_report.json lies beside the weights of {contents.place} to verify.")
    unmet = []
    if min_sparsity is not None and contents.sparsity < min_sparsity:
        unmet.append(
            f"{contents.selected_zeros:,} of {contents.selected_weights:,} selected weights are zero "
            f"({contents.sparsity:.4%}), expected at least {min_sparsity:.4%}."
        )
    if pattern is not None:
        failing = [tensor.name for tensor in contents.selected if not _holds(tensor, pattern)]
        if failing:
            unmet.append(
                f"{len(failing)} of {len(contents.selected)} selected weights do not hold {pattern}, such as "
                f"{failing[0]}."
            )
    return unmet + list(contents.differences if verify else ())


def _holds(tensor: TensorContents, pattern: str) -> bool:
    return any(structure.holds(pattern) for structure in tensor.structures)
