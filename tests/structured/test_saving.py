"""The folder of a shrunk model: plain files, whole or absent."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_sparse.structured.saving import save_shrunk
from hf_sparse.structured.shrink import shrink
from tests.helpers.model_types import MODEL_TYPES


@pytest.fixture
def source(tmp_path):
    """The folder of a dense model with tokenizer, and with what must not be copied."""
    folder = tmp_path / "dense"
    MODEL_TYPES["gpt2"].make().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    for name in ("README.md", "pruning_state.safetensors", "training_args.bin", "trainer_state.json"):
        (folder / name).write_text("of the dense model")
    (folder / "checkpoint-1").mkdir()
    return folder


def test_it_opens_plainly_with_the_tokenizer_of_the_dense_model(source, tmp_path):
    small = shrink(AutoModelForCausalLM.from_pretrained(source), layers=[0])
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "left over").write_text("of an earlier run")
    save_shrunk(small, folder, source)
    assert sorted(path.name for path in folder.iterdir()) == [
        "1_Pooling", "config.json", "generation_config.json", "model.safetensors", "modules.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [1]
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.config.n_layer == 1 and opened.lm_head.weight is opened.transformer.wte.weight
    for name, parameter in small.named_parameters():
        assert torch.equal(opened.get_parameter(name), parameter)


def test_a_failure_leaves_the_old_folder(source, tmp_path, monkeypatch):
    small, folder = MODEL_TYPES["gpt2"].make(), tmp_path / "small"
    save_shrunk(small, folder)
    before = sorted(path.name for path in folder.iterdir())

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(OSError, match="no space left"):
        save_shrunk(small, folder, source)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small"]


def test_folders_that_would_destroy_the_source_are_refused(source, tmp_path):
    small = MODEL_TYPES["gpt2"].make()
    for folder in (source, source / "small", tmp_path):
        with pytest.raises(ValueError, match="write to a folder beside the source"):
            save_shrunk(small, folder, source)
    with pytest.raises(FileNotFoundError, match="`source` is .*missing, which is not a folder"):
        save_shrunk(small, tmp_path / "small", tmp_path / "missing")
