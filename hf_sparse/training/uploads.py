"""Uploads of a trainer to the Hub. A failed upload is logged or raised with its remedy and does not stop training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..distributed import raise_on_all_ranks
from ..hub.upload import (
    UploadError,
    describe_error,
    is_hub_error,
    is_transient,
    push,
    push_command,
    retry_transient,
    upload_error,
)


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


logger = logging.getLogger(__name__)


class UploadWatcher(TrainerCallback):
    """Follows the uploads of checkpoints. Trainer starts them in the background, or leaves them out while one runs."""

    def __init__(self, trainer: HubUploadMixin):
        self.trainer = trainer
        self._step_of_upload: int | None = None
        self._watched: list[Future] = []

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_of_upload = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        uploads = list(self.trainer.background_uploads)
        started = [upload for upload in uploads if upload not in self._watched]
        for upload in started:
            upload.add_done_callback(_log_failure)
        is_started = self._step_of_upload == state.global_step
        if is_started and not started:
            logger.warning(
                "This version of transformers does not show the uploads that it starts: if one of them fails, nothing "
                "says so. Look at the repository after training."
            )
        self._watched = uploads
        self.trainer.is_upload_skipped = not is_started


class HubUploadMixin(TrainerBase):
    """The methods of `SparseTrainerMixin` that upload to the Hub."""

    hub_model_id: str | None  # type: ignore[assignment] # Trainer's is inferred as None
    _last_saved_checkpoint: str | None = None
    is_upload_skipped = False
    """Whether the latest checkpoint was not uploaded because an earlier upload was running."""

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's `init_hf_repo`, retried if the Hub is busy or cannot be reached. All ranks call it.

        Raises:
            UploadError: what failed, and the remedy. With `push_to_hub=True` this is before any training.
        """
        with raise_on_all_ranks(Exception):
            try:
                retry_transient(lambda: super(HubUploadMixin, self).init_hf_repo(*args, **kwargs))
            except Exception as error:
                if not is_hub_error(error):
                    raise
                raise UploadError(
                    f"{self._repo} could not be created or reached on the Hub. {describe_error(error)} To train "
                    f"without uploads, leave `push_to_hub` out; {self.args.output_dir} can be uploaded at any time:\n"
                    f"    {self._push_command()}"
                ) from error
        # Trainer sets it on the main rank only. A rank without it would create the repository again when it pushes,
        # without the others.
        self.hub_model_id = self._repo

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Trainer's `push_to_hub`. An upload that failed is retried if the failure may be transient.

        Raises:
            UploadError: what failed, and the command to try again; the model is in `output_dir`. Only the main rank
                uploads, and raises.
        """
        if self.hub_model_id is None:
            # A failure to create the repository must not cost the model.
            self.save_model(_internal_call=True)
        if private is not None:
            kwargs["private"] = private
        try:
            result: Any = super().push_to_hub(
                commit_message=commit_message, blocking=blocking, token=token, revision=revision, **kwargs
            )
        except Exception as error:
            if isinstance(error, UploadError) or not is_hub_error(error):
                raise
            if not is_transient(error):
                command = self._push_command(private, revision)
                raise upload_error(error, str(self.args.output_dir), self._repo, command) from error
            logger.warning("%s Trying again.", describe_error(error))
            # All files are written by now.
            return push(
                str(self.args.output_dir),
                self._repo,
                message=commit_message,
                token=token or self.args.hub_token,
                **self._destination(private, revision),
            )
        if result is not None and not blocking:
            result.add_done_callback(_log_failure)
        return result

    @contextmanager
    def _watching_uploads(self) -> Iterator[None]:
        """Within, the failures of uploads in the background are logged, which Trainer never reads."""
        self._last_saved_checkpoint, self.is_upload_skipped = None, False
        if not self.args.push_to_hub or self.args.hub_strategy == HubStrategy.END:
            yield
            return
        watcher = UploadWatcher(self)
        self.add_callback(watcher)
        try:
            yield
        finally:
            self.remove_callback(watcher)

    def finish_pushes(self) -> None:
        """Uploads the last checkpoint if its upload was skipped or failed for a transient reason. A failure is logged
        with its remedy. To be called after training."""
        failure = self._upload_failure()
        is_missing = self.is_upload_skipped or (failure is not None and is_transient(failure))
        upload: Any = getattr(self, "_push_from_checkpoint", None)
        if is_missing and upload is None:
            failure = failure or RuntimeError("The upload was left out, because an earlier one was running.")
        elif is_missing and self._last_saved_checkpoint is not None:
            upload(self._last_saved_checkpoint)
            wait(self.background_uploads)
            failure = self._upload_failure()
        if failure is not None:
            problem = upload_error(failure, str(self.args.output_dir), self._repo, self._push_command())
            logger.error("The last checkpoint is not on the Hub. %s", problem)

    @property
    def background_uploads(self) -> list[Future]:
        """The uploads that Trainer has started last."""
        return getattr(getattr(self, "push_in_progress", None), "jobs", [])

    def _upload_failure(self) -> BaseException | None:
        """Returns the error of the first of these uploads that failed."""
        ended = [job.exception() for job in self.background_uploads if job.done() and not job.cancelled()]
        return next((error for error in ended if error is not None), None)

    @property
    def _repo(self) -> str:
        """The id of the repository on the Hub or, before it is created, the one to request."""
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def _push_command(self, private: bool | None = None, revision: str | None = None) -> str:
        return push_command(str(self.args.output_dir), self._repo, **self._destination(private, revision))

    def _destination(self, private: bool | None, revision: str | None) -> dict[str, Any]:
        """Returns the options of `push` that say where to upload, by default as in the trainer's arguments."""
        private = private if private is not None else self.args.hub_private_repo
        return {"private": private, "revision": revision or self.args.hub_revision}


def _log_failure(upload: Future) -> None:
    """Logs the error of a background upload that has ended."""
    error = None if upload.cancelled() else upload.exception()
    if error is not None:
        logger.warning("A background upload failed. %s All files are on disk.", describe_error(error))
