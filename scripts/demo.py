"""Trains a small vision transformer on the digits of scikit-learn, then fine-tunes it while 80% of it is pruned.

    python scripts/demo.py [--target_sparsity 0.8] [--pattern unstructured] [--output_dir runs/demo] ...

Every option of SparseTrainingArguments is accepted. Nothing is downloaded: scikit-learn includes the digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    HfArgumentParser,
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
    return HfArgumentParser(SparseTrainingArguments).parse_args_into_dataclasses([*argv, *defaults])[0]


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.disable_tqdm:
        disable_progress_bar()
    set_seed(args.seed)
    train, test = digits()
    model = small_vit()

    dense_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_train_epochs,
        dataloader_pin_memory=False,
        learning_rate=2e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=args.disable_tqdm,
    )
    print(f"1. Train a dense vision transformer on {len(train)} images of digits")
    dense = Trainer(model, dense_args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    dense.train()
    dense_metrics = dense.evaluate()

    print("2. Fine-tune and prune it")
    trainer = SparseTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    trainer.dense_metrics = dense_metrics
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(tasks="image-classification", dataset="scikit-learn digits")

    reloaded = ViTForImageClassification.from_pretrained(args.output_dir)
    report = trainer.sparsity_callback.pruner.report()
    folder = Path(args.output_dir)
    before, after = dense_metrics["eval_accuracy"], metrics["eval_accuracy"]
    print(
        f"\naccuracy on {len(test)} test images: {before:.1%} dense, {after:.1%} with {report.sparsity:.1%} of "
        f"{report.selected:,} selected weights zero"
        f"\nsaved to {folder}: plain {type(reloaded).__name__}.from_pretrained opens it"
        f"\nmodel card: {folder / 'README.md'}"
        f"\nfigures: {folder / 'pruning_schedule.png'}, {folder / 'pruning_layers.png'}"
        "\nnext: the same with --pattern 2:4, --pattern 4x1 or --criterion magnitude; your own data with "
        "scripts/run_glue.py --help"
    )
    return {"dense": before, "sparse": after, "sparsity": report.sparsity}


if __name__ == "__main__":
    main()
