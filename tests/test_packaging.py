"""Builds the sdist and from it the wheel, installs it into a new virtual environment, and uses it there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny_texts import llama, save, texts, word_tokenizer, write_rows
from safetensors.torch import load_file


pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--quiet", "--no-deps", "--no-index"]


def run(*command, cwd: Path) -> str:
    """Runs a command without the repository on its path, and returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist, built from a copy of the sources: a build writes into their folder."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignored = [name.rstrip("/") for name in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", *ignored))
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, which takes everything else from the environment of the tests.

    A path in a .pth file adds the packages of a folder but not its .pth files, so no editable installation is seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    others = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(others))
    run(*PIP, "--python", folder / "bin" / "python", "install", *OFFLINE, wheel, cwd=folder)
    return folder


def test_the_sdist_has_what_its_tests_and_pages_need(sdist):
    folders = [ROOT / name for name in ("hf_sparse", "tests", "scripts", "docs", "model_cards")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = {path.relative_to(ROOT) for path in files} | {Path(".ci/run"), Path("Makefile"), Path("pyproject.toml")}
    assert not [str(name) for name in names if not (sdist / name).exists()]


def test_the_wheel_has_all_files_of_the_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    sources = {path for path in (ROOT / "hf_sparse").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert names == {str(path.relative_to(ROOT)) for path in sources}
    assert "hf_sparse/py.typed" in names


def test_the_metadata_names_the_source_and_each_dependency_once(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().partition("\n\n")[0].splitlines()
    assert {line.split()[1].strip(",") for line in lines if line.startswith("Project-URL")} == {
        "Source",
        "Changelog",
        "Documentation",
        "Issues",
    }
    requirements = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len({line.split()[1].split(">")[0].lower() for line in requirements}) == len(requirements)


def test_the_installed_wheel_prunes_a_model(environment, tmp_path):
    python, command = environment / "bin" / "python", environment / "bin" / "hf-sparse"
    where = run(python, "-c", "import hf_sparse; print(hf_sparse.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert "prune" in run(command, "--help", cwd=tmp_path)
    save(tmp_path / "model", llama(), word_tokenizer())
    write_rows(tmp_path / "train.jsonl", [{"text": text} for text in texts(60)])
    options = ["--calibration-file", "train.jsonl", "--pattern", "2:4", "--length", "16", "--samples", "8"]
    run(command, "prune", "model", "pruned", *options, "--device", "cpu", cwd=tmp_path)
    weight = load_file(tmp_path / "pruned" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal((weight != 0).reshape(-1, 4).sum(-1), torch.full((weight.numel() // 4,), 2))
    assert "50.00%" in run(command, "report", "pruned", cwd=tmp_path)
