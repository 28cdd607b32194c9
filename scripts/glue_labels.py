"""Labels of classification and regression data sets, and their conversion to output indices of a model."""

from dataclasses import dataclass

from datasets import ClassLabel, Dataset
from transformers import PretrainedConfig


# Label names in the order of their ids; None for the one regression task.
GLUE_LABELS: dict[str, tuple[str, ...] | None] = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
    "stsb": None,
    "wnli": ("not_entailment", "entailment"),
}
# The label of rows of the GLUE test sets.
HIDDEN = -1


@dataclass(frozen=True)
class Labels:
    """Label names in the order of the model's outputs; `names` is None for regression.

    Labels in the data are either names or, where `by_position` is given, positions in that tuple. The two orders
    differ for a checkpoint that was trained with another order of the same names.
    """

    names: tuple[str, ...] | None
    by_position: tuple[str, ...] | None = None

    @property
    def is_regression(self) -> bool:
        return self.names is None

    @property
    def count(self) -> int:
        return 1 if self.names is None else len(self.names)

    def encode(self, label) -> int | float:
        """Returns the output index of a label, or the number itself for regression."""
        if self.names is None:
            return float(label)
        if self.by_position is not None and type(label) is int and 0 <= label < len(self.by_position):
            return self.names.index(self.by_position[label])
        return self.names.index(str(label))

    def knows(self, label) -> bool:
        """Returns whether `encode` accepts this label."""
        try:
            self.encode(label)
        except (TypeError, ValueError):
            return False
        return True

    def decode(self, output) -> str:
        """Returns the text for a prediction file: the name of the label, or the number with three digits."""
        return f"{float(output):.3f}" if self.names is None else self.names[int(output)]


def has_labels(dataset: Dataset, labels: Labels) -> bool:
    """Returns whether a split has labels: not without the column, nor where GLUE replaces them by -1."""
    if "label" not in dataset.column_names:
        return False
    values = dataset.unique("label")
    if values == [None]:
        return False
    hidden = HIDDEN in values and not labels.knows(HIDDEN)
    return not (hidden or (labels.is_regression and values == [HIDDEN]))


def find_labels(splits: dict[str, Dataset], task: str | None, config: PretrainedConfig) -> Labels:
    """Returns the labels: of the task, else of the column's type, else the values in the training split.

    Without a training split they are those of the checkpoint. A checkpoint with the same label names in another order
    keeps its order.

    Args:
        splits: split name -> data set with a "label" column.
        task: a GLUE task name or None.
        config: the checkpoint's configuration.
    """
    if task is not None:
        if GLUE_LABELS[task] is None:
            return Labels(None)
        return _in_order_of(config, GLUE_LABELS[task], by_position=True)
    labelled = [split for split in splits.values() if "label" in split.column_names]
    if "train" in splits and splits["train"] not in labelled:
        raise ValueError('the train split has no column "label". Rename the column that holds the labels to "label".')
    source = splits.get("train", labelled[0] if labelled else None)
    if source is not None and isinstance(source.features["label"], ClassLabel):
        return _in_order_of(config, tuple(source.features["label"].names), by_position=True)
    if source is not None and source.features["label"].dtype.startswith(("float", "double", "decimal")):
        return Labels(None)
    if "train" not in splits:
        return _of_checkpoint(config)
    values = sorted(value for value in source.unique("label") if value is not None)
    return _in_order_of(config, tuple(str(value) for value in values), by_position=False)


def check_labels(splits: dict[str, Dataset], labels: Labels) -> None:
    """Raises an error for missing and unknown labels."""
    for split, dataset in splits.items():
        if not has_labels(dataset, labels):
            if split == "train" or split.startswith("validation"):
                raise ValueError(
                    f'the {split} split has no labels. Add a column "label" (only the test split may go without).'
                )
            continue
        unknown = [value for value in dataset.unique("label") if not labels.knows(value)]
        if unknown:
            allowed = "a number" if labels.names is None else ", ".join(f'"{name}"' for name in labels.names)
            raise ValueError(
                f"the {split} split has the label {unknown[0]!r} (and {len(unknown) - 1} more that are not known). "
                f"Allowed: {allowed}. Correct the file, or train on a split that has every label."
            )


def _in_order_of(config: PretrainedConfig, names: tuple[str, ...], by_position: bool) -> Labels:
    """Returns the labels in the checkpoint's order if it has exactly these names (in any case), else as given."""
    lower = {name.lower(): name for name in names}
    order = [str(config.id2label[index]).lower() for index in sorted(config.id2label)]
    in_order = tuple(lower[name] for name in order) if sorted(order) == sorted(lower) else names
    return Labels(in_order, by_position=names if by_position else None)


def _of_checkpoint(config: PretrainedConfig) -> Labels:
    if config.num_labels == 1:
        return Labels(None)
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    # LABEL_0, LABEL_1 ... are the default names of a configuration.
    unnamed = names == tuple(f"LABEL_{index}" for index in range(len(names)))
    return Labels(tuple(str(index) for index in range(len(names))) if unnamed else names)
