"""Uploads to the Hub: tried again where that helps, explained where it does not, and never with a token in a file."""

from __future__ import annotations

import logging
import re
import shlex
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects


logger = logging.getLogger(__name__)

# `HTTPError` is httpx's or httpx2's, whichever this huggingface_hub uses; one without an answer is of the connection.

# What Trainer does not upload either, and what a killed run may have left of a file that it was writing.
IGNORED = (*DEFAULT_IGNORE_PATTERNS, "_*", "checkpoint-*", ".pruning_*")
# Seconds before the second and the third attempt. Within each, huggingface_hub tries most requests again by itself.
WAITS = (2, 10)

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
# Without an end: in a pickled file, what comes next may be a letter.
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{34}")
# Files of text or of pickled arguments are small; a token in gigabytes of weights is chance.
_SEARCHED_BYTES = 2**24

Result = TypeVar("Result")


class UploadError(RuntimeError):
    """An upload that failed: what failed, and the command that tries it again. Local files are as they were."""


class HiddenToken(str):
    """A token that works, and is left out when what holds it is printed or saved.

    Trainer saves its arguments, `hub_token` among them, in every checkpoint, and uploads them.

    Example:
        >>> HiddenToken("secret") == "secret", repr(HiddenToken("secret"))
        (True, "'<HUB_TOKEN>'")
    """

    __slots__ = ()

    def __reduce__(self):
        return str, ("<HUB_TOKEN>",)

    def __repr__(self) -> str:
        return repr("<HUB_TOKEN>")

    def __copy__(self) -> HiddenToken:
        return self

    def __deepcopy__(self, memo) -> HiddenToken:
        return self


def hide_token(args) -> None:
    """Keep the token in a trainer's arguments out of what is saved of them."""
    if getattr(args, "hub_token", None) and not isinstance(args.hub_token, HiddenToken):
        args.hub_token = HiddenToken(args.hub_token)


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    path_in_repo: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Upload a folder to the Hub; the repository is made where there is none. Checkpoints inside are left out.

    Args:
        directory: the folder: of a trainer, one of its checkpoints, or any model.
        repo: "user/name", or "name" under the user whose token it is.
        private: whether the repository, if it is made, is private. Left out: as the Hub has it by default.
        revision: the branch to commit to.
        path_in_repo: the folder in the repository; its root if left out.
        message: of the commit.
        token: one with write permission; that of HF_TOKEN, or of `hf auth login`, if left out.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
        UploadError: the Hub refused, or could not be reached in three attempts; or a file holds an access token.

    Example:
        >>> push("no/such/folder", "user/name")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no/such/folder: there is no such folder, or nothing in it to upload.
    """
    directory = Path(directory)
    files = _files(directory)
    if not files:
        raise FileNotFoundError(f"{directory}: there is no such folder, or nothing in it to upload.")
    _refuse_tokens(files, token or get_token())
    api = HfApi(library_name="hf_sparse")

    def upload() -> CommitInfo:
        name = api.create_repo(repo, private=private, exist_ok=True, token=token).repo_id
        return api.upload_folder(
            repo_id=name,
            folder_path=directory,
            path_in_repo=path_in_repo,
            commit_message=message or "Upload with hf_sparse",
            revision=revision,
            token=token,
            ignore_patterns=list(IGNORED),
        )

    try:
        return with_patience(upload)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        command = push_command(directory, repo, private=private, revision=revision, path_in_repo=path_in_repo)
        raise upload_error(error, directory, repo, command) from error


def _files(directory: Path) -> list[Path]:
    """What would be uploaded."""
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())
    return [directory / name for name in filter_repo_objects(names, ignore_patterns=list(IGNORED))]


def _refuse_tokens(files: list[Path], token: str | None) -> None:
    """A token that is uploaded is everybody's: a stock Trainer leaves its `hub_token` in training_args.bin."""
    for path in files:
        if path.suffix == ".safetensors" or path.stat().st_size > _SEARCHED_BYTES:
            continue
        content = path.read_bytes()
        if _TOKEN.search(content) or (token and token.encode() in content):
            raise UploadError(
                f"{path} holds an access token, so nothing was uploaded: take the token, or the file, away. If others "
                "have seen it, revoke it in the settings of your account."
            )


def push_command(
    directory: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    path_in_repo: str | None = None,
) -> str:
    """The command line that uploads `directory`.

    Example:
        >>> push_command("my models/out", "user/name", private=True)
        "hf-sparse push 'my models/out' user/name --private"
    """
    words = ["hf-sparse", "push", str(directory), repo, *(["--private"] if private else [])]
    for option, value in (("--revision", revision), ("--path-in-repo", path_in_repo)):
        words += [option, value] if value else []
    return shlex.join(words)


def with_patience(work: Callable[[], Result]) -> Result:
    """Do `work`, again after a while when the Hub was busy or could not be reached, and raise what it raised last."""
    for wait in WAITS:
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("%s Trying again in %d seconds.", explain(error), wait)
            time.sleep(wait)
    return work()


def upload_error(error: BaseException, directory: str | Path, repo: str, command: str) -> UploadError:
    """What to raise, or to log, in the place of `error`."""
    return UploadError(
        f"{directory} was not uploaded to {repo}. {explain(error)} The files are all still there. To try again:\n"
        f"    {command}"
    )


def is_from_hub(error: Exception) -> bool:
    """Whether huggingface_hub's API raised it: what fails while a model is written is no failure of its upload."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "huggingface_hub.hf_api" for frame, _ in frames)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the Hub was busy, or the connection failed."""
    status = _status(error)
    if status is not None:
        return status in _BUSY
    if _lacks_xet(error):
        return False
    return not _has(error, OfflineModeIsEnabled) and _has(error, HTTPError, ConnectionError, TimeoutError)


def explain(error: BaseException) -> str:
    """One line for people: what went wrong, and the remedy where there is one."""
    status = _status(error)
    if _has(error, OfflineModeIsEnabled):
        return "The Hub was not asked, because HF_HUB_OFFLINE is set: unset it."
    if status == 401 or _has(error, LocalTokenNotFoundError):
        return "The Hub wants a valid token (401): log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "The token may not write there (403): take one with write permission, or another repository."
    if _lacks_xet(error):
        return "This Hub does not take uploads by Xet (404): set HF_HUB_DISABLE_XET=1."
    if status == 404:
        return "The Hub knows no such repository or revision, or hides it from this token (404)."
    if status is not None:
        return f"The Hub answered {status}: {_details(error)}."
    if _has(error, HTTPError, ConnectionError, TimeoutError):
        return f"The Hub could not be reached, or the connection was cut ({_first_line(error)})."
    return f"{_first_line(error)}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(error: BaseException, *types: type[BaseException]) -> bool:
    return any(isinstance(link, types) for link in _chain(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status with which the Hub refused, if it answered at all."""
    answers = (getattr(link, "response", None) for link in _chain(error))
    return next((answer.status_code for answer in answers if answer is not None), None)


def _lacks_xet(error: BaseException) -> bool:
    """Whether a Hub that is not huggingface.co has refused a Xet upload; hf_xet says so in words only."""
    return any("xet-write-token" in str(link) and "404" in str(link) for link in _chain(error))


def _details(error: BaseException) -> str:
    """What the Hub said on its refusal, or what huggingface_hub made of it."""
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(said.split()).rstrip(".")


def _first_line(error: BaseException) -> str:
    cause = list(_chain(error))[-1]
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0].rstrip('.')}" if text else type(cause).__name__
