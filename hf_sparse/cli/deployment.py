"""The commands that turn a checkpoint into what is run: `shrink`, `export` and `bench`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class NumberListCommand(TyperCommand):
    """A command whose options of several numbers take them one after the other: `--batch 1 8 32`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the name of such an option before each of its numbers, as click expects it."""
        repeated = {name for param in self.params if param.multiple for name in param.opts}
        expanded: list[str] = []
        option = ""
        for arg in args:
            if option and arg.isdecimal() and expanded[-1] != option:
                expanded.append(option)
            elif not arg.isdecimal():
                option = arg if arg in repeated else ""
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


def shrink(
    model: Annotated[str, typer.Argument(help="Checkpoint with zeros: a folder or a Hub name.")],
    output_dir: Annotated[str, typer.Argument(help="Folder to write. Replaced if it exists.")],
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS",
            help="Layers to keep, as in 0,1,4,5; the others are removed, zero or not. For encoder-decoder models: "
            "--layers encoder=0,1 --layers decoder=0,1. Default: only layers that are zero are removed.",
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS",
            help="Experts to keep in every layer, as in 0,2,3, or in layer 4 alone, as in 4=0,2,3; repeat the option "
            "for several layers.",
        ),
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(min=1, help="Round reduced feed-forward widths up to a multiple of this number.")
    ] = 8,
    heterogeneous: Annotated[
        bool,
        typer.Option(
            "--heterogeneous",
            help="Give each layer a size of its own. The model then opens only after `import hf_sparse`.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed; write nothing.")] = False,
) -> None:
    """Remove the zero neurons, attention heads and layers of a checkpoint: a smaller model with the same outputs.

    The result opens with plain `from_pretrained` and has a model card. Exit codes: 0 success, 2 nothing can be
    removed, or the model is not supported.
    """
    from ..hub.shrinking import shrink_checkpoint

    shrink_checkpoint(
        model,
        output_dir,
        _numbers_to_keep(layers, "layers"),
        _numbers_to_keep(experts, "experts"),
        multiple_of,
        heterogeneous,
        dry_run,
        echo=typer.echo,
    )


def _numbers_to_keep(texts: list[str] | None, option: str) -> Any:
    """Returns the numbers in "0,1", or in ["encoder=0,1", "decoder=0"] under their names; None for no text.

    Example:
        >>> _numbers_to_keep(["0,1"], "layers"), _numbers_to_keep(["encoder=0", "decoder=0,1"], "layers")
        ([0, 1], {'encoder': [0], 'decoder': [0, 1]})
    """
    chosen: dict[str | int, list[int]] = {}
    for text in texts or ():
        name, _, numbers = text.rpartition("=")
        if not all(number.strip().isdecimal() for number in numbers.split(",")):
            raise ValueError(f'--{option} is "{text}": write numbers with commas, as in --{option} 0,1,4,5.')
        key = int(name) if name.isdecimal() else name
        if key in chosen:
            raise ValueError(f'--{option} gives "{name or text}" twice: write all numbers in one, as in 0,1,4,5.')
        chosen[key] = [int(number) for number in numbers.split(",")]
    if "" in chosen and len(chosen) > 1:
        raise ValueError(f"--{option} is {', '.join(texts or ())}: give one list, or a name for each of several.")
    return chosen[""] if "" in chosen else chosen or None


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder or a Hub name.")],
    output_dir: Annotated[str, typer.Argument(help="Folder to write. Replaced if it exists.")],
    to: Annotated[str, typer.Option(help="Target format: onnx or openvino.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision: fp32, bf16 (OpenVINO only) or fp16. Default: float32 weights; OpenVINO computes in the "
            "fastest precision of the CPU."
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize weights and activations to int8 (OpenVINO only, with nncf).")
    ] = False,
    calibration_file: Annotated[
        str | None,
        typer.Option(
            help="Calibration texts, for int8 and for comparing outputs: .txt, .json, .jsonl, .csv, .tsv or .parquet."
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the texts. Default: text, sentence, or the only text column.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration texts.")] = 100,
    length: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per text.")] = 128,
) -> None:
    """Export a checkpoint to ONNX or OpenVINO, and compare its outputs with those of the checkpoint.

    Needs `pip install "hf_sparse[export]"`. The exported model takes any batch size and text length; a causal language
    model returns the logits of the whole text, without a cache. Exit codes: 0 exported, 2 not possible.
    """
    from ..export.workflow import export_model

    agreement = export_model(
        model, output_dir, to, dtype, int8, calibration_file, text_column, samples=samples, length=length
    )
    typer.echo(f"{output_dir}: {agreement}")


def bench(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, and folders written by `export`. The first is the reference.")
    ],
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes. Default: 1 8 32.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Number of tokens per text.")] = 128,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="Runtime: torch, compile, onnx, openvino, or generate (32 tokens in torch); repeat the option for "
            "several. Default: torch, and those of onnx and openvino that are installed."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads. Default: all cores. With 1, CPU time is measured.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Approximate measuring time per batch size, in seconds.")
    ] = 20.0,
    device: Annotated[str, typer.Option(help="Device for torch: cpu or cuda.")] = "cpu",
    plot: Annotated[str | None, typer.Option(help="Write a figure of the ratios to this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the speed, file size and memory of models side by side.

    The models run in turns on random inputs. Ratios compare times that were measured next to each other.
    """
    from pathlib import Path

    from ..export.benchmark import benchmark_models
    from ..files import check_writable
    from ..reporting.plots import plot_latencies

    if plot is not None:
        check_writable(Path(plot).absolute().parent, f"`plot` {plot}")
    result = benchmark_models(models, batch or (1, 8, 32), length, runtime, threads, seconds, device)
    if plot is not None:
        plot_latencies(plot, result.latencies)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
