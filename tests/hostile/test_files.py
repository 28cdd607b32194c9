"""A damaged file is read as if nothing were wrong, or refused with its name: in bounded time, with one clear error."""

import random
import re
import shutil
import traceback

import pytest
from file_formats import FORMATS, NEVER_READ
from helpers.bounds import Usage

import hf_sparse.files


@pytest.fixture(params=FORMATS, ids=lambda file_format: file_format.name)
def file_format(request):
    return request.param


def problem_of(file_format, path):
    """Reads a file. Returns what is wrong with how it was refused; None if nothing is, or if it was read."""
    usage = Usage()
    try:
        file_format.read(path)
    except file_format.errors as error:
        if path.name not in str(error):
            return f"{type(error).__name__} without the name of the file: {error}"[:500]
        if len(str(error)) > 5_000:
            return f"an error of {len(str(error))} characters"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('hf_sparse/')[2]}:{frame.lineno}"
        return f"{type(error).__name__}: {error} in {where}"[:500]
    return usage.excess()


def check_mutations(file_format, folder, seeds):
    """Reads a file with as many mutations as there are seeds, and reports each kind of problem once, with a seed."""
    problems = {}
    (folder / "valid").mkdir()
    valid = file_format.write(folder / "valid")
    for seed in seeds:
        case = folder / str(seed)
        shutil.copytree(folder / "valid", case)
        path = case / valid.relative_to(folder / "valid")
        path.write_bytes(file_format.mutate(path.read_bytes(), random.Random(seed)))
        if problem := problem_of(file_format, path):
            problems.setdefault(re.sub(r"\d+", "#", problem.replace(str(case), ""))[:120], f"seed {seed}: {problem}")
        shutil.rmtree(case)
    assert not problems, "\n".join(problems.values())


def test_every_file_that_is_read_has_an_entry():
    names = {name for name in vars(hf_sparse.files) if re.fullmatch("[A-Z_]+_(FILE|PATTERN|GLOB)", name)}
    covered = {name for file_format in FORMATS for name in file_format.constants}
    assert names == covered | NEVER_READ.keys(), "add the new file to FORMATS, or to NEVER_READ"
    assert not covered & NEVER_READ.keys()


def test_a_valid_file_is_read(file_format, tmp_path):
    file_format.read(file_format.write(tmp_path))


def test_a_damaged_file_is_read_or_refused_by_name(file_format, tmp_path):
    check_mutations(file_format, tmp_path, range(60))


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused_by_name(file_format, tmp_path):
    check_mutations(file_format, tmp_path, range(1_000, 1_400))
