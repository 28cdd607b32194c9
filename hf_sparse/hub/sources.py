"""Checks that a model can be read before anything is loaded: a folder and its files, or a name on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ..files import open_tensors, read_weight_index
from ..registry import nearest


_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")
# Beginnings of the names of what a pruning run and Trainer save beside the weights.
_NOT_WEIGHTS = ("pruning_", "optimizer", "scheduler", "scaler", "rng_state", "training_args")
_TIMEOUT = 5.0
"""Seconds to wait for the Hub: this is one request, and transformers tries several times."""


def check_model(
    name: str,
    option: str | None = None,
    *,
    revision: str = "main",
    cache_dir: str | None = None,
    token: str | None = None,
) -> None:
    """Checks that there is a model: in a folder, whose weight files are complete, in the cache, or on the Hub.

    Takes one request where the model is on the Hub, and milliseconds for a folder.

    Args:
        name: folder or Hub name.
        option: that names it, for the message.
        revision, cache_dir, token: as in `from_pretrained`.

    Raises:
        OSError: there is none, or the Hub cannot be reached.
        ValueError: a weight file is damaged.
    """
    where = "" if option is None else f"`{option}`: "
    if Path(name).is_dir():
        _check_folder(Path(name), where)
    else:
        _check_hub(name, "config.json", where, revision, cache_dir, token)


def check_tokenizer_source(
    name: str,
    option: str | None = None,
    *,
    revision: str = "main",
    cache_dir: str | None = None,
    token: str | None = None,
) -> None:
    """Checks that there is a folder or a repository on the Hub to load a tokenizer from: as `check_model`.

    Raises:
        OSError: there is none, or the Hub cannot be reached.
    """
    if not Path(name).is_dir():
        where = "" if option is None else f"`{option}`: "
        _check_hub(name, "tokenizer_config.json", where, revision, cache_dir, token)


def _check_folder(folder: Path, where: str) -> None:
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise OSError(
                f'{where}"{folder}" holds an adapter, and no model: load it with PEFT, merge it by merge_and_unload, '
                "and save the result."
            )
        subfolders = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f' Did you mean "{subfolders[-1]}"?' if subfolders else " Name what save_pretrained has written."
        raise OSError(f'{where}there is no model in "{folder}": it has no config.json.{hint}')
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    weights = [path for path in weights if not path.name.startswith(_NOT_WEIGHTS)]
    if not weights:
        raise OSError(f'{where}"{folder}" has a config.json, but no weights: copy or download the model again.')
    for path in weights:
        try:
            _check_file(path)
        except ValueError as error:
            raise ValueError(f"{where}{error} Copy or download it again.") from error


def _check_file(path: Path) -> None:
    if path.suffix == ".safetensors":
        open_tensors(path)
    elif path.suffix == ".json" and (missing := [file for file in read_weight_index(path) if not file.is_file()]):
        raise ValueError(f"{missing[0]}, which {path.name} names, does not exist.")


def _check_hub(name: str, file: str, where: str, revision: str, cache_dir: str | None, token: str | None) -> None:
    path = Path(name)
    if path.is_file():
        raise OSError(f'{where}"{name}" is a file: name the folder that it is in.')
    parent = path.parent
    siblings = [str(parent / each.name) for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []
    hint = nearest(name, siblings)
    if not _REPOSITORY.fullmatch(name):
        raise OSError(f'{where}there is no folder "{name}".{hint}')
    cached = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), token=token, timeout=_TIMEOUT)
    except RevisionNotFoundError as error:
        raise OSError(f'{where}"{name}" on the Hub has no branch, tag or commit "{revision}".') from error
    except GatedRepoError as error:
        raise OSError(
            f'{where}"{name}" on the Hub is gated: accept its conditions there, and log in with `hf auth login`.'
        ) from error
    except RepositoryNotFoundError as error:
        login = hint or " If it is private, log in with `hf auth login`."
        raise OSError(f'{where}there is no folder "{name}", and no model of that name on the Hub.{login}') from error
    except EntryNotFoundError as error:
        if file == "config.json":
            raise OSError(f'{where}"{name}" on the Hub has no config.json, so it holds no model.') from error
    except Exception as error:  # that of the HTTP library, which differs between versions of huggingface_hub
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f'{where}there is no folder "{name}", and the Hub cannot be asked for that name ({reason}).{hint}'
        ) from error
