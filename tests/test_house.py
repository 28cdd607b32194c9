"""Rules for the source: which room may import which, what is never written, what is documented."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.algorithms import ALGORITHMS
from hf_sparse.allocations import ALLOCATIONS
from hf_sparse.config.validation import SCOPES
from hf_sparse.criteria import CRITERIA
from hf_sparse.patterns import PATTERNS
from hf_sparse.penalties import PENALTIES
from hf_sparse.schedulers import CURVES, SCHEDULERS
from hf_sparse.solvers import SOLVERS


PACKAGE = Path(hf_sparse.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The rooms of the package by floor: an import leads to a lower floor. CONTRIBUTING.md has the same table.
FLOORS = [
    {
        "calibration",
        "distributed",
        "files",
        "import_hooks",
        "kernels",
        "local_paths",
        "numerics",
        "optional_packages",
        "plugins",
        "registry",
        "requires",
    },
    {"methods", "model", "patterns", "reporting", "schedulers", "statistics"},
    {"allocations", "criteria", "evaluation", "inspection", "structured"},
    {"selection"},
    {"algorithms", "penalties", "solvers"},
    {"config"},
    {"engine", "hub"},
    {"export", "integrations", "oneshot", "training"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
METHODS = {"algorithms", "allocations", "criteria", "patterns", "penalties", "schedulers", "solvers", "statistics"}
USES_TRANSFORMERS = {"calibration", "evaluation", "export", "hub", "oneshot", "training", "cli"}


def room(path):
    """The module or package right under hf_sparse that a file belongs to; None for hf_sparse/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first in ("__init__", "__main__") else first


def imports(path):
    """The absolute names of all modules that a file imports, wherever in the file."""
    package = ("hf_sparse", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def rooms_imported(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "hf_sparse" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room(path):
            yield parts[1]


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def path(request):
    return request.param


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} - {None} <= FLOOR.keys(), "add the new room to FLOORS"


def test_the_table_of_rooms_in_contributing_is_floors():
    table = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("## Rooms\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d) \| (.*) \|$", table, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(FLOORS) + 1))
    assert [{part.split("`")[1] for part in rooms.split(" · ")} for _, rooms in rows] == FLOORS


def test_imports_lead_to_lower_floors(path):
    if room(path) is not None:
        wrong = [other for other in rooms_imported(path) if FLOOR[other] >= FLOOR[room(path)]]
        assert not wrong, f"{room(path)} (floor {FLOOR[room(path)]}) imports {wrong}"


def test_there_are_at_most_nine_floors():
    assert len(FLOORS) <= 9


def test_no_import_cycle_runs_through_files():
    modules = {".".join(("hf_sparse", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    below = {name: {other for other in imports(path) if other in modules} - {name} for name, path in modules.items()}
    for name, path in modules.items():
        if path.name == "__init__.py":  # it gathers the names of its members, which may name the package in turn
            below[name] = {other for other in below[name] if not other.startswith(f"{name}.")}
    while free := [name for name, others in below.items() if not others]:
        for name in free:
            del below[name]
        for others in below.values():
            others.difference_update(free)
    assert not below, f"a cycle runs through {below}"


def test_transformers_and_ranks_are_known_only_where_they_belong(path):
    heads = {name.split(".")[0] for name in imports(path)}
    if room(path) not in {None, *USES_TRANSFORMERS}:
        assert not heads & {"transformers", "datasets", "evaluate"}
    if room(path) != "distributed":
        assert not heads & {"deepspeed", "accelerate"}
        assert not any(name.startswith("torch.distributed") for name in imports(path))
        assert "torch.distributed" not in path.read_text()
    if room(path) in METHODS:
        assert not any(name in ("torch.nn", "torch.optim") for name in imports(path))


def test_what_is_never_written(path):
    tree = ast.parse(path.read_text())
    assert not any(name.endswith(".*") for name in imports(path)), "glob import"
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "marshal", "shelve"}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: an assert is no check of input"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "torch.load"), f"line {node.lineno}: {name}"
            unsafe = name.startswith("yaml.") and not name.startswith(("yaml.safe_load", "yaml.SafeLoader."))
            assert not unsafe, f"line {node.lineno}: {name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("yaml."):
            assert node.attr not in ("Loader", "UnsafeLoader", "FullLoader"), f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (silent and caught in ("", "Exception", "BaseException")), f"line {node.lineno}: silent"


def test_no_method_is_named_outside_its_own_file(path):
    """In comparisons, subscripts and match cases. What runs methods asks for `requires`, never for a name; names of
    defaults are constants of config. Names of scopes are those of scopes."""
    registries = (ALGORITHMS, ALLOCATIONS, CRITERIA, CURVES, PATTERNS, PENALTIES, SCHEDULERS, SOLVERS)
    files = {name: inspect.getfile(registry[name]) for registry in registries for name in registry.names()}
    files = {name: file for name, file in files.items() if name not in SCOPES}
    for node in ast.walk(ast.parse(path.read_text())):
        compared: list = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            compared = [node.slice]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "create":
            compared = node.args
        parts = [part for root in compared for part in getattr(root, "elts", [root])]
        constants = [part.value for part in parts if isinstance(part, ast.Constant)]
        named = [name for name in constants if name in files and Path(files[name]) != path]
        assert not named, f"line {node.lineno}: {ast.unparse(node)} asks for the method {named[0]!r}"


def test_names_of_files():
    for path in FILES:
        assert path.stem not in ("utils", "util", "helpers", "common", "misc")
        assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, f"{path} hides a standard module"


def test_no_function_is_too_long(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 70, f"{node.name} has {length} lines"


def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name", hf_sparse.__all__)
def test_every_public_name_is_documented(name):
    """By an example, or in so few lines that none is needed."""
    text = inspect.getdoc(getattr(hf_sparse, name))
    own = getattr(hf_sparse, name).__dict__.get("__doc__") if inspect.isclass(getattr(hf_sparse, name)) else text
    assert own, f"{name} has no docstring of its own"
    assert "Example:" in text or len(text.splitlines()) <= 5


def test_the_face_is_names_only_and_complete():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)
    assert hf_sparse.__all__ == sorted(hf_sparse.__all__)
    assert all(hasattr(hf_sparse, name) for name in hf_sparse.__all__)


def test_every_member_of_a_family_is_a_file_that_its_package_imports():
    for family in METHODS & {path.parent.name for path in FILES}:
        folder = PACKAGE / family
        imported = {name.rpartition(".")[2] for name in imports(folder / "__init__.py")}
        imported |= {name for path in folder.glob("*.py") for name in imports_of_own(path)}
        assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= imported


def imports_of_own(path):
    return (name.split(".")[2] for name in imports(path) if name.startswith(f"hf_sparse.{path.parent.name}."))
