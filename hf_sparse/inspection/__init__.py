"""Checkpoints read from their files, tensor by tensor: no model is built."""

from pathlib import Path

from ..report import count_zeros
from ..storage import open_tensors


def count_by_tensor(path: Path) -> dict[str, tuple[int, int]]:
    """The zeros and the values of each tensor in a safetensors file."""
    tensors, _ = open_tensors(path)
    return {name: (count_zeros(tensors[name]), tensors[name].numel()) for name in sorted(tensors)}
