"""Whether a model exists is asked once, and answered by what is wrong."""

import pytest
from helpers.hub_server import Repo

from hf_sparse.hub.sources import check_model, check_tokenizer_source


@pytest.fixture
def check(tmp_path):
    """`check_model` without what other tests have left in the cache."""
    return lambda name, **options: check_model(name, cache_dir=str(tmp_path / "cache"), **options)


def test_models_on_the_hub(hub, check, tmp_path):
    hub.repos["a/model"] = Repo(private=False, files={"config.json": b"{}"})
    hub.repos["a/dataset"] = Repo(private=False, files={"README.md": b""})
    check("a/model")
    assert len(hub.requests) == 1 and hub.requests[0].method == "HEAD"
    with pytest.raises(OSError, match=r'^there is no folder "a/modle", and no model of that name on the Hub'):
        check("a/modle")
    with pytest.raises(OSError, match='^"a/dataset" on the Hub has no config.json, so it holds no model'):
        check("a/dataset")
    check_tokenizer_source("a/dataset", cache_dir=str(tmp_path))  # tokenizers have files of several names
    hub.fail("HEAD /a/model")
    with pytest.raises(OSError, match="and the Hub cannot be asked for that name .*503"):
        check("a/model")
    assert len(hub.asked("HEAD /a/model/")) == 2  # none of them again


def test_folders(check, tmp_path):
    for name in ("empty", "run/checkpoint-5", "adapter", "shards"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-5" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "shards" / "config.json").write_text("{}")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    for name, error, text in (
        ("empty", OSError, "it has no config.json. Name what save_pretrained has written."),
        ("run", OSError, "checkpoint-5"),
        ("run/checkpoint-5", OSError, "has a config.json, but no weights"),
        ("adapter", OSError, "holds an adapter, and no model"),
        ("shards", ValueError, "model-2.safetensors, which model.safetensors.index.json names, does not exist."),
        ("shard", OSError, "Did you mean"),
        ("shards/config.json", OSError, "is a file: name the folder that it is in."),
    ):
        with pytest.raises(error, match="^`teacher`: ") as caught:
            check(str(tmp_path / name), option="teacher")
        assert text in str(caught.value)
