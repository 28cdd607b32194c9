"""Shrinks a checkpoint: from a folder or a model on the Hub to a smaller plain folder with a card."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn

from ..config import PruningConfig
from ..files import CONFIG_FILE, REPORT_FILE, SCHEDULE_PLOT_FILE, check_writable
from ..numerics import count_zeros
from ..reporting.report import SparsityReport
from ..structured.block_removal import LayersToKeep
from ..structured.build import smaller_name
from ..structured.expert_removal import ExpertsToKeep
from ..structured.plan import ShrinkPlan
from ..structured.reduction import ShrinkError
from ..structured.saving import COMPANION_FILES, save_shrunk
from ..structured.shrink import plan_shrink, shrink
from .auto_classes import auto_class
from .card import SparsityCard, write_card
from .loading import load_model


_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")


def shrink_checkpoint(
    model: str,
    output_dir: str | Path,
    layers: LayersToKeep | None = None,
    experts: ExpertsToKeep | None = None,
    multiple_of: int = 8,
    heterogeneous: bool = False,
    dry_run: bool = False,
    echo: Callable[[str], object] = lambda text: None,
) -> ShrinkPlan:
    """Writes a smaller model without the units of a checkpoint that are zero: `shrink` for folders.

    The folder has weights, config, generation config, tokenizer files, pruning_shrink.json and a card. If the
    checkpoint has a pruning report and a card, they are carried over. It is complete or absent.

    Args:
        model: folder or Hub name.
        output_dir: folder to write; replaced if it exists.
        layers, experts, multiple_of, heterogeneous: as in `shrink`.
        dry_run: only make the plan.
        echo: called with the text of the plan before any weight is copied.

    Returns:
        What was removed, and what stays and why.

    Raises:
        OSError: there is no such model.
        ShrinkError: it cannot be shrunk, or there is nothing to remove.

    Example:
        >>> print(shrink_checkpoint("bert-pruned", "bert-small"))  # doctest: +SKIP
        BertModel: 22,700,000 -> 19,100,000 parameters (84.1 %), 90.8 -> 76.4 MB
    """
    if not dry_run:
        check_writable(Path(output_dir).absolute().parent, f"`output_dir` {output_dir}")
    dense: Any = load_model(model)
    options: dict[str, Any] = {"layers": layers, "experts": experts, "multiple_of": multiple_of}
    options["heterogeneous"] = heterogeneous
    plan = plan_shrink(dense, **options)
    echo(str(plan))
    if dry_run:
        return plan
    require_changes(plan)
    source = Path(model)
    if not source.is_dir():
        patterns = [*COMPANION_FILES, "*/config.json"]  # the latter of the modules of a SentenceTransformer
        source = Path(snapshot_download(model, allow_patterns=patterns))
    small: Any = shrink(dense, **options)
    card = _shrunk_card(source, small, plan, model, keeps_outputs=layers is None and experts is None)

    def write_files(folder: Path) -> None:
        if (source / SCHEDULE_PLOT_FILE).is_file():
            shutil.copyfile(source / SCHEDULE_PLOT_FILE, folder / SCHEDULE_PLOT_FILE)
        write_card(folder, replace(card, model_name=Path(output_dir).resolve().name))

    save_shrunk(small, output_dir, source, write_files)
    return plan


def shrink_folder(directory: str | Path, model_class: Any, heterogeneous: bool = False) -> ShrinkPlan:
    """Replaces the model in a folder by a smaller one, with its report: `shrink` for what a trainer has saved.

    If it fails, the folder is unchanged. Other files in it stay.

    Args:
        directory: folder with weights, config and, where a trainer pruned, pruning_report.json.
        model_class: whose `from_pretrained` opens it.
        heterogeneous: as in `shrink`.

    Returns:
        What was removed.

    Raises:
        ShrinkError: it cannot be shrunk, or there is nothing to remove.
    """
    directory = Path(directory)
    dense = model_class.from_pretrained(directory, dtype="auto").eval()
    plan = plan_shrink(dense, heterogeneous=heterogeneous)
    require_changes(plan)
    small: Any = shrink(dense, heterogeneous=heterogeneous)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".shrunk-") as temporary:
        small.save_pretrained(temporary)
        plan.save(temporary)
        if (directory / REPORT_FILE).is_file():
            shrunk_report(SparsityReport.load(directory / REPORT_FILE), small, plan).save(
                Path(temporary) / REPORT_FILE
            )
        new = {path.name: path for path in Path(temporary).iterdir()}
        for path in [path for pattern in _WEIGHT_FILES for path in directory.glob(pattern)]:
            if path.name not in new:
                path.unlink()
        for name, path in new.items():
            path.replace(directory / name)
    return plan


def require_changes(plan: ShrinkPlan) -> None:
    """Raises a ShrinkError if a plan removes nothing."""
    if not plan.changes:
        reasons = " ".join(plan.kept) or "no neuron, head or layer is zero: prune some first, as with pattern neuron."
        raise ShrinkError(f"nothing can be removed from {plan.model_class}: {reasons}")


def shrunk_report(report: SparsityReport, small: nn.Module, plan: ShrinkPlan) -> SparsityReport:
    """Returns the report of a pruned model for the model that was shrunk from it, with its zeros counted anew."""
    parameters = dict(small.named_parameters(remove_duplicate=False))
    layers = []
    for layer in report.layers:
        name = smaller_name(layer.name, plan.layers)
        if name is not None and (weight := parameters.get(name)) is not None:
            weights, zeros = weight.numel(), count_zeros(weight.detach())
            layers.append(replace(layer, name=name, shape=tuple(weight.shape), weights=weights, zeros=zeros))
    unique = list(small.parameters())
    zeros = sum(count_zeros(weight.detach()) for weight in unique)
    return replace(
        report, layers=tuple(layers), parameters=sum(weight.numel() for weight in unique), parameter_zeros=zeros
    )


def _shrunk_card(source: Path, small: Any, plan: ShrinkPlan, name: str, keeps_outputs: bool) -> SparsityCard:
    """Returns the card of a shrunk model, with what the files of the model before say."""
    if all((source / file).is_file() for file in (REPORT_FILE, CONFIG_FILE)):
        card = SparsityCard.load(source)
        # The repository and the written text are those of the larger model.
        card = replace(card, repo_id=None, written={}, latency=None)
        if not keeps_outputs:
            card = replace(card, metrics={})
    else:
        card = SparsityCard("", SparsityReport((), 0, 0), PruningConfig().to_dict(), metadata={"base_model": name})
    opens_with = card.auto_class or auto_class(type(small).__name__)
    return replace(card, report=shrunk_report(card.report, small, plan), shrunk=plan, auto_class=opens_with)
