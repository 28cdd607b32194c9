"""Checks of a checkpoint's contents against the report beside its weights and against a user's expectations."""

from __future__ import annotations

from collections.abc import Iterable

from ..reporting.report import LayerReport, SparsityReport
from .contents import CheckpointContents, TensorContents
from .roles import Selection
from .structure import detectable_pattern
from .weight_files import InspectionError


# Below this sparsity, zeros may be there by chance and need not have the pattern.
_MIN_SPARSITY_FOR_PATTERN = 0.01


def unmet_expectations(
    contents: CheckpointContents,
    min_sparsity: float | None = None,
    pattern: str | None = None,
    verify: bool = False,
) -> list[str]:
    """Returns a sentence for each expectation that a checkpoint does not meet; [] if it meets all.

    Args:
        contents: of the checkpoint.
        min_sparsity: the least sparsity of all selected weights together, from 0 to 1.
        pattern: that the zeros of each selected weight must have, as in `PruningConfig`.
        verify: whether the weights must agree with the report beside them.

    Raises:
        InspectionError: if there are no weights, or no report, to check.
        ValueError: if `min_sparsity` is out of range, or zeros do not show the pattern.
    """
    if pattern is not None:
        detectable_pattern(pattern)
    if min_sparsity is not None and not 0 <= min_sparsity <= 1:
        example = f" ({min_sparsity / 100:g} for {min_sparsity:g}%)" if 1 < min_sparsity <= 100 else ""
        raise ValueError(f"`min_sparsity` is {min_sparsity:g}, but must be between 0 and 1{example}.")
    if not contents.selected and (min_sparsity is not None or pattern is not None):
        raise InspectionError(f"{contents.source} holds no weight that looks prunable: there is nothing to check.")
    if verify and contents.report is None:
        raise InspectionError(f"there is no pruning_report.json beside the weights of {contents.source} to verify.")
    unmet = []
    if min_sparsity is not None and contents.sparsity < min_sparsity:
        unmet.append(
            f"{contents.selected_zeros:,} of {contents.selected_weights:,} selected weights are zero "
            f"({contents.sparsity:.4%}), expected at least {min_sparsity:.4%}."
        )
    if pattern is not None:
        failing = [tensor.name for tensor in contents.selected if not _has_pattern(tensor, pattern)]
        if failing:
            unmet.append(
                f"{len(failing)} of {len(contents.selected)} selected weights do not have pattern {pattern}, such as "
                f"{failing[0]}."
            )
    return unmet + list(contents.differences if verify else ())


def report_differences(
    report: SparsityReport | None, contents: Iterable[TensorContents], selection: Selection
) -> list[str]:
    """Returns a sentence for each difference between a checkpoint's weights and the report beside them.

    Weights that are stored under other names than the report has are compared in sum.
    """
    tensors = {tensor.name: tensor for tensor in contents}
    differences, renamed = [], []
    for layer in report.layers if report else ():
        tensor = tensors.get(layer.name)
        if tensor is None and selection.renamed:
            renamed.append(layer)
        elif tensor is None:
            differences.append(f"{layer.name} is not in the files, or its zeros cannot be counted.")
        elif tensor.shape != layer.shape:
            differences.append(f"{layer.name} is {tensor.shape}, in the report {layer.shape}.")
        elif tensor.zeros != layer.zeros:
            differences.append(f"{layer.name} has {tensor.zeros:,} zeros, in the report {layer.zeros:,}.")
        elif _lacks_pattern(tensor, layer):
            differences.append(f"{layer.name} does not have pattern {layer.pattern}, which is in the report.")
    counted = sum(tensors[name].zeros for name in selection.renamed)
    reported = sum(layer.zeros for layer in renamed)
    if counted != reported:
        differences.append(
            f"the {len(renamed)} weights that the files hold under other names than the report, such as "
            f"{renamed[0].name}, have {counted:,} zeros, in the report {reported:,}."
        )
    return differences


def _lacks_pattern(tensor: TensorContents, layer: LayerReport) -> bool:
    """Whether a layer is sparse enough for its pattern to show, and its zeros do not have it."""
    try:
        # A schedule that has not reached its end has not reached N:M either.
        least = detectable_pattern(layer.pattern).implied_sparsity or _MIN_SPARSITY_FOR_PATTERN
    except ValueError:  # unstructured, or registered by a user
        return False
    return layer.sparsity >= least and not _has_pattern(tensor, layer.pattern)


def _has_pattern(tensor: TensorContents, pattern: str) -> bool:
    return any(structure.has_pattern(pattern) for structure in tensor.structures)
