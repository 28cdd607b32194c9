"""Uploads a folder with a card that is written for its repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ...files import CARD_FILE, CONFIG_FILE, README_FILE, REPORT_FILE, SHRINK_FILE, write_atomically
from ..card_metadata import CardMetadata
from ..upload import push
from .writing import has_card_files, rewrite_card


_CARD_FILES = (README_FILE, CARD_FILE, CONFIG_FILE, REPORT_FILE, SHRINK_FILE)


def push_with_card(directory: str | Path, repo: str, given: CardMetadata | None = None, **options: Any) -> CommitInfo:
    """Rewrites the card of a pruned model for a repository, and uploads the folder: `rewrite_card`, then `push`.

    The card stays as it is if the folder has none of hf_sparse, if `repo` is "name" without a user, and with
    `path_in_repo`. If the upload fails, the files in the folder are as they were.

    Args:
        directory: the folder.
        repo: "user/name", or "name" for the user of the token.
        given: metadata of the card.
        options: those of `push`.

    Returns: the commit.

    Raises:
        ValueError: `given` has metadata, and the card cannot be rewritten.
        FileNotFoundError, UploadError: as `push` does.
    """
    if not (has_card_files(directory) and "/" in repo and not options.get("path_in_repo")):
        if given is not None and (names := ", ".join(given.to_dict())):
            raise ValueError(
                f"{names} cannot be written into a card: the folder must be that of a pruned model with "
                f'{CARD_FILE}, the repository "user/name", and `path_in_repo` left out.'
            )
        return push(directory, repo, **options)
    with _restored_on_failure(Path(directory)):
        rewrite_card(directory, repo, options.get("token"), given=given)
        return push(directory, repo, **options)


def _write_bytes(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


@contextmanager
def _restored_on_failure(directory: Path) -> Iterator[None]:
    """Context that restores the files of a card, or their absence, if an exception leaves it."""
    contents = {
        path: path.read_bytes() if path.is_file() else None for path in (directory / name for name in _CARD_FILES)
    }
    try:
        yield
    except BaseException:
        for path, content in contents.items():
            if content is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != content:
                write_atomically(path, partial(_write_bytes, content=content))
        raise
