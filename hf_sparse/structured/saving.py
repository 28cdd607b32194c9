"""Writes a shrunk model as a plain folder, with the tokenizer and processor files of the model it was made from."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..files import write_folder_atomically


# What tokenizers, processors, chat templates and SentenceTransformers save beside a model.
COMPANION_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.spm", "*.bpe",
    "spiece.model", "sentencepiece*.model", "normalizer.json", "chat_template*", "additional_chat_templates",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
)  # fmt: skip
_MODULES_FILE = "modules.json"


def save_shrunk(
    model: nn.Module,
    directory: str | Path,
    source: str | Path | None = None,
    write_more: Callable[[Path], object] | None = None,
) -> None:
    """Writes a model to a folder that plain `from_pretrained` opens: config, safetensors, generation config.

    The folder is complete or absent: it is written beside `directory` and then renamed, and what `directory` held
    before is removed.

    Args:
        model: what `shrink` returned.
        directory: the new folder.
        source: local folder of the model that was shrunk. Its tokenizer and processor files are copied, and those of
            a SentenceTransformer.
        write_more: called with the new folder before it is renamed, to write further files into it.

    Raises:
        FileNotFoundError: `source` is not a folder.
        ValueError: `directory` is `source`, or one is in the other.

    Example:
        >>> save_shrunk(shrink(model), "bert-small", source="bert-pruned")  # doctest: +SKIP
    """
    directory = Path(directory)
    companions: list[Path] = []
    if source is not None:
        source = Path(source)
        if not source.is_dir():
            raise FileNotFoundError(
                f"`source` is {source}, which is not a folder: name the folder of the dense model."
            )
        inner, outer = directory.resolve(), source.resolve()
        if inner == outer or outer in inner.parents or inner in outer.parents:
            raise ValueError(
                f"`directory` is {directory}, and `source` is {source}: write to a folder beside the source."
            )
        companions = sorted(find_companions(source))
    transformer: Any = model

    def write(folder: Path) -> None:
        transformer.save_pretrained(folder)
        for path in companions:
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, folder / path.name)
        if write_more is not None:
            write_more(folder)

    write_folder_atomically(directory, write)


def find_companions(source: Path) -> Iterator[Path]:
    """Yields the files and folders of a model's folder that its tokenizer, processor and pooling need."""
    for path in source.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANION_FILES):
            yield path
    if (source / _MODULES_FILE).is_file():
        for path in source.iterdir():  # the modules after the transformer: "1_Pooling"
            if path.is_dir() and f'"{path.name}"' in (source / _MODULES_FILE).read_text(encoding="utf-8"):
                yield path
