"""Files: written whole or not at all, read without trusting them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_atomically(path: str | Path, write: Callable[[str], None]) -> None:
    """Have `write` fill a file beside `path`, then rename it: whoever reads `path` sees the old or the new, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_folder_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder beside `path`, then rename it. What was at `path` before is removed then, and so is
    what a writing that was killed has left."""
    path = Path(path)
    new, old = (path.with_name(f".{path.name}-{end}") for end in ("new", "old"))
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        write(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object, but holds {type(values).__name__}.")
    return values


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and text to one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def open_tensors(path: str | Path) -> tuple[Mapping[str, torch.Tensor], dict[str, str]]:
    """What `write_tensors` wrote: tensors, each read when it is asked for, and text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short or not a safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        file = safe_open(str(path), framework="pt")
        return _Tensors(file), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or is no safetensors file: {error}") from error


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, file):
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


STATE_FILE = "pruning_state.safetensors"


CONFIG_FILE = "pruning_config.json"


REPORT_FILE = "pruning_report.json"


CARD_FILE = "pruning_card.json"


SCHEDULE_FILE = "pruning_schedule.png"


LAYERS_FILE = "pruning_layers.png"


README = "README.md"
