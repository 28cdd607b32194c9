"""Renders cards and writes them to files, with the edits that a person made to earlier ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from ...config.recipe import parse_yaml
from ...files import (
    CARD_FILE,
    CONFIG_FILE,
    LAYERS_PLOT_FILE,
    README_FILE,
    REPORT_FILE,
    SCHEDULE_PLOT_FILE,
    read_json,
    write_atomically,
)
from ...inspection.checkpoint import StoredTensor, open_checkpoint
from ...inspection.tiles import read_tiles, tile_regions
from ...numerics import count_zeros
from ...reporting.report import SparsityReport
from ..card_metadata import CardMetadata
from .data import SparsityCard
from .escaping import remove_secrets
from .latency import read_latency
from .merge import SECTION, chunk_digests, merge_metadata, merge_text, replace_section, split_chunks
from .section import HETEROGENEOUS_NOTICE, IMAGES, introduction, name_base_model, template_values


logger = logging.getLogger(__name__)

PUBLISHED_FILES = (CARD_FILE, CONFIG_FILE, REPORT_FILE, SCHEDULE_PLOT_FILE, LAYERS_PLOT_FILE)
"""Files that are uploaded beside a card."""


@dataclass(frozen=True)
class CardVersion:
    """An existing card, perhaps edited by a person.

    Args:
        text: content of README.md.
        base: the card as it was generated last: its metadata under "metadata" and its `chunk_digests` under "text".
            Empty if unknown; then the whole text counts as edited.
    """

    text: str
    base: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, readme: str | Path, card_file: str | Path | None) -> CardVersion | None:
        """Reads a card from README.md and pruning_card.json; None if there is no README.md."""
        if not Path(readme).is_file():
            return None
        base = {}
        if card_file is not None and Path(card_file).is_file():
            try:
                base = read_json(card_file).get("written", {})
            except ValueError as error:
                logger.warning("%s The whole text of %s is kept as hand-written.", error, readme)
        try:
            text = Path(readme).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{readme} is not UTF-8 text: correct it, or delete the file. {error}") from error
        return cls(
            text, base if isinstance(base, dict) and all(isinstance(part, dict) for part in base.values()) else {}
        )

    @property
    def is_generated(self) -> bool:
        """Whether hf_sparse generated the card or a section of it."""
        return bool(self.base) or SECTION in split_chunks(self.text)


def render_card(card: SparsityCard, images: Sequence[str] = ()) -> ModelCard:
    """Renders a card. `images` are the file names of the plots beside it.

    Example:
        >>> from hf_sparse import PruningConfig, SparsityReport
        >>> from hf_sparse.reporting.report import LayerReport
        >>> report = SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5)
        >>> card = render_card(SparsityCard("my-model", report, PruningConfig(pattern="2:4").to_dict()))
        >>> card.data["sparsity"]["selected"], "| a.weight | 4x4 | 2:4 | 8 | 16 | 50.00% |" in card.text
        (0.5, True)
    """
    metadata, template = ModelCardData(**card.hub_metadata()), Path(__file__).with_name("template.md")
    return ModelCard.from_template(metadata, template_path=str(template), **template_values(card, images))


def write_card(
    directory: str | Path,
    card: SparsityCard,
    enclosing_card: str | None = None,
    existing: Sequence[CardVersion] | None = None,
    secrets: Sequence[str | None] = (),
    given: CardMetadata | None = None,
) -> Path:
    """Writes README.md and, beside it, the files that it is generated from.

    Edits in existing cards are kept: all text outside of the hf_sparse section, and metadata that differs from what
    was generated last. Call this on one rank only.

    Args:
        directory: folder of the saved model. Plots in it are shown in the card.
        card: the contents of the card.
        enclosing_card: text of a card that another library has just generated, to insert the hf_sparse section into.
        existing: cards whose edits are kept; of conflicting edits those of the last card win. None for the card in
            `directory`.
        secrets: strings that are removed from all files.
        given: metadata that the user has just given, which win over edits.

    Returns: the path of README.md.
    """
    directory, old_card = Path(directory), card
    given_values = given.to_dict() if given is not None else {}
    card = replace(card, given=card.given | given_values)
    if existing is None:
        local = CardVersion.read(directory / README_FILE, directory / CARD_FILE)
        existing = [local] if local is not None else []
    rendered = render_card(card, [name for name in IMAGES if (directory / name).is_file()])
    section = split_chunks(rendered.text)[SECTION]
    metadata, to_merge, digests = card.hub_metadata(), existing, None
    if enclosing_card is not None:
        text = replace_section(parse_card(enclosing_card).text, section)
        if card.is_heterogeneous:
            text = _TITLE.sub(lambda title: f"{title[0]}\n{HETEROGENEOUS_NOTICE}\n", text, count=1)
    elif existing:
        # The text around the section is not generated again: it is that of the existing card.
        *to_merge, last = existing
        text, digests = replace_section(parse_card(last.text).text, section), last.base.get("text", {})
        if "base_model" in given_values:
            text, digests = _rename_base_model(text, digests, old_card, card)
    else:
        text = rendered.text
    base = {"metadata": metadata, "text": chunk_digests(text) if digests is None else digests}
    for version in existing:
        metadata = merge_metadata(parse_card(version.text).data.to_dict(), version.base.get("metadata", {}), metadata)
    for version in to_merge:
        text = merge_text(parse_card(version.text).text, version.base.get("text", {}), text)
    metadata |= given_values
    header = ModelCardData(**metadata).to_yaml(original_order=list(metadata))
    content = remove_secrets(f"---\n{header}\n---\n{text}".rstrip("\n") + "\n", secrets)
    replace(card, written=base).save(directory, secrets)
    path = directory / README_FILE
    write_atomically(path, lambda temporary: Path(temporary).write_text(content, encoding="utf-8"))
    return path


def _rename_base_model(
    text: str, digests: dict[str, str], old: SparsityCard, new: SparsityCard
) -> tuple[str, dict[str, str]]:
    """Replaces the name of the base model in the text around the section, and the digests of the chunks that it
    changes, so that they do not count as edited."""
    renamed = text.replace(introduction(old), introduction(new))
    if old_name := name_base_model(old):
        renamed = renamed.replace(old_name, str(name_base_model(new)))
    before, after = chunk_digests(text), chunk_digests(renamed)
    changed = {
        key: after[key] for key in after if before.get(key) != after[key] and before.get(key) == digests.get(key)
    }
    return renamed, digests | changed


def parse_card(text: str) -> ModelCard:
    """Parses the text of a README.md. Raises a ValueError if its metadata is not valid YAML, or no metadata."""
    try:
        if block := _METADATA_BLOCK.match(text):
            parse_yaml(block[1])  # ModelCard expands aliases without a bound
        return ModelCard(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"the metadata of {README_FILE} is not valid YAML: correct it, or delete the file. {error}"
        ) from error


_TITLE = re.compile(r"^# .*\n", flags=re.MULTILINE)
_METADATA_BLOCK = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r\n|\n|$)", flags=re.DOTALL)


def has_card_files(directory: str | Path) -> bool:
    """Whether a folder has all files that a card is generated from."""
    return all((Path(directory) / name).is_file() for name in (CARD_FILE, REPORT_FILE, CONFIG_FILE))


def rewrite_card(
    directory: str | Path,
    repo_id: str | None = None,
    token: str | None = None,
    benchmark: str | Path | None = None,
    given: CardMetadata | None = None,
) -> Path:
    """Generates the card of a saved model again from the files beside it, with the zeros that its weights have now.

    Args:
        directory: folder of the saved model.
        repo_id: repository that it will be uploaded to; edits in the card there are kept.
        token: access token for the repository.
        benchmark: output of `hf-sparse bench --json` with this folder, whose times the card shows from now on.
        given: metadata of the card, which win over edits.

    Returns: the path of README.md.

    Raises:
        FileNotFoundError: the report, the config or the benchmark is missing.
        ValueError: a file is damaged.
    """
    card = SparsityCard.load(directory)
    card = replace(card, report=recount_zeros(directory, card.report), repo_id=repo_id or card.repo_id)
    if benchmark is not None:
        card = replace(card, latency=read_latency(benchmark, directory))
    local = CardVersion.read(Path(directory) / README_FILE, Path(directory) / CARD_FILE)
    remote = download_card(repo_id, token) if repo_id else None
    versions = (remote if remote is not None and remote.is_generated else None, local)
    existing = [version for version in versions if version is not None]
    return write_card(directory, card, existing=existing, secrets=[token], given=given)


def recount_zeros(directory: str | Path, report: SparsityReport) -> SparsityReport:
    """Returns the report with the zeros counted in the safetensors files in `directory`.

    The files are read in parts of bounded size. The report is returned unchanged if there are no such files or if they
    lack a weight of the report.

    Raises:
        InspectionError: the files cannot be read.
    """
    if not any(Path(directory).glob("*.safetensors")):
        return report
    tensors = open_checkpoint(directory).tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    missing = [layer.name for layer in report.layers if shapes.get(layer.name) != layer.shape]
    if missing:
        logger.warning(
            f"{directory} does not hold {len(missing)} of the weights in the report, such as {missing[0]}: the zeros "
            "in the report are not counted again."
        )
        return report

    def count(tensor: StoredTensor) -> int:
        return sum(count_zeros(tile) for _, tile in read_tiles(tensor.file, tensor.name, tile_regions(tensor.shape)))

    layers = tuple(replace(layer, zeros=count(tensors[layer.name])) for layer in report.layers)
    # The files may hold more than parameters, so the zeros of other parameters are those of the report.
    other_zeros = report.parameter_zeros - report.zeros
    return replace(report, layers=layers, parameter_zeros=other_zeros + sum(layer.zeros for layer in layers))


def download_card(repo_id: str, token: str | None = None, revision: str | None = None) -> CardVersion | None:
    """Returns the card of a repository on the Hub; None if there is none, or if the Hub cannot be reached."""
    try:
        readme = hf_hub_download(repo_id, README_FILE, token=token, revision=revision)
    except (OSError, EntryNotFoundError, HTTPError, RuntimeError) as error:
        # huggingface_hub 1.5 to 1.20 closes its client when a connection fails, and raises RuntimeError as it tries
        # again.
        logger.info("the card of %s was not read: %s", repo_id, error)
        return None
    try:
        card_file = hf_hub_download(repo_id, CARD_FILE, token=token, revision=revision)
    except (OSError, EntryNotFoundError, HTTPError):
        card_file = None
    return CardVersion.read(readme, card_file)
