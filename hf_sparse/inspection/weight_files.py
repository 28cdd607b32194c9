"""The weight files of a checkpoint: in a directory, in the Hub's cache, or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .. import files
from ..files import CARD_FILE, CONFIG_FILE, README_FILE, REPORT_FILE, SHRINK_FILE


# File names of saved models and adapters, in the order of preference.
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
_INDEX = ".safetensors.index.json"
_CONVERT = "load the model with from_pretrained, save it with save_pretrained, and inspect the result."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_REPO = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Beginnings of the names of what a pruning run and Trainer save beside the weights.
_NOT_WEIGHTS = ("pruning_", "optimizer", "scheduler", "scaler", "rng_state", "training_args")


class InspectionError(ValueError):
    """A checkpoint cannot be read. The message says which, why, and what to do."""


def find_weight_files(source: str | Path, revision: str | None = None) -> list[Path]:
    """Returns the safetensors files of a checkpoint.

    Args:
        source: a file, a directory, or the name of a repository on the Hub. The files of a repository are downloaded
            into the cache, or taken from there if the Hub cannot be reached.
        revision: branch, tag or commit of the repository.

    Raises:
        InspectionError: if there is no such checkpoint, some of its files are missing, or it is stored as pickle.
    """
    path = Path(source)
    if revision is not None and path.exists():
        raise InspectionError(f"`revision` is of models on the Hub, and {source} is on this machine: leave it out.")
    if path.is_dir():
        return _files_in(path)
    if path.is_file():
        _refuse_pickle(path, [path])
        return _files_of_index(path) if path.name.endswith(_INDEX) else [path]
    if not _REPO.fullmatch(str(source)) or path.suffix in (".safetensors", ".json", *_PICKLES):
        raise InspectionError(f"{source} does not exist.")
    return _files_in(_download(str(source), revision))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; {} if there is no such file."""
    try:
        return files.read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise InspectionError(f"{error}") from error


def _files_in(folder: Path) -> list[Path]:
    for stem in _STEMS:
        if (folder / f"{stem}{_INDEX}").is_file():
            return _files_of_index(folder / f"{stem}{_INDEX}")
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    candidates = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(_NOT_WEIGHTS))
    if len(candidates) == 1:
        return candidates
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise InspectionError(f"{folder} holds several safetensors files and no index: {names}. Name one of them.")
    _refuse_pickle(folder, [path for path in sorted(folder.iterdir()) if not path.name.startswith(_NOT_WEIGHTS)])
    subfolders = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
    hint = f"Did you mean {folder / subfolders[-1]}?" if subfolders else "Save the model with save_pretrained first."
    raise InspectionError(f"{folder} holds no safetensors file. {hint}")


def _files_of_index(index: Path) -> list[Path]:
    paths = _paths_in_index(index)
    if missing := [path.name for path in paths if not path.is_file()]:
        raise InspectionError(
            f"{len(missing)} of the {len(paths)} files that {index} names are missing, such as {missing[0]}: copy or "
            "download the checkpoint again."
        )
    return paths


def _paths_in_index(index: Path) -> list[Path]:
    try:
        return files.read_weight_index(index)
    except ValueError as error:
        raise InspectionError(f"{error}") from error


def _refuse_pickle(source: Path, paths: list[Path]) -> None:
    if pickles := [path.name for path in paths if path.suffix in _PICKLES]:
        raise InspectionError(
            f"{source} holds weights as pickle ({pickles[0]}), which can run any code when it is opened. If you trust "
            f"it, {_CONVERT}"
        )


def _download(repo: str, revision: str | None) -> Path:
    """Downloads what is inspected of a repository, and returns its folder in the cache."""

    def snapshot(*patterns: str) -> Path:
        # Subfolders are left out: they hold the same weights in other formats.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*"))

    try:
        beside = ("config.json", REPORT_FILE, CONFIG_FILE, CARD_FILE, README_FILE, SHRINK_FILE)
        folder = snapshot(*beside, *(f"{stem}{_INDEX}" for stem in _STEMS))
        for stem in _STEMS:
            index = folder / f"{stem}{_INDEX}"
            names = {path.name for path in _paths_in_index(index)} if index.is_file() else {f"{stem}.safetensors"}
            folder = snapshot(*sorted(names))
            if any((folder / name).is_file() for name in names):
                return folder
        folder = snapshot("*.safetensors")
    except OSError as error:
        reason = str(error).strip().splitlines()
        raise InspectionError(
            f'there is no file or folder "{repo}", and a repository of that name on the Hub could not be read '
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the name, log in with "
            "`hf auth login` if it is private, or, without a network, copy its files here and name their folder."
        ) from error
    if not list(folder.glob("*.safetensors")):
        raise InspectionError(
            f"{repo} holds no safetensors file at its top level. If it holds pickle (.bin) and you trust it, "
            f"{_CONVERT}"
        )
    return folder
