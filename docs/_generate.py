"""Pages of the site that code and other files determine: home, options, methods, commands, API, changelog, design."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from transformers import TrainingArguments

import hf_sparse
from hf_sparse.cli.app import app
from hf_sparse.cli.catalogue import MethodEntry, read_catalogue
from hf_sparse.cli.prune import load_prune_command, prune
from hf_sparse.config import OneshotConfig, PruningConfig
from hf_sparse.config.base import PruningOptions
from hf_sparse.config.distillation import DistillationOptions
from hf_sparse.config.penalty import PenaltyOptions
from hf_sparse.config.schedule import ScheduleOptions


ROOT = Path(__file__).resolve().parent.parent
RAW = "https://raw.githubusercontent.com/hf-sparse/hf_sparse/main/"
BLOB = "https://github.com/hf-sparse/hf_sparse/blob/main/"

# Each page of the API: file, title, and the folders of the package whose public names it describes.
API_PAGES = (
    ("training", "Training", ("training", "engine")),
    ("config", "Configs", ("config",)),
    ("oneshot", "Pruning without training", ("oneshot", "calibration", "evaluation")),
    ("structured", "Smaller models", ("structured", "hub")),
    ("export", "Export and speed", ("export",)),
    ("reports", "Reports and inspection", ("reporting", "inspection")),
    ("peft", "PEFT", ("integrations",)),
    (
        "extend",
        "Methods of your own",
        "plugins requires criteria patterns allocations solvers schedulers algorithms penalties".split(),
    ),
)
# Public names that are imported from the modules of a folder, since they need an extra.
MORE_NAMES = {
    "export": ("workflow.export_model", "benchmark.benchmark_models", "benchmark.BenchmarkResult"),
    "inspection": ("CheckpointContents", "CheckpointComparison"),
}
OPTION_TABLES = (
    ("What to prune", "In training and in one shot.", PruningOptions),
    ("When to prune", "In training only.", ScheduleOptions),
    ("Distillation", "In training only: see [Distillation](../howto/distillation.md).", DistillationOptions),
    ("Penalties", "In training only: see [Penalties](../howto/algorithms.md#penalties).", PenaltyOptions),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and the figures that they show."""
    pages = (
        {
            "index.md": site_links((ROOT / "README.md").read_text(encoding="utf-8"), str(config.site_url)),
            "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
            "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
            "reference/options.md": options_page(),
            "reference/methods.md": methods_page(),
            "reference/commands.md": commands_page(),
        }
        | api_pages()
        | notebook_pages()
    )
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for figure in sorted((ROOT / "model_cards").rglob("*.png")):
        name = figure.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(figure)))
    return files


def site_links(text: str, site_url: str) -> str:
    """Returns a page whose absolute links to the site and to figures are relative, so that the build checks them."""
    text = text.replace(RAW, "")
    return re.sub(
        rf"\]\({re.escape(site_url)}([^)#]*?)/?(#[^)]*)?\)",
        lambda link: f"]({link[1] or 'index'}.md{link[2] or ''})",
        text,
    )


def cell(text: str) -> str:
    """Returns text that is one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(value: object) -> str:
    return f"`{value}`".replace("|", "\\|")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Notebooks


def notebook_pages() -> dict[str, str]:
    """Returns the pages of the notebooks, with links to the notebooks themselves."""
    return {
        f"notebooks/{path.stem}.md": notebook_page(path.name, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    }


def notebook_page(name: str, notebook: dict[str, Any]) -> str:
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        parts.append(f"```python\n{text}\n```" if is_code else text.replace(".ipynb)", ".md)"))
    parts.insert(1, f"[Download this page as a notebook]({name}){{ download }}")
    return "\n\n".join(parts) + "\n"


# Options


def options_page() -> str:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    shared = {field.name for field in dataclasses.fields(PruningConfig)}
    training = [
        field
        for field in dataclasses.fields(hf_sparse.SparseTrainingArguments)
        if field.name not in inherited | shared
    ]
    oneshot = [field for field in dataclasses.fields(OneshotConfig) if field.name not in shared]
    parts = [
        "# Options",
        "Every option can be given in Python, on the command line and in a recipe file. Options of methods "
        "(`criterion_kwargs` and others) are described with [the methods](methods.md).",
    ]
    for title, text, options in OPTION_TABLES:
        parts += [f"## {title}", text, option_table(dataclasses.fields(options), PruningConfig.defaults)]
    parts += [
        "## What to train and to save",
        "Of `SparseTrainingArguments` only, which has the options above and those of `TrainingArguments`, with their "
        "defaults.",
        option_table(training, {}),
        "## Without training",
        "Of `OneshotConfig`, `hf-sparse prune` and `run_oneshot.py`, beside [what to prune](#what-to-prune).",
        option_table(oneshot, OneshotConfig.defaults),
    ]
    return "\n\n".join(parts) + "\n"


def option_table(options: Iterable[dataclasses.Field[Any]], defaults: Any) -> str:
    rows = []
    for option in options:
        if "help" not in option.metadata:
            raise PluginError(f"the option {option.name} has no help text")
        default = defaults.get(option.name, option.default)
        rows.append((f'<a id="{option.name}"></a>{code(option.name)}', code(default), cell(option.metadata["help"])))
    return table(("option", "default", "meaning"), rows)


# Methods


def methods_page() -> str:
    parts = [
        "# Methods and papers",
        "All methods that an option selects by name, as `hf-sparse methods` lists them, with the formula, the options "
        "(`criterion_kwargs` for `criterion`, and so on), the paper, and the file that implements it.",
    ]
    for family in read_catalogue():
        parts += [f"## {family.name}", family.summary]
        if family.options:
            parts.append(
                table(("option", "meaning"), ((code(each), cell(each.description)) for each in family.options))
            )
        for method in family.methods:
            if not method.module.startswith("hf_sparse."):  # of a plug-in that is installed here
                continue
            parts += [
                f"### {family.name}: {method.name} {{ #{family.name}-{anchor(method.name)} }}",
                method_text(method),
            ]
    return "\n\n".join(parts) + "\n"


def anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def method_text(method: MethodEntry) -> str:
    path = method.module.replace(".", "/") + ".py"
    parts = [cell(method.summary)]
    if method.options:
        rows = ((code(each), cell(each.description)) for each in method.options)
        parts.append(table(("option", "meaning"), rows))
    paper = f"Paper: {cell(method.paper)}" if method.paper else ""
    parts.append(f"{paper} File: [`{path}`]({BLOB}{path})".strip())
    return "\n\n".join(parts)


# Commands


def commands_page() -> str:
    group = typer.main.get_command(app)
    context = click.Context(group, info_name="hf-sparse")
    parts = [
        "# Commands",
        "`hf-sparse COMMAND --help` prints the same. The options of the example scripts are "
        "[Options](options.md) and those of `TrainingArguments`.",
    ]
    for name in group.list_commands(context):
        command = load_prune_command() if name == prune.__name__ else group.get_command(context, name)
        parts.append(command_text(name, command))
    return "\n\n".join(parts) + "\n"


def command_text(name: str, command: Any) -> str:
    usage, rows = f"hf-sparse {name} [OPTIONS]", []
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [(parameter.metavar or parameter.name).upper() + ("..." if parameter.nargs < 0 else "")]
            usage += f" {names[0]}" if parameter.required else f" [{names[0]}]"
        default = parameter.default if isinstance(parameter.default, (str, int, float)) else False
        meaning = f"{parameter.help or ''} {'' if default is False else f'Default: {default}.'}"
        rows.append((" ".join(map(code, names)), cell(meaning)))
    text = inspect.cleandoc(command.help or "").replace("\b", "")
    return "\n\n".join([f"## hf-sparse {name}", f"```text\n{usage}\n```", text, table(("", "meaning"), rows)])


# API


def public_names() -> Iterator[tuple[str, str]]:
    """Yields each public name with the module that __init__.pyi imports it from."""
    tree = ast.parse((ROOT / "hf_sparse" / "__init__.pyi").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            yield from ((name.name, str(statement.module)) for name in statement.names)


def api_pages() -> dict[str, str]:
    by_room: dict[str, list[str]] = {}
    for name, module in public_names():
        if not inspect.getdoc(getattr(hf_sparse, name)):
            raise PluginError(f"the public name hf_sparse.{name} has no docstring")
        by_room.setdefault(module.split(".")[0], []).append(f"hf_sparse.{name}")
    for room, names in MORE_NAMES.items():
        by_room.setdefault(room, []).extend(f"hf_sparse.{room}.{name}" for name in names)
    pages = {}
    for file, title, rooms in API_PAGES:
        entries = [api_entry(name) for room in rooms for name in sorted(by_room.pop(room, ()), key=api_order)]
        pages[f"reference/api/{file}.md"] = "\n\n".join([f"# {title}", *entries]) + "\n"
    if by_room:
        raise PluginError(f"no page of the API has the public names of {', '.join(by_room)}: see API_PAGES")
    return pages


def api_order(name: str) -> tuple[bool, bool, str]:
    """Sorts the names of a page: variants and errors come last."""
    return name.endswith("Error"), "Seq2Seq" in name, name


def api_entry(name: str) -> str:
    """Returns the entry of a public name; a config has more options than fit into a signature."""
    member = getattr(hf_sparse, name.split(".")[1], None)
    if inspect.isclass(member) and issubclass(member, PruningOptions):
        return f"::: {name}\n    options:\n      show_signature: false\n\nIts options: [Options](../options.md)."
    return f"::: {name}"
