"""`push` to a Hub that works, is busy, refuses, or cannot be reached."""

import copy
import pickle
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers.hub_server import READ_TOKEN, TOKEN, USER
from safetensors.torch import save_file

from hf_sparse import UploadError
from hf_sparse.files import write_json
from hf_sparse.hub.upload import HiddenToken, hide_token, is_hub_error, push, push_command


REPO = f"{USER}/pruned"
UPLOADED = {"config.json", "model.safetensors", "pruning_report.json"}


@pytest.fixture
def folder(tmp_path):
    """The folder of a model, with files that are not uploaded."""
    folder = tmp_path / "out"
    (folder / "checkpoint-1").mkdir(parents=True)
    save_file({"weight": torch.arange(2**16, dtype=torch.float32)}, folder / "model.safetensors")
    for name in ("config.json", "pruning_report.json", "_private.json", "checkpoint-1/config.json"):
        write_json(folder / name, {"name": name})
    (folder / ".pruning_report-abc.json").write_text("half of a rep")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text(f"url = https://{USER}:{TOKEN}@hub/pruned")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_uploaded_once(hub, folder):
    info = push(folder, "pruned", private=True, message="First")
    assert info.repo_url == f"{hub.url}/{REPO}" and info.repo_url.repo_id == REPO
    repo = hub.repos[REPO]
    assert repo.private and repo.files == {name: (folder / name).read_bytes() for name in UPLOADED}
    assert [(message, set(added)) for message, added in repo.commits] == [("First", UPLOADED)]
    assert {request.token for request in hub.asked("POST /api/")} == {TOKEN}
    assert {request.token for request in hub.asked("PUT ")} == {None}, "the store of large files gets no token"

    push(folder, REPO)
    assert len(repo.commits) == 1 and len(hub.asked("PUT ")) == 1, "nothing has changed"
    push(folder / "checkpoint-1", REPO, path_in_repo="last-checkpoint")
    assert repo.commits[1:] == [("Upload with hf_sparse", ["last-checkpoint/config.json"])]


@pytest.mark.parametrize(
    "request_, status",
    [
        ("POST /api/repos/create", 503),
        ("POST .*/preupload/", 502),
        ("POST .*/objects/batch", 500),
        ("PUT /lfs/", 503),
        ("PUT /lfs/", 0),
        ("POST .*/commit/", 504),
        ("POST .*/commit/", 0),
    ],
)
def test_a_request_that_fails_once_is_retried(hub, folder, request_, status):
    hub.fail(request_, status, times=1)
    push(folder, REPO)
    assert hub.asked(request_)[0].status == status
    assert hub.repos[REPO].files.keys() == UPLOADED and len(hub.repos[REPO].commits) == 1


def test_a_slow_hub_is_waited_for(hub, folder):
    slow = threading.Event()
    hub.fail("PUT /lfs/", status=None, until=lambda: slow.wait(0.5))
    push(folder, REPO)
    assert hub.repos[REPO].files.keys() == UPLOADED


# name -> (what breaks the Hub, the error message)
FAILURES = {
    "no token": (lambda hub, patch: patch.delenv("HF_TOKEN"), r"\(401\): log in with `hf auth login`"),
    "token of nobody": (lambda hub, patch: patch.setenv("HF_TOKEN", "unknown"), r"\(401\): log in"),
    "token to read": (lambda hub, patch: patch.setenv("HF_TOKEN", READ_TOKEN), r"no write permission \(403\)"),
    "no such branch": (
        lambda hub, patch: hub.fail("/commit/", 404),
        r"repository or revision does not exist.*\(404\)",
    ),
    "always busy": (lambda hub, patch: hub.fail("/commit/", 503), r"The Hub answered 503: injected 503\."),
    "no room": (lambda hub, patch: hub.fail("/objects/batch", 413), r"The Hub answered 413: injected 413\."),
    "cut": (lambda hub, patch: hub.fail("PUT ", 0), "could not be reached, or the connection was cut"),
    "refused": (lambda hub, patch: hub.refuse(), "could not be reached, or the connection was cut .*refused"),
    "offline": (lambda hub, patch: patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_upload_says_why_and_how_to_try_again(hub, folder, monkeypatch, caplog, failure):
    before = content(folder)
    happen, message = FAILURES[failure]
    happen(hub, monkeypatch)
    with pytest.raises(UploadError, match=message) as raised:
        push(folder, REPO, private=True)
    assert str(raised.value).endswith(f"\n    hf-sparse push {folder} {REPO} --private")
    assert content(folder) == before
    assert not any(repo.commits for repo in hub.repos.values()), "no half of an upload"
    assert TOKEN not in f"{raised.value} {raised.value.__cause__} {caplog.text}"


def test_a_card_with_invalid_metadata_is_named(hub, folder):
    (folder / "README.md").write_text("---\ntags: [sparse\n---\n")
    with pytest.raises(UploadError, match="The Hub answered 400: Invalid metadata in README.md.*expected ',' or"):
        push(folder, REPO)


def test_only_transient_errors_are_retried(hub, folder):
    hub.fail("/commit/", 403)
    with pytest.raises(UploadError):
        push(folder, REPO)
    assert len(hub.asked("/commit/")) == 1
    hub.errors.clear()
    hub.fail("/commit/", 503)
    with pytest.raises(UploadError):
        push(folder, REPO)
    assert len(hub.asked("/commit/")) == 1 + 3


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "aB3" * 11 + "x"], ids=["in use", "of that form"])
def test_a_file_with_a_token_is_not_uploaded(hub, folder, secret):
    """As a stock Trainer writes it: pickled in a file of torch."""
    torch.save({"hub_token": secret}, folder / "training_args.bin")
    with pytest.raises(UploadError, match="training_args.bin holds an access token.*revoke it") as raised:
        push(folder, REPO)
    assert secret not in str(raised.value) and not hub.requests


@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_without_files_is_refused(hub, folder, empty):
    shutil.rmtree(folder)
    if empty:
        (folder / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder}: there is no such folder, or nothing in it")):
        push(folder, REPO)
    assert not hub.requests


def test_a_hub_without_xet_is_reported_with_the_remedy(hub, folder, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail("xet-write-token", 404)
    try:
        push(folder, REPO)
    except UploadError as error:
        assert "set HF_HUB_DISABLE_XET=1" in str(error)
    else:  # such as 1.5 and 1.12: they upload without Xet then
        assert "model.safetensors" in hub.repos[REPO].files


def test_a_hidden_token_is_usable_but_not_saved():
    class Arguments:
        hub_token = None

    args = Arguments()
    hide_token(args)
    assert args.hub_token is None
    args.hub_token = TOKEN
    hide_token(args)
    hide_token(args)
    assert args.hub_token == TOKEN and f"Bearer {args.hub_token}" == f"Bearer {TOKEN}"
    assert copy.deepcopy(args).hub_token == copy.copy(args.hub_token) == TOKEN
    saved = pickle.dumps(args.__dict__)
    assert TOKEN.encode() not in saved and pickle.loads(saved) == {"hub_token": "<HUB_TOKEN>"}
    assert type(pickle.loads(saved)["hub_token"]) is str, "what is saved is read without hf_sparse"
    assert TOKEN not in repr(args.__dict__) and isinstance(args.hub_token, HiddenToken)


def test_errors_outside_of_the_hub_are_not_hub_errors(hub):
    """Only errors raised by huggingface_hub's API are, not those of a full disk."""
    import huggingface_hub

    for work, expected in [(lambda: huggingface_hub.model_info(f"{USER}/none"), True), (lambda: open("/none"), False)]:
        with pytest.raises(OSError) as raised:
            work()
        assert is_hub_error(raised.value) == expected


def test_the_command_to_try_again():
    assert push_command("out", REPO) == f"hf-sparse push out {REPO}"
    command = push_command("a b", REPO, private=False, revision="dev", path_in_repo="last-checkpoint")
    assert command == f"hf-sparse push 'a b' {REPO} --revision dev --path-in-repo last-checkpoint"
