"""Trains a small vision transformer on the digits of scikit-learn, then fine-tunes it while 80% of it is pruned, and,
to compare with, for as long without pruning.

    python scripts/demo.py [--target_sparsity 0.8] [--pattern unstructured] [--output_dir runs/demo] ...

Every option of SparseTrainingArguments is accepted. Nothing is downloaded: scikit-learn includes the digits.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from _program import parse_args, run_program
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from hf_sparse import SparseTrainer, SparseTrainingArguments


DEFAULTS = {
    "--target_sparsity": "0.8",
    "--output_dir": "runs/demo",
    "--num_train_epochs": "20",
    "--learning_rate": "2e-3",
    "--per_device_train_batch_size": "64",
    "--per_device_eval_batch_size": "256",
    "--logging_steps": "50",
    "--save_strategy": "no",
    "--report_to": "none",
    "--dataloader_pin_memory": "False",
    "--disable_tqdm": str(not sys.stderr.isatty()),  # in a file each update would be a line
}


def digits() -> tuple[list[dict], list[dict]]:
    """Returns training and test examples from 1,797 grey images of 8x8 pixels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    examples = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    return train_test_split(examples, test_size=0.2, random_state=0, stratify=labels)


def small_vit() -> ViTForImageClassification:
    """Returns a model of about 140,000 parameters, of which 131,072 are in the matrices of its four blocks."""
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**shape, **sizes, **dropout))


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def parse(argv: list[str]) -> SparseTrainingArguments:
    given = {argument.split("=")[0].replace("-", "_").replace("__", "--", 1) for argument in argv}
    defaults = [part for name, value in DEFAULTS.items() if name not in given for part in (name, value)]
    if "--pattern" in given and "--target_sparsity" not in given:
        defaults = [part for part in defaults if part not in ("--target_sparsity", DEFAULTS["--target_sparsity"])]
    return parse_args((SparseTrainingArguments,), [*argv, *defaults])[0]


def dense_arguments(args: SparseTrainingArguments, **changes) -> TrainingArguments:
    """Returns the training arguments without the options of pruning."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainingArguments) if field.init}
    return TrainingArguments(**values | changes)


def file_sizes(folder: Path) -> tuple[int, int]:
    """Returns the bytes of the weight file, and those of it compressed."""
    data = (folder / "model.safetensors").read_bytes()
    return len(data), len(zlib.compress(data, 9))


def relative_time(model: torch.nn.Module, reference: torch.nn.Module, examples: list[dict], rounds: int = 20) -> float:
    """Returns the time of a forward of all examples, divided by that of the reference: the median over rounds."""
    batch = torch.stack([example["pixel_values"] for example in examples])
    ratios = []
    for _ in range(rounds):
        seconds = []
        for each in (model.cpu().eval(), reference.cpu().eval()):
            start = time.perf_counter()
            with torch.no_grad():
                each(batch)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def describe_size(folder: Path, dense: Path, speed: float) -> str:
    """Returns the lines on size and speed."""
    (before, packed_before), (after, packed) = file_sizes(dense), file_sizes(folder)
    text = (
        f"size: {before / 1e3:.0f} kB dense, {after / 1e3:.0f} kB now; compressed {packed_before / 1e3:.0f} kB and "
        f"{packed / 1e3:.0f} kB\nspeed: {speed:.2f} times that of the dense model"
    )
    if after >= 0.99 * before:
        text += (
            ". Zeros alone make no model smaller or faster: see what does with "
            "--pattern neuron --target_sparsity 0.5 --shrink"
        )
    return text


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.disable_tqdm:
        disable_progress_bar()
    folder = Path(args.output_dir)
    set_seed(args.seed)
    train, test = digits()
    data = {"train_dataset": train, "eval_dataset": test, "compute_metrics": accuracy}
    model = small_vit()

    print(f"1. Train a dense vision transformer on {len(train)} images of digits")
    first_args = dense_arguments(args, learning_rate=2e-3, logging_strategy="no")
    first = Trainer(model, first_args, **data)
    first.train()
    first_accuracy = first.evaluate()["eval_accuracy"]

    print("2. Fine-tune it without pruning, to compare with")
    dense_folder = folder.with_name(f"{folder.name}-dense")
    dense_args = dense_arguments(args, output_dir=str(dense_folder), logging_strategy="no")
    dense = Trainer(copy.deepcopy(model), dense_args, **data)
    dense.train()
    dense_metrics = dense.evaluate()
    dense.save_model()

    print("3. Fine-tune it for as long, and prune it meanwhile")
    trainer = SparseTrainer(model, args, **data)
    trainer.dense_metrics = dense_metrics
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(tasks="image-classification", dataset="scikit-learn digits")

    reloaded = ViTForImageClassification.from_pretrained(folder)
    report = trainer.sparsity_callback.pruner.report()
    before, after = dense_metrics["eval_accuracy"], metrics["eval_accuracy"]
    speed = 1 / relative_time(reloaded, dense.model, test)
    print(
        f"\naccuracy on {len(test)} test images: {first_accuracy:.1%} after {args.num_train_epochs:g} dense epochs; "
        f"after {args.num_train_epochs:g} more {before:.1%} dense, {after:.1%} with {report.sparsity:.1%} of "
        f"{report.selected:,} selected weights zero"
        f"\n{describe_size(folder, dense_folder, speed)}"
        f"\nsaved to {folder}: plain {type(reloaded).__name__}.from_pretrained opens it"
        f"\nmodel card: {folder / 'README.md'}"
        f"\nfigures: {folder / 'pruning_schedule.png'}, {folder / 'pruning_layers.png'}"
        "\nnext: the same with --pattern 2:4, --pattern 4x1 or --criterion magnitude; your own data with "
        "scripts/run_glue.py --help"
    )
    return {"dense": before, "sparse": after, "sparsity": report.sparsity, "speed": speed}


if __name__ == "__main__":
    run_program(main, (SparseTrainingArguments,))
