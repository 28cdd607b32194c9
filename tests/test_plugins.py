"""Plug-ins: files, modules and installed packages that register methods."""

import importlib.metadata
import sys

import pytest

from hf_sparse import PruningConfig, plugins
from hf_sparse.criteria import CRITERIA
from hf_sparse.plugins import load_installed_plugins, load_plugin, loaded_plugins


SOURCE = '''
"""A plug-in for tests."""
from dataclasses import dataclass
from hf_sparse import Criterion, register_criterion

@register_criterion("{name}")
@dataclass(frozen=True)
class Power(Criterion):
    exponent: float = 2.0
    {more}

    def score(self, weight, statistic):
        return weight.detach().float().abs() ** self.exponent
'''


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """No plug-in is loaded before a test, or remains after it."""
    monkeypatch.setattr(plugins, "_loaded", {})
    load_installed_plugins.cache_clear()
    yield
    load_installed_plugins.cache_clear()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a plug-in to a file of an importable folder. Returns its path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write_plugin(file="my_methods.py", name="power", more="", source=SOURCE):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(source.format(name=name, more=more))
        return str(path)

    yield write_plugin
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_plugin_is_loaded_once(write, kind):
    path = write()
    plugin = path if kind == "file" else "my_methods"
    load_plugin(plugin)
    registered = CRITERIA["power"]
    load_plugin(plugin)
    assert CRITERIA["power"] is registered
    assert loaded_plugins() == ["my_methods.py" if kind == "file" else "my_methods"]
    config = PruningConfig(target_sparsity=0.5, criterion="power", criterion_kwargs={"exponent": 3})
    assert config.resolve_groups()["weights"].criterion == registered(3)


def test_files_of_one_name_in_two_folders_are_two_plugins(write):
    load_plugin(write("a/methods.py", "first"))
    load_plugin(write("b/methods.py", "second"))
    assert CRITERIA["first"] is not CRITERIA["second"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"more": "def broken(:"}, "invalid syntax"),
        ({"source": "import no_such_package"}, "No module named 'no_such_package'"),
        ({"name": "magnitude"}, 'criterion "magnitude" is already registered, by hf_sparse.criteria.magnitude'),
        ({"source": 'from hf_sparse import register_criterion as r\nr("x")(int)'}, "must be a subclass of Criterion"),
        ({"source": 'from hf_sparse import register_curve as r\nr("x")(lambda t: t)'}, "is called as curve"),
        (
            {"source": 'from hf_sparse import register_criterion, Criterion\nregister_criterion("x")(Criterion)'},
            "score",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_plugin_that_cannot_be_loaded_is_named(write, kind, options, message):
    """The same again when it is loaded again; once it is corrected it is loaded."""
    path = write(**options)
    plugin = path if kind == "file" else "my_methods"
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as error:
            load_plugin(plugin)
        assert str(error.value).startswith("plug-in ") and plugin in str(error.value)
    assert loaded_plugins() == [] and "power" not in CRITERIA
    write(name="corrected_power")  # of another length: Python compiles a file of the same second and size once
    importlib.invalidate_caches()
    if kind == "file":
        load_plugin(plugin)
        assert "corrected_power" in CRITERIA


def test_missing_plugins():
    with pytest.raises(FileNotFoundError, match="plug-in no_such_methods.py: there is no such file"):
        load_plugin("no_such_methods.py")
    with pytest.raises(ValueError, match='plug-in "no_such_methods" cannot be imported: .* Give a .py file, or'):
        load_plugin("no_such_methods")


def test_an_error_in_the_code_of_a_plugin_is_not_hidden(write):
    path = write(source="1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_plugin(path)


# Installed packages


class Package:
    name = "hf-sparse-extras"


def install(monkeypatch, *modules):
    """Entry points of these modules, as of an installed package."""

    class Installed(importlib.metadata.EntryPoint):
        dist = Package

    calls = []

    def entry_points(group):
        calls.append(group)
        return [Installed(name=f"plugin{number}", value=module, group=group) for number, module in enumerate(modules)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return calls


def test_plugins_of_installed_packages_are_loaded_with_the_first_config(write, monkeypatch):
    write("first_methods.py", "first")
    write("second_methods.py", "second")
    calls = install(monkeypatch, "first_methods", "second_methods")
    assert "first" not in CRITERIA
    for criterion in ("first", "second"):
        assert PruningConfig(target_sparsity=0.5, criterion=criterion).criterion == criterion
    assert calls == ["hf_sparse.plugins"] and loaded_plugins() == ["first_methods", "second_methods"]


def test_a_broken_plugin_of_an_installed_package_is_named(write, monkeypatch):
    write("broken_methods.py", "magnitude")
    install(monkeypatch, "broken_methods")
    message = 'plug-in "broken_methods" of the package hf-sparse-extras cannot be loaded: criterion "magnitude" is'
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            PruningConfig(target_sparsity=0.5)
