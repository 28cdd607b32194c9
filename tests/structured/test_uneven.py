"""Models whose layers have different sizes: from zeros to a folder that `from_pretrained` opens."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2LMHeadModel, Trainer, pipeline

import hf_sparse
from hf_sparse.model.coupling import find_unit_groups
from tests.helpers import tiny, tiny_texts
from tests.helpers.architectures import ARCHITECTURES


def zero_units(model, seed=0):
    """Sets a different number of neurons and heads of each layer to zero, and returns how many."""
    generator = torch.Generator().manual_seed(seed)
    parameters, counts = dict(model.named_parameters()), {}
    with torch.no_grad():
        for index, group in enumerate(find_unit_groups(model, "neuron") + find_unit_groups(model, "head")):
            count = min(8 * (index % 3), group.num_units - 1) if group.kind == "neuron" else index % group.num_units
            count = 1 if "EncDecAttention" in group.slices[0].name else count  # equal in all blocks
            units = torch.randperm(group.num_units, generator=generator)[:count]
            for part in group.slices:
                parameters[part.name].index_fill_(part.dim, part.indices(units), 0.0)
            counts[group.name, group.kind] = count
    return counts


def logits(model, architecture):
    with torch.no_grad():
        return model(**architecture.batches(1)[0]).logits


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "t5"])
def test_each_layer_keeps_what_it_uses(name, tmp_path):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    counts = zero_units(model)
    assert len(set(counts.values())) > 1
    shrunk = hf_sparse.shrink(model, heterogeneous=True)
    for kind in ("neuron", "head"):
        sizes = [group.num_units - counts[group.name, kind] for group in find_unit_groups(model, kind)]
        assert [group.num_units for group in find_unit_groups(shrunk, kind)] == sizes
    assert torch.allclose(logits(shrunk, architecture), logits(model, architecture), atol=1e-5)
    shrunk.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert torch.equal(logits(loaded, architecture), logits(shrunk, architecture))
    loaded.save_pretrained(tmp_path / "second")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("first", "second")]
    assert files[0] == files[1]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]["version"] == 1
    loaded.half().float()
    assert hf_sparse.plan_shrink(model, heterogeneous=True).kept == ()


def test_sizes_that_the_config_can_express_stay_plain():
    model = ARCHITECTURES["bert"].model()
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            block.output.dense.weight[:, :8] = 0
    shrunk = hf_sparse.shrink(model, heterogeneous=True)
    assert shrunk.config.intermediate_size == 16 and not hasattr(shrunk.config, "quantization_config")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with layers of different sizes, and a tokenizer."""
    folder = tmp_path_factory.mktemp("uneven") / "model"
    torch.manual_seed(0)
    model = tiny_texts.classifier(intermediate_size=40)
    zero_units(model)
    tiny_texts.save(folder, hf_sparse.shrink(model.eval(), heterogeneous=True), tiny_texts.bert_tokenizer())
    return folder


def test_the_rest_of_transformers_opens_it(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    base = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    shapes = {name: parameter.shape for name, parameter in model.base_model.named_parameters()}
    assert {name: parameter.shape for name, parameter in base.named_parameters()}.items() <= shapes.items() | {
        (name, parameter.shape) for name, parameter in base.named_parameters() if name.startswith("pooler")
    }
    classify = pipeline("text-classification", model=str(folder))
    assert set(classify(tiny_texts.texts(1))[0]) == {"label", "score"}


def test_training_goes_on_and_checkpoints_reload(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    dataset = [{"input_ids": [5, 6, 7, 8], "labels": number % 2} for number in range(8)]
    args = tiny.arguments(tmp_path, max_steps=2, save_steps=2, save_strategy="steps")
    Trainer(model=model, args=args, train_dataset=dataset).train()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(left, right) for left, right in zip(again.parameters(), model.parameters(), strict=True))


def test_generate_gives_the_tokens_of_the_dense_model():
    torch.manual_seed(0)
    model: GPT2LMHeadModel = ARCHITECTURES["gpt2"].model()
    zero_units(model)
    shrunk = hf_sparse.shrink(model, heterogeneous=True)
    ids = torch.randint(3, 48, (2, 5))
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        tokens = [
            each.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
            for each in (model, shrunk)
        ]
        assert torch.equal(*tokens)


def test_without_the_package_loading_fails_loudly(folder):
    code = (
        "import sys, traceback; from transformers import AutoModel\n"
        "try: AutoModel.from_pretrained(sys.argv[1])\nexcept Exception: traceback.print_exc()\n"
        "else: sys.exit('it opens')\n"
        "print('opens now', file=sys.stderr); import hf_sparse; AutoModel.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "hf_sparse" in done.stderr.partition("opens now")[0]


def test_the_module_that_opens_such_models_can_be_imported_first():
    """It imports what its own import waits for."""
    code = (
        "from hf_sparse.hub.heterogeneous import HeterogeneousConfig as own\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known\n"
        "assert list(known.values()).count(own) == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "needs a newer hf_sparse"),
        ({"shapes": {"bert.encoder.layer.0.intermediate.dense.weight": [4000, 24]}}, "does not fit the config"),
        ({"shapes": {"bert.encoder.layer.0.intermediate.dense.weight": ["a", 24]}}, "is damaged"),
        ({"attributes": {"bert.encoder.layer.0.attention.self": {"forward": 3}}}, "no integer attribute"),
    ],
)
def test_damaged_sizes_are_refused(folder, tmp_path, change, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
