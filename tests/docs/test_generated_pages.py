"""The pages that code determines; `make docs` builds the whole site, in which broken links are errors."""

import dataclasses
import importlib.util
import re

import griffe
import pytest
from helpers.pages import ROOT
from transformers import TrainingArguments

import hf_sparse
from hf_sparse import OneshotConfig, SparseTrainingArguments
from hf_sparse.cli.catalogue import read_catalogue


pytest.importorskip("mkdocs")


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load("_generate")


def test_every_option_has_one_row_with_its_default_and_help():
    inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
    options = {
        option.name: (option, config)
        for config in (OneshotConfig, SparseTrainingArguments)
        for option in dataclasses.fields(config)
    }
    rows = dict(re.findall(r'^\| <a id="(\w+)"></a>(.+) \|$', generate.options_page(), flags=re.MULTILINE))
    assert rows.keys() == options.keys() - inherited
    for name, row in rows.items():
        option, config = options[name]
        default = config.defaults.get(name, option.default)
        assert row == f"`{name}` | `{default}` | {generate.cell(option.metadata['help'])}", name


def test_every_method_has_an_entry_with_its_file():
    text = generate.methods_page()
    for family in read_catalogue():
        own = [method for method in family.methods if method.module.startswith("hf_sparse.")]
        assert own and text.count(f"\n### {family.name}: ") == len(own)
    files = re.findall(r"File: \[`(.+?)`\]", text)
    assert len(files) > 40 and all((ROOT / file).is_file() for file in files)


def test_every_command_has_a_row_for_each_option():
    sections = re.split(r"^## hf-sparse ", generate.commands_page(), flags=re.MULTILINE)[1:]
    rows = {text.split()[0]: re.findall(r"^\| `(\S+?)`", text, flags=re.MULTILINE) for text in sections}
    assert all(rows.values())
    names = [option.name for option in dataclasses.fields(OneshotConfig)]
    assert {f"--{name.replace('_', '-')}" for name in names} < set(rows["prune"])
    assert (
        "| `--samples` | Number of calibration samples (blocks or rows), drawn from the whole data. Default: 128. |"
        in ("\n".join(sections))
    )


def test_every_public_name_is_on_one_page():
    text = "\n".join(generate.api_pages().values())
    names = re.findall(r"^::: hf_sparse\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(names) == sorted(hf_sparse.__all__)


def test_a_public_name_without_docstring_is_an_error(monkeypatch):
    monkeypatch.setattr(hf_sparse, "shrink", lambda model: None)
    with pytest.raises(generate.PluginError, match="the public name hf_sparse.shrink has no docstring"):
        generate.api_pages()


def test_links_to_the_site_become_links_that_the_build_checks():
    site = "https://example.org/site/"
    text = f"[a]({site}howto/x/) [b]({site}faq/#why) [c]({site}) ![d]({generate.RAW}model_cards/a.png) [e](https://b.org/)"
    expected = "[a](howto/x.md) [b](faq.md#why) [c](index.md) ![d](model_cards/a.png) [e](https://b.org/)"
    assert generate.site_links(text, site) == expected


def test_docstrings_are_read_in_the_style_of_the_package():
    text = "Sum.\n\nArgs:\n    a, b: numbers\n        of any size.\n    c: another.\n\nReturns:\n    Their sum.\n"
    expected = (
        "Sum.\n\nArgs:\n    a: numbers\n        of any size.\n    b: numbers\n        of any size.\n    c: another.\n"
    )
    assert load("_docstrings").separate_names(text) == f"{expected}\nReturns:\n    Their sum."
    found = griffe.Docstring(expected, parser="google").parsed
    assert [each.name for section in found if section.kind.value == "parameters" for each in section.value] == [
        "a",
        "b",
        "c",
    ]
