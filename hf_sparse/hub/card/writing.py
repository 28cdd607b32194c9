"""Cards are rendered, and written into what others have written: a trainer, a person."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from ...files import (
    CARD_FILE,
    CONFIG_FILE,
    LAYERS_PLOT_FILE,
    README_FILE,
    REPORT_FILE,
    SCHEDULE_PLOT_FILE,
    write_atomically,
)
from ...inspection.checkpoint import StoredTensor, open_checkpoint
from ...inspection.tiles import read_tiles, tiles
from ...numerics import count_zeros
from ...reporting.report import SparsityReport
from .data import SparsityCard, read_json
from .edits import SECTION, chunks, digests, merge_metadata, merge_text, with_section
from .escaping import without_secrets
from .section import IMAGES, template_values


logger = logging.getLogger(__name__)

PUBLISHED_FILES = (CARD_FILE, CONFIG_FILE, REPORT_FILE, SCHEDULE_PLOT_FILE, LAYERS_PLOT_FILE)
"""What belongs beside a card wherever it is uploaded."""

TEMPLATE = Path(__file__).with_name("template.md")


@dataclass(frozen=True)
class Version:
    """A card as it was found somewhere, and what was written there last: by that a person's edits are told."""

    text: str
    written: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, readme: str | Path, stored: str | Path | None) -> Version | None:
        """From files; None where there is no card."""
        if not Path(readme).is_file():
            return None
        written = {}
        if stored is not None and Path(stored).is_file():
            try:
                written = read_json(stored).get("written", {})
            except ValueError as error:
                logger.warning("%s So all of %s is taken for written by hand.", error, readme)
        return cls(Path(readme).read_text(encoding="utf-8-sig"), written)

    @property
    def is_ours(self) -> bool:
        """Whether hf_sparse wrote it, or into it."""
        return bool(self.written) or SECTION in chunks(self.text)


def render_card(card: SparsityCard, images: Sequence[str] = ()) -> ModelCard:
    """A whole card, by itself.

    Args:
        card: what is known.
        images: the names of the figures that lie beside it.

    Example:
        >>> from hf_sparse import PruningConfig, SparsityReport
        >>> from hf_sparse.reporting.report import LayerReport
        >>> report = SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5)
        >>> card = render_card(SparsityCard("my-model", report, PruningConfig(pattern="2:4").to_dict()))
        >>> card.data["sparsity"]["selected"], "| a.weight | 4x4 | 2:4 | 8 | 16 | 50.00% |" in card.text
        (0.5, True)
    """
    values = template_values(card, images)
    return ModelCard.from_template(ModelCardData(**card.hub_metadata()), template_path=str(TEMPLATE), **values)


def write_card(
    directory: str | Path,
    card: SparsityCard,
    outer: str | None = None,
    edited: Sequence[Version] | None = None,
    secrets: Sequence[str | None] = (),
) -> Path:
    """Write README.md and, beside it, the files that it is made from.

    What a person wrote into an earlier card stays: all but the section between the marks and the metadata that nobody
    else has changed. One process does this, where there are several.

    Args:
        directory: where the model is saved. Figures are shown that lie there.
        card: what is known.
        outer: the text of the card that another library has just written, which the section goes into.
        edited: earlier cards, the most important last. Left out: the one in `directory`.
        secrets: what must not be in any file.

    Returns: the path of the card.
    """
    directory = Path(directory)
    if edited is None:
        found = Version.read(directory / README_FILE, directory / CARD_FILE)
        edited = [found] if found is not None else []
    images = [name for name in IMAGES if (directory / name).is_file()]
    plain = render_card(card, images)
    metadata, text, generated = card.hub_metadata(), plain.text, None
    if outer is not None:
        text = with_section(parsed(outer).text, chunks(plain.text)[SECTION])
    elif edited:
        # What stands around the section is nobody's to write anew.
        text, generated = (
            with_section(parsed(edited[-1].text).text, chunks(plain.text)[SECTION]),
            edited[-1].written.get("text", {}),
        )
    written = {"metadata": metadata, "text": digests(text) if generated is None else generated}
    for version in edited:
        theirs = parsed(version.text)
        metadata = merge_metadata(theirs.data.to_dict(), version.written.get("metadata", {}), metadata)
        if outer is not None or version is not edited[-1]:
            text = merge_text(theirs.text, version.written.get("text", {}), text)
    metadata = ModelCardData(**metadata).to_yaml(original_order=list(metadata))
    content = without_secrets(f"---\n{metadata}\n---\n{text}".rstrip("\n") + "\n", secrets)
    replace(card, written=written).save(directory, secrets)
    path = directory / README_FILE
    write_atomically(path, lambda temporary: Path(temporary).write_text(content, encoding="utf-8"))
    return path


def parsed(text: str) -> ModelCard:
    """A card that somebody wrote.

    Raises:
        ValueError: its head is no YAML.
    """
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except yaml.YAMLError as error:
        raise ValueError(f"the head of {README_FILE} is no YAML: mend it, or delete the file. {error}") from error


def has_card(directory: str | Path) -> bool:
    """Whether the files that a card is made from are there."""
    return all((Path(directory) / name).is_file() for name in (CARD_FILE, REPORT_FILE, CONFIG_FILE))


def rewrite_card(directory: str | Path, repo_id: str | None = None, token: str | None = None) -> Path:
    """Write the card of a saved model anew from the files beside it, with the zeros that its weights have now.

    Args:
        directory: where the model is saved.
        repo_id: where it is going to be uploaded: what a person has changed in the card there is taken over.
        token: to read it with.

    Raises:
        FileNotFoundError: the report or the config is missing.
        ValueError: a file is damaged.
    """
    card = SparsityCard.load(directory)
    card = replace(card, report=recount(directory, card.report), repo_id=repo_id or card.repo_id)
    here = Version.read(Path(directory) / README_FILE, Path(directory) / CARD_FILE)
    there = published(repo_id, token) if repo_id else None
    edited = [there] if there is not None and there.is_ours else []
    return write_card(directory, card, edited=[*edited, *([here] if here is not None else [])], secrets=[token])


def recount(directory: str | Path, report: SparsityReport) -> SparsityReport:
    """`report` with the zeros that the safetensors files in `directory` have, read in parts of bounded size. As it is
    where there are none, or where they name their weights otherwise.

    Raises:
        InspectionError: the files cannot be read.
    """
    if not any(Path(directory).glob("*.safetensors")):
        return report
    tensors = open_checkpoint(directory).tensors
    known = {layer.name: layer.shape for layer in report.layers}
    if other := [name for name, shape in known.items() if name not in tensors or tensors[name].shape != shape]:
        logger.warning(
            "%s does not hold %d of the weights that the report lists, such as %s: its figures are taken as they are.",
            directory,
            len(other),
            other[0],
        )
        return report
    layers = tuple(replace(layer, zeros=_zeros(tensors[layer.name])) for layer in report.layers)
    # Files may hold more than parameters, so the others count as the report says.
    others = report.parameter_zeros - report.zeros
    return replace(report, layers=layers, parameter_zeros=others + sum(layer.zeros for layer in layers))


def _zeros(tensor: StoredTensor) -> int:
    parts = read_tiles(tensor.file, tensor.name, tiles(tensor.shape))
    return sum(count_zeros(part) for _, part in parts)


def published(repo_id: str, token: str | None = None, revision: str | None = None) -> Version | None:
    """The card that the Hub has, edited there perhaps; None where it has none, or cannot be reached."""
    try:
        readme = hf_hub_download(repo_id, README_FILE, token=token, revision=revision)
    except (OSError, EntryNotFoundError, HTTPError) as error:
        logger.info("the card of %s was not read: %s", repo_id, error)
        return None
    try:
        stored = hf_hub_download(repo_id, CARD_FILE, token=token, revision=revision)
    except (OSError, EntryNotFoundError, HTTPError):
        stored = None
    return Version.read(readme, stored)
