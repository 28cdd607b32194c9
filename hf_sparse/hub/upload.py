"""Uploads to the Hub: transient failures are retried, others explained, and files that hold a token are refused."""

from __future__ import annotations

import logging
import re
import shlex
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from ..files import TEMPORARY_GLOB


logger = logging.getLogger(__name__)

# Files that Trainer does not upload either, and temporary files that an interrupted run may have left behind.
IGNORED_PATTERNS = (*DEFAULT_IGNORE_PATTERNS, "_*", "checkpoint-*", TEMPORARY_GLOB)
# Seconds before the second and the third attempt. Within each attempt huggingface_hub retries most requests itself.
RETRY_DELAYS = (2, 10)

_TRANSIENT_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
_FAILED_CONNECTIONS = (HTTPError, ConnectionError, TimeoutError)  # an HTTPError if it has no response
# Not anchored at the end: in a pickled file the byte after the token may be a letter.
_TOKEN_PATTERN = re.compile(rb"\bhf_[A-Za-z0-9]{34}")
# Text files and pickled arguments are small. In gigabytes of weights, bytes that look like a token are chance.
_MAX_SEARCHED_BYTES = 2**24

Result = TypeVar("Result")


class UploadError(RuntimeError):
    """Raised when an upload fails, with the cause and the command to try again. Local files are unchanged."""


class HiddenToken(str):
    """An access token that is replaced by "<HUB_TOKEN>" when an object that holds it is printed or pickled.

    Trainer pickles its arguments, `hub_token` among them, into every checkpoint and uploads them.

    Example:
        >>> HiddenToken("secret") == "secret", repr(HiddenToken("secret"))
        (True, "'<HUB_TOKEN>'")
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("<HUB_TOKEN>",)

    def __repr__(self) -> str:
        return repr("<HUB_TOKEN>")

    def __copy__(self) -> HiddenToken:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HiddenToken:
        return self


def hide_token(args: Any) -> None:
    """Replaces `args.hub_token` by a `HiddenToken`, so that saved training arguments do not contain the token."""
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
    """Uploads a folder to the Hub and creates the repository if there is none. Checkpoint subfolders are left out.

    Args:
        directory: the output folder of a trainer, one of its checkpoints, or the folder of any model.
        repo: "user/name", or "name" for the user of the token.
        private: whether a new repository is private; None for the Hub's default.
        revision: branch to commit to; None for the main branch.
        path_in_repo: folder in the repository; None for its root.
        message: commit message.
        token: access token with write permission; None for HF_TOKEN or the token of `hf auth login`.

    Returns: the commit.

    Raises:
        FileNotFoundError: the folder does not exist or has no files to upload.
        UploadError: the Hub refused, it could not be reached in three attempts, or a file holds an access token.

    Example:
        >>> push("no/such/folder", "user/name")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no/such/folder: there is no such folder, or nothing in it to upload.
    """
    directory = Path(directory)
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())
    files = [directory / name for name in filter_repo_objects(names, ignore_patterns=list(IGNORED_PATTERNS))]
    if not files:
        raise FileNotFoundError(f"{directory}: there is no such folder, or nothing in it to upload.")
    _check_for_tokens(files, token or get_token())
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
            ignore_patterns=list(IGNORED_PATTERNS),
        )

    try:
        return retry_transient(upload)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        command = push_command(directory, repo, private=private, revision=revision, path_in_repo=path_in_repo)
        raise upload_error(error, directory, repo, command) from error


def _check_for_tokens(files: list[Path], token: str | None) -> None:
    """Raises an UploadError if a file holds an access token; a stock Trainer pickles it into training_args.bin."""
    for path in files:
        if path.suffix == ".safetensors" or path.stat().st_size > _MAX_SEARCHED_BYTES:
            continue
        content = path.read_bytes()
        if _TOKEN_PATTERN.search(content) or (token and token.encode() in content):
            raise UploadError(
                f"{path} holds an access token, so nothing was uploaded: remove the token or the file. If others may "
                "have seen the token, revoke it in the settings of your account."
            )


def push_command(
    directory: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    path_in_repo: str | None = None,
) -> str:
    """Returns the command line that uploads `directory`.

    Example:
        >>> push_command("my models/out", "user/name", private=True)
        "hf-sparse push 'my models/out' user/name --private"
    """
    words = ["hf-sparse", "push", str(directory), repo, *(["--private"] if private else [])]
    for option, value in (("--revision", revision), ("--path-in-repo", path_in_repo)):
        words += [option, value] if value else []
    return shlex.join(words)


def retry_transient(request: Callable[[], Result]) -> Result:
    """Calls `request`, up to three times while it fails with transient errors, and returns its result."""
    for delay in RETRY_DELAYS:
        try:
            return request()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("%s Trying again in %d seconds.", describe_error(error), delay)
            time.sleep(delay)
    return request()


def upload_error(error: BaseException, directory: str | Path, repo: str, command: str) -> UploadError:
    """Returns the `UploadError` for `error`, with the cause and the command to try again."""
    return UploadError(
        f"{directory} was not uploaded to {repo}. {describe_error(error)} The local files are unchanged. To try "
        f"again:\n    {command}"
    )


def is_hub_error(error: Exception) -> bool:
    """Whether huggingface_hub's API raised `error`, in contrast to, say, a full disk while the model is saved."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "huggingface_hub.hf_api" for frame, _ in frames)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the Hub was busy or the connection failed."""
    status = _http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES
    if _is_xet_unsupported(error):
        return False
    return _is_caused_by(error, *_FAILED_CONNECTIONS) and not _is_caused_by(error, OfflineModeIsEnabled)


def describe_error(error: BaseException) -> str:
    """Returns one line with the cause of a failed request, and the remedy if there is one."""
    status = _http_status(error)
    if _is_caused_by(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing was sent to the Hub: unset it."
    if status == 401 or _is_caused_by(error, LocalTokenNotFoundError):
        return "The Hub requires a valid token (401): log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "The token has no write permission (403): use one that has, or another repository."
    if _is_xet_unsupported(error):
        return "This Hub does not support Xet uploads (404): set HF_HUB_DISABLE_XET=1."
    if status == 404:
        return "The repository or revision does not exist, or the token has no access to it (404)."
    if status is not None:
        message = getattr(error, "server_message", None) or str(error)
        return f"The Hub answered {status}: {' '.join(message.split()).rstrip('.')}."
    if _is_caused_by(error, *_FAILED_CONNECTIONS):
        return f"The Hub could not be reached, or the connection was cut ({_root_cause(error)})."
    return f"{_root_cause(error)}."


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_caused_by(error: BaseException, *types: type[BaseException]) -> bool:
    return any(isinstance(cause, types) for cause in _exception_chain(error))


def _http_status(error: BaseException) -> int | None:
    """Returns the HTTP status of the Hub's response; None if there was no response."""
    responses = (getattr(cause, "response", None) for cause in _exception_chain(error))
    return next((response.status_code for response in responses if response is not None), None)


def _is_xet_unsupported(error: BaseException) -> bool:
    """Whether a Hub other than huggingface.co refused a Xet upload; hf_xet has no exception type for that."""
    return any("xet-write-token" in str(cause) and "404" in str(cause) for cause in _exception_chain(error))


def _root_cause(error: BaseException) -> str:
    """Returns the type and the first line of the exception at the end of the chain."""
    cause = list(_exception_chain(error))[-1]
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0].rstrip('.')}" if lines else type(cause).__name__
