"""Layers grouped by the block that contains them and by their kind, both read from their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .tables import format_sparsity


OUTSIDE_BLOCKS = "outside blocks"
MAX_ROWS = 24
"""More layers than these are shown grouped by kind and block, unless all are asked for."""


def split_name(name: str) -> tuple[str, str]:
    """Splits the name of a parameter into the block that contains it and its kind, which it has in every block.

    A block ends with the first number in the name; further numbers, such as those of experts, become "*".

    Example:
        >>> split_name("bert.encoder.layer.3.attention.self.query.weight")
        ('bert.encoder.layer.3', 'attention.self.query')
        >>> split_name("model.layers.0.mlp.experts.7.up_proj.weight")
        ('model.layers.0', 'mlp.experts.*.up_proj')
        >>> split_name("bert.pooler.dense.weight")
        ('outside blocks', 'bert.pooler.dense')
    """
    parts = name.removesuffix(".weight").split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if number is None or number == len(parts) - 1:
        return OUTSIDE_BLOCKS, ".".join(parts)
    kind = ("*" if part.isdecimal() else part for part in parts[number + 1 :])
    return ".".join(parts[: number + 1]), ".".join(kind)


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one block, or of one kind.

    Args:
        name: of the block or kind.
        layers: their indices.
    """

    name: str
    layers: tuple[int, ...]


def group_layers(names: Iterable[str]) -> tuple[list[LayerGroup], list[LayerGroup]]:
    """Groups layers by block and by kind, both in the order in which they appear.

    Example:
        >>> blocks, kinds = group_layers(["h.0.up.weight", "h.0.down.weight", "h.1.up.weight", "h.1.down.weight"])
        >>> [(group.name, group.layers) for group in (*blocks, *kinds)]
        [('h.0', (0, 1)), ('h.1', (2, 3)), ('up', (0, 2)), ('down', (1, 3))]
    """
    split = [split_name(name) for name in names]
    return _groups([block for block, _ in split]), _groups([kind for _, kind in split])


def _groups(keys: Sequence[str]) -> list[LayerGroup]:
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return [LayerGroup(key, tuple(indices)) for key, indices in members.items()]


def is_grouped(names: Sequence[str], all_layers: bool | None) -> bool:
    """Returns whether layers are shown grouped: if asked for, or if there are many and groups are fewer.

    Example:
        >>> names = [f"layers.{block}.{kind}" for block in range(12) for kind in ("up", "down")]
        >>> is_grouped(names, None), is_grouped([*names, "pooler"], None), is_grouped([*names, "pooler"], True)
        (False, True, False)
    """
    if all_layers is not None:
        return not all_layers and len(names) > 1
    return len(names) > MAX_ROWS and sum(map(len, group_layers(names))) < len(names)


def group_rows(
    groups: Iterable[LayerGroup], labels: Sequence[Sequence[str]], figures: Callable[[Sequence[int]], Iterable[str]]
) -> list[tuple[str, ...]]:
    """Returns a table row per group: its name, its labels, its number of layers, and its figures.

    Args:
        labels: sequences with a text for each layer, such as shapes: a group has the ones of its layers.
        figures: computes the last cells from the indices of the layers.
    """
    return [
        (group.name, *(_common([label[i] for i in group.layers]) for label in labels))
        + (f"{len(group.layers)}", *figures(group.layers))
        for group in groups
    ]


def _common(labels: Sequence[str]) -> str:
    different = list(dict.fromkeys(labels))
    return ", ".join(different) if len(different) < 3 else "mixed"


def sparsity_figures(zeros: Sequence[int], weights: Sequence[int]) -> Callable[[Sequence[int]], tuple[str, ...]]:
    """Returns the figures of a group: zeros, weights, sparsity, and the lowest and highest sparsity of its layers."""

    def figures(layers: Sequence[int]) -> tuple[str, ...]:
        sparsities = [zeros[i] / weights[i] if weights[i] else 0.0 for i in layers]
        counts = format_sparsity(sum(zeros[i] for i in layers), sum(weights[i] for i in layers))
        return (*counts, f"{min(sparsities):.2%}", f"{max(sparsities):.2%}")

    return figures
