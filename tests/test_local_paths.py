"""Names and texts without the folders of this machine."""

import pytest

from hf_sparse.local_paths import published_name, shorten_paths


@pytest.mark.parametrize(
    "text, shown",
    [
        ("--model /home/alice/bert --out runs/bert", "--model path/to/bert --out runs/bert"),
        ("'/home/alice b/model' x", "'path/to/model' x"),
        ('{"teacher": "/home/alice/my bert"}', '{"teacher": "path/to/my bert"}'),
        ("file:///home/alice/x", "path/to/x"),
        ("../../alice/x ~/x ~alice/runs/x/", "path/to/x path/to/x path/to/x"),
        (r"C:\Users\alice\x", "path/to/x"),
        ("a=/alice/x,/alice/y", "a=path/to/x,path/to/y"),
        ("python ../scripts/run.py", "python path/to/run.py"),
        # No paths of this machine, or none that says more than its last part.
        ("re:.*/x/y */b/c 1/2 path/to/x", "re:.*/x/y */b/c 1/2 path/to/x"),
        ("https://a/b/c hf://a/b/c user/name /data", "https://a/b/c hf://a/b/c user/name /data"),
    ],
)
def test_paths_in_a_text(text, shown):
    assert shorten_paths(text) == shown == shorten_paths(shown)


def test_a_published_name_is_that_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    names = ["user/bert", "dense", str(tmp_path / "runs"), "../runs/", "./dense", "/none/x", "..", ".", r"D:\a\b"]
    shown = ["user/bert", "dense", "runs", "runs", "dense", "x", tmp_path.name, "runs", "b"]
    assert [published_name(name) for name in names] == shown
    monkeypatch.chdir(tmp_path)
    assert published_name("runs/dense") == "dense"
