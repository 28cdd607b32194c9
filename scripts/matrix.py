"""Runs the Trainer-facing tests with a table of versions, each in an environment that is kept in `.matrix/`.

    python scripts/matrix.py --list            # the rows
    python scripts/matrix.py                   # all of them: one line each, exit code 1 if one fails
    python scripts/matrix.py newest floors     # some of them
    python scripts/matrix.py --until 2026-06-01 newest   # with what was released by that day

Environments are made by uv, which shares the files of packages between them. `.matrix/<row>.log` has the output of a
row, `.matrix/results.json` the latest result of each, and `--write` puts these into the table of a page.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".matrix"
UV = [sys.executable, "-m", "uv"]
# What `SparseTrainer` overrides, checkpoints, uploads, cards and commands: every place where a release can break us.
TESTS = [
    "tests/test_private_names.py",
    "tests/training/test_trainer.py",
    "tests/training/test_resume.py",
    "tests/training/test_arguments.py",
    "tests/training/test_callback.py",
    "tests/training/test_best_metric.py",
    "tests/training/test_invariants.py",
    "tests/training/test_loss_scale.py",
    "tests/training/test_other_trainers.py",
    "tests/training/test_trainer_card.py",
    "tests/training/test_trainer_shrink.py",
    "tests/training/distillation/test_distillation_losses.py",
    "tests/hub/test_hub.py",
    "tests/hub/test_uploads.py",
    "tests/integrations/test_peft.py",
    "tests/calibration/test_text_batches.py",
    "tests/distributed/test_offload.py",
    "tests/oneshot/test_prune.py",
    "tests/oneshot/test_tracing.py",
    "tests/cli/test_cli.py",
    "tests/structured/test_shrink.py",
]
SHOWN = ["torch", "transformers", "accelerate", "huggingface_hub", "datasets", "peft", "trl", "sentence-transformers"]
# Of what the tests need beside the extras; their versions are no promise to users.
TEST_PACKAGES = [
    "pytest>=8",
    "hypothesis>=6.100",
    "setuptools>=70.1",
    "tensorboard>=2.18",
    "markdown-it-py[linkify]>=3",
]
NUM_MINORS = 6
START, END = "<!-- versions: written by scripts/matrix.py -->", "<!-- end of versions -->"


@dataclass(frozen=True)
class Row:
    """An environment.

    Args:
        name: of the row and its folder.
        packages: requirements beside those of setup.cfg.
        python: version of Python; None for that of this process.
        lowest: whether every requirement of setup.cfg gets the oldest version that it allows, instead of the newest.
        extras: of setup.cfg.
    """

    name: str
    packages: tuple[str, ...] = ()
    python: str | None = None
    lowest: bool = False
    extras: tuple[str, ...] = ("scripts", "integrations")


@dataclass
class Result:
    """What came of a row: `outcome` is "passed", "failed", or "not made" where the environment could not be made."""

    row: str
    outcome: str
    summary: str
    seconds: int
    day: str = field(default_factory=lambda: date.today().isoformat())
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def floors() -> dict[str, str]:
    """The oldest allowed version of each package that setup.cfg names for the package and the extras of rows."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = [config["options"]["install_requires"], *(config["options.extras_require"][name] for name in Row.extras)]
    return dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(named), flags=re.MULTILINE))


def newest_minors(package: str, count: int) -> list[str]:
    """The newest `count` minor releases of a package, newest first, as "5.24"."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = re.search(r"Available versions: (.*)", listed)
    minors = (".".join(version.split(".")[:2]) for version in versions[1].split(", "))
    return list(dict.fromkeys(minors))[:count]


def rows() -> dict[str, Row]:
    """All rows by name."""
    lowest = floors()
    every = [Row("newest")]
    minors = newest_minors("transformers", NUM_MINORS)
    every += [Row(f"transformers-{minor}", (f"transformers=={minor}.*",)) for minor in minors]
    every.append(Row("transformers-floor", (f"transformers=={lowest['transformers']}",), extras=("scripts",)))
    for package in ("accelerate", "huggingface_hub", "datasets"):
        every.append(Row(f"{package}-floor", (f"{package}=={lowest[package]}",), extras=("scripts",)))
    every.append(Row("peft-floor", (f"peft=={lowest['peft']}",)))
    every += [Row("floors", python="3.10", lowest=True)]
    every += [Row(f"python-{version}", python=version) for version in ("3.10", "3.12", "3.13", "3.14")]
    every.append(Row("main", ("transformers @ git+https://github.com/huggingface/transformers",)))
    return {row.name: row for row in every}


def make_environment(row: Row, torch: str, until: str | None) -> tuple[Path, str | None]:
    """Makes or updates the environment of a row. Returns its Python, and what went wrong or None."""
    folder = FOLDER / row.name
    python = folder / "bin" / "python"
    steps = []
    if not python.exists():
        steps.append([*UV, "venv", "--quiet", "--python", find_python(row.python), str(folder)])
    install = [*UV, "pip", "install", "--quiet", "--upgrade", "--python", str(python)]
    install += ["--editable", f"{ROOT}[{','.join(row.extras)}]", *TEST_PACKAGES, *row.packages]
    if row.lowest:
        # `--resolution lowest-direct` rather raises a package that we name than lowers one that we do not: datasets to
        # the newest, because the newest multiprocess does not go with the oldest.
        pins = FOLDER / f"{row.name}.txt"
        pins.write_text("".join(f"{package}=={version}\n" for package, version in floors().items()))
        install += ["--constraint", str(pins)]
    else:
        install.append(torch)
    if until:
        install += ["--exclude-newer", until]
    for step in [*steps, install]:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            return python, (done.stderr or done.stdout).strip()
    return python, None


def find_python(version: str | None) -> str:
    """The interpreter for uv: that of this process, one of pyenv's, or the version, which uv finds or downloads."""
    if version is None:
        return sys.executable
    installed = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*"))
    return str(installed[-1] / "bin" / "python") if installed else version


def installed_versions(python: Path) -> tuple[str, dict[str, str]]:
    """Python's version in an environment, and those of the packages of the table."""
    code = (
        "import json, platform, sys\nfrom importlib.metadata import version, PackageNotFoundError\nfound = {}\n"
        "for name in sys.argv[1:]:\n    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(json.dumps([platform.python_version(), found]))"
    )
    done = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    number, versions = json.loads(done.stdout)
    return number, versions


def run_row(row: Row, args: argparse.Namespace) -> Result:
    """Makes the environment of a row, and runs the tests in it."""
    begun = time.monotonic()
    python, problem = make_environment(row, args.torch, args.until)
    log = FOLDER / f"{row.name}.log"
    if problem is not None:
        log.write_text(problem)
        causes = [line.strip() for line in problem.splitlines() if line.strip() and not line.startswith("hint:")]
        return Result(row.name, "not made", causes[-1] if causes else problem, round(time.monotonic() - begun))
    number, versions = installed_versions(python)
    begun = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--tb=short", *(args.tests or TESTS)]
    with open(log, "w") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=args.timeout
            )
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            output.write(f"\nstopped after {args.timeout} s")
            failed = True
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    summary = re.sub(r"^=+ | =+$| in [\d.]+s.*", "", lines[-1])
    failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    outcome = "failed" if failed else "passed"
    seconds = round(time.monotonic() - begun)
    return Result(row.name, outcome, summary, seconds, python=number, versions=versions, failures=failures)


def write_table(page: Path, results: dict[str, dict]) -> None:
    """Replaces the table between the two marks of a page by that of the results."""
    head = ["row", "Python", *SHOWN, "result", "day"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for result in results.values():
        versions = [result["versions"].get(name, "") for name in SHOWN]
        outcome = result["summary"] if result["outcome"] != "not made" else "not made"
        lines.append(f"| {' | '.join([result['row'], result['python'], *versions, outcome, result['day']])} |")
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + START, "", *lines, "", END + after]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows; all but main when left out")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--json", action="store_true", help="with --list, the names of all rows as JSON")
    parser.add_argument("--torch", default="torch", help='requirement of torch, as "torch==2.13.0"')
    parser.add_argument("--until", metavar="DAY", help="install only what was released by that day")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds that the tests of a row may take")
    parser.add_argument("--tests", nargs="*", help="files or folders of tests instead of those of this script")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page whose table gets the latest results")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    known = rows()
    if unknown := [name for name in args.rows if name not in known]:
        print(f"There is no row {', '.join(unknown)}: the rows are {', '.join(known)}.", file=sys.stderr)
        return 2
    chosen = [known[name] for name in args.rows] or [row for row in known.values() if row.name != "main"]
    if args.list and args.json:
        print(json.dumps(list(known)))
        return 0
    if args.list:
        for row in chosen:
            print(row.name, row.python or "", *row.packages, "lowest" if row.lowest else "")
        return 0
    if find_spec("uv") is None:
        print("uv is not installed: pip install uv (or make matrix).", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    store = FOLDER / "results.json"
    ok = True
    for row in chosen:
        result = run_row(row, args)
        results = json.loads(store.read_text()) if store.exists() else {}  # another run may have added rows
        results[row.name] = asdict(result)
        store.write_text(json.dumps({name: results[name] for name in known if name in results}, indent=1))
        print(f"{row.name:24} {result.outcome:9} {result.summary} ({result.seconds} s)", flush=True)
        for failure in result.failures:
            print(f"    {failure}", flush=True)
        ok = ok and result.outcome == "passed"
    if args.write:
        write_table(args.write, json.loads(store.read_text()))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
