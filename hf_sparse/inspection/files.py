"""Which files make up a checkpoint: on disk, in the Hub's cache, or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .. import files as storage


# What models and adapters are saved as, in the order in which they are looked for.
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Masks and sums of a pruning run, and what else Trainer saves: not the model's weights.
_NOT_WEIGHTS = ("pruning_", "optimizer", "scheduler", "scaler", "rng_state", "training_args")


class InspectionError(ValueError):
    """A checkpoint that cannot be read: which, why, and the remedy."""


def find_weights(place: str | Path, revision: str | None = None) -> list[Path]:
    """The safetensors files of one checkpoint.

    Args:
        place: a file, a directory, or the name of a repository on the Hub, whose files are downloaded into the
            cache, or taken from there when the Hub cannot be reached.
        revision: of the repository.

    Raises:
        InspectionError: there is no such checkpoint, a part of it is missing, or it is held in pickle files.
    """
    path = Path(place)
    if path.is_dir():
        return _weights_in(path)
    if path.is_file():
        _refuse_pickle(path, [path])
        return _shards(path) if path.name.endswith(_INDEX) else [path]
    if not _REPO.fullmatch(str(place)) or path.suffix in (".safetensors", ".json", *_PICKLES):
        raise InspectionError(f"{place} does not exist.")
    return _weights_in(_downloaded(str(place), revision))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; {} if there is no such file.

    Raises:
        InspectionError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        return storage.read_json(path)
    except ValueError as error:
        raise InspectionError(f"{error}") from error


def _weights_in(folder: Path) -> list[Path]:
    for stem in _STEMS:
        if (folder / f"{stem}{_INDEX}").is_file():
            return _shards(folder / f"{stem}{_INDEX}")
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(_NOT_WEIGHTS))
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(path.name for path in found)
        raise InspectionError(f"{folder} holds several safetensors files and no index: {names}. Name one of them.")
    _refuse_pickle(folder, [path for path in sorted(folder.iterdir()) if not path.name.startswith(_NOT_WEIGHTS)])
    inner = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
    hint = f" Did you mean {folder / inner[-1]}?" if inner else " Save the model with save_pretrained first."
    raise InspectionError(f"{folder} holds no safetensors file.{hint}")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InspectionError(f"{index} is damaged: it must map the names of tensors to files under weight_map.")
    files = sorted(set(names.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise InspectionError(f"{index} names a file outside its directory: {outside[0]}.")
    if missing := [name for name in files if not (index.parent / name).is_file()]:
        raise InspectionError(
            f"{len(missing)} of the {len(files)} files that {index} names are missing, such as {missing[0]}: copy or "
            "download the checkpoint again."
        )
    return [index.parent / name for name in files]


def _refuse_pickle(place: Path, paths: list[Path]) -> None:
    if pickles := [path.name for path in paths if path.suffix in _PICKLES]:
        raise InspectionError(
            f"{place} holds weights as pickle ({pickles[0]}), which can run any code when it is opened. If you trust "
            "it, load the model with from_pretrained, write it with save_pretrained, and inspect what that wrote."
        )


def _downloaded(repo: str, revision: str | None) -> Path:
    """The repository's snapshot in the cache, with nothing but what is read here: an index says which weights."""

    def snapshot(*patterns: str) -> Path:
        # No pattern means a file in a folder: those are other formats of the same weights.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))

    try:
        folder = snapshot("config.json", storage.REPORT_FILE, storage.CONFIG_FILE, *(f"{s}{_INDEX}" for s in _STEMS))
        for stem in _STEMS:
            names = read_json(folder / f"{stem}{_INDEX}").get("weight_map", {})
            wanted = {name for name in names.values() if isinstance(name, str)} or {f"{stem}.safetensors"}
            folder = snapshot(*sorted(wanted))
            if any((folder / name).is_file() for name in wanted):
                return folder
        folder = snapshot("*.safetensors")
    except OSError as error:
        reason = str(error).strip().splitlines()
        raise InspectionError(
            f"{repo} is no file or directory here, and as a repository of the Hub it could not be read "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the name, log in with "
            "`hf auth login` if it is private, or, without a network, copy its files here and name their directory."
        ) from error
    if not list(folder.glob("*.safetensors")):
        raise InspectionError(
            f"{repo} holds no safetensors file at its top. If it holds pickle (.bin) and you trust it, load the model "
            "with from_pretrained, write it with save_pretrained, and inspect what that wrote."
        )
    return folder
