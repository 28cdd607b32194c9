"""The names of the files that the package writes, and atomic writing: a file is complete or absent.

Reading never unpickles, takes time and memory in proportion to the size of the file, and damaged files raise a
ValueError that names them.
"""

from __future__ import annotations

import glob
import json
import os
import re
import reprlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


STATE_FILE = "pruning_state.safetensors"
"""Masks, sums of the criteria and the config of a checkpoint, where every process holds whole weights."""
STATE_SHARD_PATTERN = re.compile(r"pruning_state-(?P<number>[0-9]{5,})-of-(?P<count>[0-9]{5,})\.safetensors")
"""The same for one process of several that hold parts of the weights; numbers start at 1."""
STATE_GLOB = "pruning_state*"
TUNING_FILE = "pruning_tuning.safetensors"
"""Trained updates of weights, and the weights at the start, of a checkpoint."""
DISTILLATION_FILE = "pruning_distillation.json"
"""Options of distillation and a checksum of the teacher's weights, of a checkpoint."""
CONFIG_FILE = "pruning_config.json"
REPORT_FILE = "pruning_report.json"
CARD_FILE = "pruning_card.json"
SHRINK_FILE = "pruning_shrink.json"
"""What was removed from a model that was made smaller."""
SCHEDULE_PLOT_FILE = "pruning_schedule.png"
LAYERS_PLOT_FILE = "pruning_layers.png"
TEMPORARY_GLOB = ".pruning_*"
"""What `write_atomically` leaves of the files above when the process is killed."""
README_FILE = "README.md"
DENSE_RESULTS_FILE = "dense_results.json"
ONESHOT_RESULTS_FILE = "oneshot_results.json"
FINISHED_BLOCK_GLOB = "stage-*.safetensors"

MAX_JSON_BYTES = 2**25
"""Larger files are not read. The largest that are known, indices of models with 100,000 tensors, have half as much."""
MAX_DEPTH = 64
"""Of lists and mappings in each other, in JSON and in recipes."""
MAX_DIGITS = 300
"""Of a whole number, in JSON and in recipes: each can be converted to a float."""


def state_shard_file(rank: int, world_size: int) -> str:
    """Returns the name of the state file of one rank, which `STATE_SHARD_PATTERN` matches."""
    return f"pruning_state-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def finished_block_file(index: int) -> str:
    """Returns the name of the file that holds the pruned weights of one block of an interrupted one-shot run."""
    return f"stage-{index:05d}.safetensors"


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Replaces a file atomically: readers see the old content or the new, never a part.

    Temporary files of earlier calls for the same path that were killed are removed.

    Args:
        path: the file; missing parent folders are created.
        write: called with the name of a temporary file in the same folder, which is then renamed to `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}-????????{glob.escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: str | Path, option: str) -> None:
    """Checks before any work that a folder can be written, or made.

    Args:
        path: the folder.
        option: that names it, and its value, for the message: "output_dir out".

    Raises:
        OSError: it is a file, or its nearest parent that exists is none or cannot be written.
    """
    path = Path(path).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{option} cannot be written, because {nearest} is a file: name another folder.")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise type(error)(
            f"{option} cannot be written, nor anything in {nearest} ({error.strerror}): name another folder."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_folder_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Replaces a folder: `write` fills a new folder beside `path`, which is then renamed to `path`.

    Leftovers of an earlier call that was killed are removed.

    Args:
        path: the folder; its old content is removed once the new is complete.
        write: called with the new folder, which exists and is empty.
    """
    path = Path(path)
    new, old = (path.with_name(f".{path.name}-{end}") for end in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        write(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_text(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Returns the text of a file in UTF-8.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it has more than `max_bytes` bytes, or is not text. The message does not have the path.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return data.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Returns the value of JSON that others wrote.

    Raises:
        ValueError: it is no JSON, has a key twice, a whole number of more than `MAX_DIGITS` digits, or lists and
            mappings more than `MAX_DEPTH` levels deep.

    Example:
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key "a" is there twice
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_parse_int)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f'the key "{next(key for key in counts if counts[key] > 1)[:80]}" is there twice')
    return values


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:10]}... has {len(digits):,} digits: at most {MAX_DIGITS} are allowed")
    return int(digits)


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: `parse_json` refuses it, it is too large, or it holds another type than an object.
    """
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object, but holds {type(values).__name__}.")
    return values


def read_weight_index(index: str | Path) -> list[Path]:
    """Returns the files that the index of a model saved in several files names, whether they exist or not.

    Raises:
        ValueError: the index is damaged, or names a file outside its folder.
    """
    index = Path(index)
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise ValueError(f"{index} is damaged: its weight_map must map names of tensors to names of files.")
    names = sorted(set(file_of.values()))
    if outside := [name for name in names if not name or Path(name).name != name or "\0" in name or len(name) > 255]:
        raise ValueError(
            f"{index} names something that cannot be a file in its directory: {reprlib.repr(outside[0])}."
        )
    return [index.parent / name for name in names]


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def open_tensors(path: str | Path) -> tuple[Mapping[str, torch.Tensor], dict[str, str]]:
    """Opens a safetensors file.

    Returns: its tensors, each read from disk when it is looked up, and its metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is cut short or is not a safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        file = safe_open(str(path), framework="pt")
        return _LazyTensors(file), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


class _LazyTensors(Mapping[str, torch.Tensor]):
    """The tensors of an open safetensors file, by name."""

    def __init__(self, file: safe_open):
        self._file, self._names = file, dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError) as error:
            raise ValueError(f'tensor "{name}" cannot be read: {error}') from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
