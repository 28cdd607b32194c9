"""`hf-sparse push`: output, exit codes, and where the token is read from."""

import pytest
from helpers.hub_server import TOKEN, USER
from typer.testing import CliRunner

from hf_sparse.cli.app import app
from hf_sparse.files import write_json


REPO = f"{USER}/pruned"


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "out" / "config.json", {"model_type": "bert"})
    return str(tmp_path / "out")


def run(*words):
    return CliRunner().invoke(app, ["push", *words])


def test_it_prints_the_address(hub, folder):
    done = run(folder, "pruned", "--private", "--path-in-repo", "last-checkpoint", "--message", "Mine")
    assert (done.exit_code, done.stdout) == (0, f"{hub.url}/{REPO}\n")
    assert hub.repos[REPO].private and hub.repos[REPO].commits == [("Mine", ["last-checkpoint/config.json"])]


def test_a_failure_prints_the_command_to_try_again_and_exits_with_1(hub, folder):
    hub.fail("/commit/", 503)
    done = run(folder, REPO, "--revision", "main", "--private")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"hf-sparse: {folder} was not uploaded to {REPO}. The Hub answered 503: injected 503. The local files are "
        f"unchanged. To try again:\n    hf-sparse push {folder} {REPO} --private --revision main\n"
    )


def test_a_missing_folder_exits_with_2(hub, tmp_path):
    done = run(str(tmp_path / "none"), REPO)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1) and "there is no such folder" in done.stderr


def test_the_token_is_read_from_the_named_variable(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert run(folder, REPO).exit_code == 1
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    assert run(folder, REPO, "--token-from-env", "MY_TOKEN").exit_code == 0
    done = run(folder, REPO, "--token-from-env", TOKEN)
    assert (
        done.exit_code == 2
        and "name of an environment variable, never the token" in done.stderr
        and TOKEN not in done.output
    )
    assert run(folder, REPO, "--token", TOKEN).exit_code == 2, (
        "a command line is seen by others, and kept in a history"
    )
