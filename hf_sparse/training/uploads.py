"""What a trainer uploads to the Hub: failures are told with the remedy, and cost no model and no training."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.trainer_utils import HubStrategy

from ..distributed import get_communicator
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


logger = logging.getLogger(__name__)


class UploadMixin:
    """The part of `SparseTrainerMixin` that concerns the Hub."""

    _last_save: str | None = None
    _left_out = False

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Trainer's `init_hf_repo`, tried again where the Hub was busy or out of reach. All processes call it.

        Raises:
            UploadError: with the remedy. Where `push_to_hub=True`, this is before any training.
        """
        error = None
        try:
            retry_transient(lambda: super(UploadMixin, self).init_hf_repo(*args, **kwargs))
        except Exception as problem:
            error = problem
            if is_hub_error(problem):
                error = UploadError(
                    f"{self._repo} could not be made or reached on the Hub. {describe_error(problem)} To train "
                    f"without it leave push_to_hub out; what is in {self.args.output_dir} can be uploaded at "
                    f"any time:\n    {self._push_command()}"
                )
                error.__cause__ = problem
        get_communicator().raise_together(error)
        # Trainer names it in the main process only; one without a name would ask again when it pushes, and alone.
        self.hub_model_id = self._repo

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs,
    ):
        """Trainer's `push_to_hub`. An upload that fails is tried again, unless that cannot help.

        Raises:
            UploadError: what failed, and the command to try again; the model is in `output_dir`. Of several processes
                only the main one uploads, and raises.
        """
        if self.hub_model_id is None:
            # What the Hub answers, asked for the first time, must not cost the model.
            self.save_model(_internal_call=True)
        try:
            job = super().push_to_hub(
                commit_message=commit_message, blocking=blocking, token=token, revision=revision, **kwargs
            )
        except UploadError:
            raise
        except Exception as error:
            if not is_hub_error(error):
                raise
            where = {"private": kwargs.get("private"), "revision": revision}
            if not is_transient(error):
                command = self._push_command(**where)
                raise upload_error(error, self.args.output_dir, self._repo, command) from error
            logger.warning("%s Trying again.", describe_error(error))
            # The files are all written by now.
            token = token or self.args.hub_token
            return push(
                self.args.output_dir, self._repo, message=commit_message, token=token, **self._defaults(**where)
            )
        if job is not None and not blocking:
            job.add_done_callback(_log_failure)
        return job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's, which starts uploads in the background, or none while earlier ones run, and never asks how they
        end: the Hub would be left behind without a word. Only here are they known one by one."""
        before = list(self._pushes)
        super()._push_from_checkpoint(checkpoint_folder)
        started = [job for job in self._pushes if job not in before]
        for job in started:
            job.add_done_callback(_log_failure)
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._last_save, self._left_out = checkpoint_folder, not started

    def finish_pushes(self) -> None:
        """After training: see that the Hub has the last save, and say so if it has not."""
        failure = self._failure()
        if self._left_out or (failure is not None and is_transient(failure)):
            self._push_from_checkpoint(self._last_save)
            self._finish_current_push()
            failure = self._failure()
        if failure is not None:
            directory, command = self.args.output_dir, self._push_command()
            logger.error("The last save is not on the Hub. %s", upload_error(failure, directory, self._repo, command))

    @property
    def _pushes(self) -> list:
        """The uploads in the background that were started last."""
        return getattr(getattr(self, "push_in_progress", None), "jobs", [])

    def _failure(self) -> BaseException | None:
        """Of those, the first that failed."""
        ended = [job.exception() for job in self._pushes if job.done() and not job.cancelled()]
        return next((error for error in ended if error is not None), None)

    @property
    def _repo(self) -> str:
        """The repository, by the name that the Hub gave it, or the one to ask for."""
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _push_command(self, **where) -> str:
        return push_command(self.args.output_dir, self._repo, **self._defaults(**where))

    def _defaults(self, private: bool | None = None, revision: str | None = None) -> dict:
        """Where to upload to, with the arguments of the trainer for what is left out."""
        private = private if private is not None else self.args.hub_private_repo
        return {"private": private, "revision": revision or self.args.hub_revision}


def _log_failure(job) -> None:
    """Called when an upload in the background has ended."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning(
            "An upload in the background failed. %s All files are on disk.", describe_error(job.exception())
        )
