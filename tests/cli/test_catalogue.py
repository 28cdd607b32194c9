"""The catalogue of methods: complete, documented, and printed by `hf-sparse methods`."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

import hf_sparse
from hf_sparse.cli.app import app
from hf_sparse.cli.catalogue import FAMILIES, read_catalogue


PACKAGE = Path(hf_sparse.__file__).parent
METHODS = {
    f"{family.name} {method.name}": method
    for family in read_catalogue()
    for method in family.methods
    if method.module.startswith("hf_sparse.")
}


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def run_program(*words):
        with pytest.raises(SystemExit) as done:
            app(["methods", *words], prog_name="hf-sparse")
        return done.value.code, *capsys.readouterr()

    return run_program


def test_every_registry_of_the_package_is_in_the_catalogue():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for name in re.findall(r"^([A-Z]+)\b.* = \w*Registry\(", path.read_text(), flags=re.MULTILINE):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            registry = getattr(importlib.import_module(".".join(parts)), name)
            found[registry.family] = registry
    assert found == {registry.family: registry for registry, _ in FAMILIES} and len(found) > 6


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_does_and_where_it_comes_from(name):
    """Loaded plug-ins are not checked."""
    method = METHODS[name]
    assert method.summary.endswith("."), "the first paragraph of the docstring must be a sentence"
    assert len(method.summary) < 250, "the first paragraph of the docstring is too long for a list"
    assert method.paper.endswith("."), 'the docstring needs a line "Reference: Author et al., "Title", year."'
    missing = [option.name for option in method.options if not option.description]
    assert not missing, f"the docstring must say under Args: what {missing} are"


def test_what_is_read_from_a_docstring():
    (allocations,) = read_catalogue("allocation")
    owl = next(method for method in allocations.methods if method.name == "owl")
    assert owl.summary.startswith("Prunes blocks with many outliers, scores far above the mean, less, within")
    assert [(option.name, option.type, option.default) for option in owl.options] == [
        ("m", "float", 5.0),
        ("lambda_", "float", 0.08),
    ]
    assert owl.options[1].description == "λ, the largest distance of a layer's sparsity from the target."
    assert owl.paper.startswith("Yin et al.") and owl.paper.endswith('Sparsity", 2023, section 3.')


def test_all_methods_are_printed(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    for name in METHODS:
        family, method = name.split()
        assert re.search(rf"^{family}\s*$", out, re.MULTILINE) and re.search(rf"^  {method} ", out, re.MULTILINE), name
    assert max(map(cell_len, out.splitlines())) <= 100
    assert "Random" not in out and "uniform in [0, 1)" in out  # not taken for markup


def test_json_has_everything(run):
    code, out, _ = run("--json")
    families = json.loads(out)["families"]
    assert code == 0 and [family["name"] for family in families] == [
        *(registry.family for registry, _ in FAMILIES),
        "loss",
    ]
    methods = {method["name"]: method for family in families for method in family["methods"]}
    assert methods["4x1"]["options"][0] == {
        "name": "height",
        "type": "int",
        "default": None,
        "required": True,
        "description": "outputs, at least 1.",
    }


PLUGIN = """
from dataclasses import dataclass, field
from hf_sparse import Criterion, register_criterion

@register_criterion("plain_power")
@dataclass(frozen=True)
class Power(Criterion):
    exponent: float = 2.0
    shares: tuple = field(default_factory=lambda: (0.5,))

    def score(self, weight, statistic):
        return weight.detach().float().abs() ** self.exponent
"""


def test_methods_of_plugins_are_listed_too(run, tmp_path):
    (tmp_path / "powers.py").write_text(PLUGIN)
    code, out, _ = run("--family", "criterion", "--plugin", str(tmp_path / "powers.py"))
    assert code == 0 and "magnitude" in out and "erdos_renyi" not in out
    assert re.search(r"plain_power +exponent=2.0, shares=\(0.5,\)", out)
    _, text, _ = run("--family", "criterion", "--json")
    (family,) = json.loads(text)["families"]
    own = next(method for method in family["methods"] if method["name"] == "plain_power")
    assert (own["summary"], own["paper"], own["options"][1]["default"]) == ("", "", [0.5])


def test_an_unknown_family_is_refused(run):
    code, out, err = run("--family", "criteria")
    assert (code, out) == (2, "")
    assert re.fullmatch(
        'hf-sparse: --family is "criteria": known are .*, tune, loss. Did you mean "criterion"[?]\n', err
    )


def test_the_list_needs_no_transformers():
    code = (
        "import sys; from hf_sparse.cli import main; sys.argv[1:] = ['methods', '--family', 'tune', '--json']\n"
        "try: main()\nfinally: print(sorted({'transformers', 'datasets', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "masked_lora" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr
