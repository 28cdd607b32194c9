"""Training against a teacher, as the options `distill_*` say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from ...config import PruningConfig
from ...config.distillation import SELF
from ...distributed import build_shards, raise_on_all_ranks
from ..callback import SparsityCallback
from ..resume import CheckpointError
from .distiller import Distiller
from .fit import check_fit, check_hidden_states, check_tokenizer, shifts_labels
from .logits import ItemLoss, LogitsLoss
from .loss_log import LossLog
from .state_file import DistillationState, read_state
from .teacher import TeacherError, copy_of, load_teacher


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class DistillationMixin(TrainerBase):
    """The methods of `SparseTrainerMixin` that distill."""

    sparsity_callback: SparsityCallback | None
    teacher: nn.Module | None = None
    """The teacher of the latest `train` with one, for the next."""
    _teacher_options: tuple[str | None, str | None] | None = None
    _distiller: Distiller | None = None
    _distillation_state: DistillationState | None = None
    _loss_log: LossLog
    _has_distilled = False
    """Whether the present training step has called `compute_loss` of this class."""

    @property
    def _prunes(self) -> bool:
        raise NotImplementedError

    @property
    def _distills(self) -> bool:
        config = None if self.sparsity_callback is None else self.sparsity_callback.config
        return config is not None and config.distills

    def load_teacher(self) -> nn.Module:
        """Returns the teacher that the options name, on any device. To be overridden for models that are not of
        transformers.

        Raises:
            TeacherError: it cannot be loaded, or does not fit the model.
        """
        config, student = self._distillation_config(), self._student()
        if config.distill_teacher == SELF:
            return copy_of(cast(nn.Module, self.model), config.distill_teacher_dtype)
        token = getattr(self.args, "hub_token", None)
        teacher = load_teacher(config, student, self.accelerator, token)
        check_fit(config, student, teacher)
        check_tokenizer(str(config.distill_teacher), self.processing_class, token)
        return teacher

    def _distillation_config(self) -> PruningConfig:
        return cast(PruningConfig, cast(SparsityCallback, self.sparsity_callback).config)

    def _student(self) -> nn.Module:
        """The model that is trained, without what wraps it, and without adapters."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model

    @contextmanager
    def _distilling(self, resume_from_checkpoint: str | bool | None) -> Iterator[None]:
        """Within, the loss has the terms of the teacher, if the options name one.

        Raises:
            TeacherError: the teacher cannot be loaded, or does not fit the model.
            CheckpointError: the checkpoint to resume from is of a run with another teacher, or without one.
        """
        self._distiller = self._distillation_state = None
        if self._distills:
            with raise_on_all_ranks(Exception):  # loading a model may raise any error
                self._distiller = self._prepare_distiller()
        if resume_from_checkpoint and (self._distills or self._prunes):
            with raise_on_all_ranks(CheckpointError):
                self._check_resumed_teacher(resume_from_checkpoint)
        if self._distills:
            self._loss_log = LossLog()
            self.add_callback(self._loss_log)
        try:
            yield
        finally:
            self.remove_callback(LossLog)
            self._distiller = None

    def _check_resumed_teacher(self, resume_from_checkpoint: str | bool) -> None:
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir)) or ""
        if self._distillation_state is not None and self.args.should_save:  # reads all weights of the teacher
            self._distillation_state.compare(str(checkpoint))
        elif self._distillation_state is None and read_state(str(checkpoint)) is not None:
            raise CheckpointError(
                f"{checkpoint} was saved by a run with `distill_teacher`, and this run has none. Resume with the same "
                "teacher, or start a new run from its weights."
            )

    def _save_distillation(self, directory: Path, may_be_checkpoint: bool) -> None:
        """Writes what a resumed run compares, if the folder is a checkpoint of this step. All ranks call this."""
        state = self._distillation_state
        if state is not None and may_be_checkpoint and directory.name == f"checkpoint-{self.state.global_step}":
            with raise_on_all_ranks(OSError):
                if self.args.should_save:
                    state.save(directory)

    def _prepare_distiller(self) -> Distiller:
        config, student = self._distillation_config(), self._student()
        if errors := list(self._distillation_errors(config)):
            raise TeacherError("\n".join(errors))
        options = (config.distill_teacher, config.distill_teacher_dtype)
        if self.teacher is None or self._teacher_options != options:
            self.teacher, self._teacher_options = self.load_teacher(), options
        if config.distill_hidden:
            check_hidden_states(student, self.teacher)
        self.teacher.to(self.args.device)
        problem_type = getattr(getattr(student, "config", None), "problem_type", None)
        compare = LogitsLoss(float(config.distill_temperature or 1), shifts_labels(student), problem_type)
        self._distillation_state = DistillationState(config, self.teacher)
        return Distiller(self.teacher, config, compare, list(self.label_names))

    def _distillation_errors(self, config: PruningConfig) -> Iterator[str]:
        """Yields what is wrong with the run."""
        if self.args.n_gpu > 1:
            yield (
                "`distill_teacher` needs one process for each GPU, but this process has several: start it with "
                f"torchrun --nproc_per_node {self.args.n_gpu}, or let it see one by CUDA_VISIBLE_DEVICES=0."
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if getattr(parallelism, "cp_size", 1) > 1 or getattr(parallelism, "sp_size", 1) > 1:
            yield (
                "`distill_teacher` does not support rows that are split over processes: set cp_size and sp_size to 1."
            )
        if getattr(self.args, "use_liger_kernel", False) and config.distill_alpha:
            yield (
                "`distill_alpha` compares logits, which `use_liger_kernel` does not compute: leave `use_liger_kernel` "
                "out, or set `distill_alpha=0` and `distill_hidden`."
            )
        if getattr(getattr(self.model, "config", None), "return_dict", True) is False:
            yield "`distill_teacher` needs outputs with names, but return_dict of the model's config is false: set it."
        if config.distill_teacher == SELF and self.teacher is None:
            if self.model_init is not None:
                yield (
                    f"`distill_teacher` is {SELF}, but model_init makes the model anew when training starts: give "
                    "model in place of model_init, or the folder of the teacher."
                )
            shards, _ = build_shards(dict(cast(nn.Module, self.model).named_parameters()))
            if any(shard.is_split for shard in shards.values()):
                yield (
                    f"`distill_teacher` is {SELF}, but the weights of the model are split over processes from the "
                    "start: save them, and give the folder as `distill_teacher`. It is loaded whole on every process."
                )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's `training_step`, which checks that a subclass that computes a loss of its own distills too."""
        self._has_distilled = False
        loss = super().training_step(*args, **kwargs)
        if self._distiller is not None and not self._has_distilled:
            raise RuntimeError(
                f"`distill_teacher` is set, but compute_loss of {type(self).__name__} does not call that of its base "
                "class, which adds the terms of the teacher: call super().compute_loss, or leave `distill_teacher` "
                "out."
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Trainer's `compute_loss`. In training with a teacher its loss is one of up to three terms:
        (1 - distill_alpha) * task + distill_alpha * logits + distill_hidden * hidden states."""
        distiller = self._distiller
        if distiller is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        given = dict(inputs)  # label smoothing takes the labels out of the inputs
        with self.accelerator.autocast():
            teacher = distiller.run_teacher(given)
        if distiller.hidden:
            inputs = {**inputs, "output_hidden_states": True}
        task, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        loss = self._add_terms(distiller, task, outputs, teacher, given, num_items_in_batch)
        self._has_distilled = True
        return (loss, outputs) if return_outputs else loss

    def _add_terms(
        self,
        distiller: Distiller,
        task: Tensor,
        student: Any,
        teacher: Mapping[str, Any],
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Returns the loss with the terms of the teacher, and notes each for the log."""
        if not isinstance(student, Mapping):
            raise ValueError(
                f"`distill_teacher` needs outputs with names, but compute_loss returned {type(student).__name__} as "
                "outputs: return those of the model."
            )
        parts = self.current_gradient_accumulation_steps
        is_scaled = self._is_loss_scaled(num_items_in_batch)
        terms, loss = {"loss_task": task}, (1 - distiller.alpha) * task
        if distiller.alpha:
            compared = distiller.compare_logits(student, teacher, inputs)
            terms["loss_distill"] = self._scaled(compared, num_items_in_batch) if is_scaled else compared.mean
            loss = loss + distiller.alpha * terms["loss_distill"]
        if distiller.hidden:
            compared_states = distiller.compare_states(student, teacher, inputs)
            terms["loss_hidden"] = compared_states / parts if is_scaled else compared_states
            loss = loss + distiller.hidden * terms["loss_hidden"]
        share = 1 if is_scaled else 1 / parts
        self._loss_log.add({name: term * share for name, term in terms.items()}, self.state.global_step)
        return loss

    def _is_loss_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether Trainer takes the loss of a part of a batch as a share of the whole, and does not divide it by the
        number of parts."""
        given = getattr(self, "loss_is_scaled_for_ga", None)
        if given is not None:
            return given
        counts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counts or self.compute_loss_func is not None

    def _scaled(self, loss: ItemLoss, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Returns the share of a loss in the mean over the items of the whole batch, times the number of processes
        where that is the batch of all, because the mean of their gradients is taken."""
        if num_items_in_batch is None:
            return loss.mean / self.current_gradient_accumulation_steps
        processes = 1
        if self.args.average_tokens_across_devices:
            processes = self.accelerator.num_processes // max(self.get_tp_size(), 1)
        count = torch.as_tensor(num_items_in_batch, device=loss.total.device)
        return loss.total * processes / count

    def _distillation_metrics(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Returns what to add to the logs of a training loss: the mean of each term. All ranks call this."""
        if self._distiller is None or "loss" not in logs:
            return {}
        return self._loss_log.pop(self.state.global_step, lambda sums: self.accelerator.reduce(sums, "mean"))
