"""Block reconstruction: smaller errors on held-out samples, exact zeros, and nothing else changed."""

import dataclasses
import logging
import weakref

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.tiny import same, weights
from torch import nn

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.config import PruningConfigError, Reconstruction
from hf_sparse.oneshot import pipeline
from hf_sparse.oneshot.activation_cache import ActivationCache
from hf_sparse.oneshot.reconstruct import BlockReconstructor
from hf_sparse.oneshot.resume import FinishedSubgraphs
from hf_sparse.oneshot.tuning_samples import TuningSamples


FAST = {"steps": 20, "samples": 4}


def run(model, batches, folder=None, kwargs=FAST, **options):
    """Prune with reconstruction, and return the errors before and after by block."""
    options = ({} if "pattern" in options else {"target_sparsity": 0.5}) | options
    config = OneshotConfig(reconstruct=True, reconstruct_kwargs=kwargs, **options)
    found, real = {}, BlockReconstructor.reconstruct
    with pytest.MonkeyPatch.context() as patch:

        def reconstruct(self, window):
            name = window[-1].name
            found[name] = real(self, window)
            return found[name]

        patch.setattr(BlockReconstructor, "reconstruct", reconstruct)
        report = prune_oneshot(model, batches, config, folder, progress=False)
    return found, report


class Linears(nn.Module):
    """Blocks of one linear layer each."""

    def __init__(self, count=1, size=8):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(size, size) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def correlated(rows, size=8, batch=8):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(size, size, generator=generator)
    x = torch.randn(rows, size, generator=generator) @ mixing + 0.5
    return list(x.split(batch))


@pytest.mark.parametrize("inputs", ["sparse", "dense"])
def test_linear_blocks_reach_least_squares(inputs):
    """For the inputs that the tuned block before gives, or the dense one."""
    model, dense, batches = Linears(2), Linears(2).double(), correlated(128, batch=128)
    kwargs = {"steps": 1500, "samples": 112, "learning_rate": 0.05, "window": 1, "inputs": inputs}
    found, _ = run(model, batches, kwargs=kwargs)
    x = y = batches[0].double()
    for number, block in enumerate(model.blocks):
        y = dense.blocks[number](y).detach()
        error = 0.0
        for row, weight in enumerate(block.weight):
            kept = weight != 0
            assert int(kept.sum()) == 4
            features = torch.cat([x[:, kept], torch.ones(len(x), 1)], 1)
            solution = torch.linalg.lstsq(features[:112], y[:112, row]).solution
            assert torch.allclose(weight[kept].double(), solution[:-1], atol=2e-3)
            assert abs(float(block.bias[row].detach()) - solution[-1]) < 2e-3
            error += float((features @ solution - y[:, row])[112:].square().sum())
        result = found[f"blocks.{number}"]
        assert result.after == pytest.approx(error / float(y[112:].square().sum()), rel=1e-2)
        assert result.after < 0.9 * result.before
        x = y if inputs == "dense" else x @ block.weight.double().t() + block.bias.double()
        x = x.detach()


def outputs_of(model, block, batches):
    """What a block returns for each batch in a plain forward."""
    found = []
    module = model.get_submodule(block)
    with module.register_forward_hook(lambda module, args, output: found.append(output)), torch.no_grad():
        for batch in batches:
            model(**batch)
    return [output[0] if isinstance(output, tuple) else output for output in found]


def error_of(architecture, model, block, batches):
    """‖Y - Ŷ‖² / ‖Y‖² over the tokens that are no padding."""
    squares = size = 0.0
    outputs = zip(*(outputs_of(each, block, batches) for each in (architecture.model(), model)), strict=True)
    for batch, (expected, output) in zip(batches, outputs, strict=True):
        mask = batch.get("attention_mask")
        if "labels" in batch and block.startswith("decoder"):
            mask = (batch["labels"] != -100).long()
        mask = torch.ones(expected.shape[:2]) if mask is None else mask
        squares += float((expected - output)[mask.bool()].double().square().sum())
        size += float(expected[mask.bool()].double().square().sum())
    return squares / size


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "gpt2"])
def test_errors_are_those_of_plain_forwards(name, window):
    """The last 2 of 15 samples are held out; blocks get what the tuned blocks before them give. With a window of two
    blocks, all but the last block of a list are tuned again, after their error was measured."""
    architecture = ARCHITECTURES[name]
    model, pruned, batches = architecture.model(), architecture.model(), architecture.batches()
    found, report = run(model, batches, kwargs=FAST | {"window": window})
    prune_oneshot(pruned, batches, OneshotConfig(target_sparsity=0.5), progress=False)
    held_out = [{key: value[1:] for key, value in batches[-1].items()}]
    assert [f"{name}." for name in found] == list(architecture.blocks)
    for number, (block, result) in enumerate(found.items()):
        if window == 1 or block.endswith("1"):
            assert result.after == pytest.approx(error_of(architecture, model, block, held_out), rel=1e-4)
        if number == 0:
            assert result.before == pytest.approx(error_of(architecture, pruned, block, held_out), rel=1e-4)
        assert result.after < result.before or number
    assert report.sparsity == 0.5
    first = architecture.blocks[0]
    for key, weight in model.state_dict().items():
        if key.startswith(first) and weight.ndim == 2 and "relative_attention_bias" not in key:
            assert torch.equal(weight == 0, pruned.state_dict()[key] == 0)
            assert not torch.signbit(weight[weight == 0]).any()


def error_with_dense_inputs(architecture, state, window, batch):
    """The error of the last block of a window, if the blocks before the window return what the dense ones do."""
    model, names = architecture.model(), [name.removesuffix(".") for name in architecture.blocks]
    model.load_state_dict(state)

    def replace(dense):
        return lambda module, args, output: (dense, *output[1:]) if isinstance(output, tuple) else dense

    for name in names[: names.index(window[0].name)]:
        (dense,) = outputs_of(architecture.model(), name, [batch])
        model.get_submodule(name).register_forward_hook(replace(dense))
    return error_of(architecture, model, window[-1].name, [batch])


FOUR_BLOCKS = dataclasses.replace(
    ARCHITECTURES["gpt2"],
    options=ARCHITECTURES["gpt2"].options | {"n_layer": 4},
    blocks=tuple(f"transformer.h.{number}." for number in range(4)),
)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("architecture", [FOUR_BLOCKS, ARCHITECTURES["t5"]], ids=["gpt2", "t5"])
def test_errors_with_dense_inputs(architecture, window, monkeypatch):
    """They are those of plain forwards in which all blocks before the window are dense."""
    model, batches, real = architecture.model(), architecture.batches(), BlockReconstructor.reconstruct
    held_out = {key: value[1:] for key, value in batches[-1].items()}
    expected = {}

    def reconstruct(self, blocks):
        before = error_with_dense_inputs(architecture, model.state_dict(), blocks, held_out)
        result = real(self, blocks)
        after = error_with_dense_inputs(architecture, model.state_dict(), blocks, held_out)
        expected[blocks[-1].name] = pytest.approx((before, after), rel=1e-4)
        return result

    monkeypatch.setattr(BlockReconstructor, "reconstruct", reconstruct)
    found, _ = run(model, batches, kwargs=FAST | {"window": window, "inputs": "dense"})
    assert {name: (result.before, result.after) for name, result in found.items()} == expected
    assert [f"{name}." for name in expected] == list(architecture.blocks)
    assert all(result.after < result.before for result in found.values())


@pytest.mark.parametrize("inputs, sets", [("sparse", 2), ("dense", 4)])
def test_cached_outputs(inputs, sets, monkeypatch):
    """Wherever they are cached, the result is the same; with dense inputs those of two more blocks are kept."""
    alive, most = weakref.WeakSet(), []

    class Cache(ActivationCache):
        def __setitem__(self, index, output):
            super().__setitem__(index, output)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(pipeline, "ActivationCache", Cache)
    states = []
    for storage in ("device", "cpu", "disk"):
        model, kwargs = Linears(5), {"steps": 3, "samples": 4, "window": 2, "inputs": inputs}
        run(model, correlated(32), kwargs=kwargs, activations=storage)
        states.append(weights(model))
        assert max(most) == sets and not alive
    assert same(states[0], states[1])
    for name, weight in states[2].items():  # files align tensors otherwise, and sums are rounded otherwise
        assert torch.allclose(weight, states[0][name], atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_blocks_of_a_window_are_tuned_together(window, monkeypatch):
    """Those before the one that was pruned, and no others."""
    model, tuned, real = Linears(4), [], BlockReconstructor.reconstruct

    def reconstruct(self, blocks):
        before = weights(model)
        result = real(self, blocks)
        after = weights(model)
        tuned.append([name for name in "0123" if not torch.equal(before[key := f"blocks.{name}.bias"], after[key])])
        return result

    monkeypatch.setattr(BlockReconstructor, "reconstruct", reconstruct)
    run(model, correlated(32), kwargs=FAST | {"window": window})
    assert (
        tuned
        == {
            1: [["0"], ["1"], ["2"], ["3"]],
            2: [["0"], ["0", "1"], ["1", "2"], ["2", "3"]],
            3: [["0"], ["0", "1"], ["0", "1", "2"], ["1", "2", "3"]],
        }[window]
    )


def changed_names(name, **options):
    architecture = ARCHITECTURES[name]
    model, before = architecture.model(), architecture.model().state_dict()
    run(model, architecture.batches(), **options)
    return {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}


def test_norms_and_biases_are_tuned_but_nothing_outside_of_blocks():
    changed = changed_names("t5")
    assert "encoder.block.0.layer.0.layer_norm.weight" in changed
    assert not any(key.startswith(("shared", "encoder.final", "decoder.final", "lm_head")) for key in changed)
    assert not any("relative_attention_bias" in key for key in changed), "which all blocks share"
    assert "bert.encoder.layer.0.output.dense.bias" in changed_names("bert")


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "magnitude"},
        {"criterion": "magnitude", "scope": "global"},
        {"criterion": "snip"},
        {"solver": "sparsegpt"},
        {"pattern": "2:4"},
        {"pattern": "neuron:1", "target_sparsity": 0.5},
        {"pattern": "neuron:1", "target_sparsity": 0.5, "criterion": "magnitude", "solver": "none"},
        {"pattern": "head", "target_sparsity": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_after_every_way_to_prune(name, options):
    architecture = ARCHITECTURES[name]
    model, plain = architecture.model(), architecture.model()
    found, report = run(model, architecture.batches(), **options)
    options = ({} if "pattern" in options else {"target_sparsity": 0.5}) | options
    expected = prune_oneshot(plain, architecture.batches(), OneshotConfig(**options), progress=False)
    assert len(found) == len(architecture.blocks)
    assert all(result.after <= result.before for result in found.values())
    assert any(result.after < result.before for result in found.values()) or not report.zeros
    assert [layer.zeros for layer in report.layers] == [layer.zeros for layer in expected.layers]
    assert report.parameter_zeros == expected.parameter_zeros


def test_experts_are_tuned():
    changed = changed_names("qwen3_moe", on_unreached="magnitude")
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"} <= changed


def test_weights_remain_where_tuning_does_not_help(caplog):
    """A learning rate that is far too high."""
    model, plain, batches = Linears(2), Linears(2), correlated(32)
    kwargs = FAST | {"learning_rate": 1.0, "steps": 2}
    with caplog.at_level(logging.WARNING):
        found, _ = run(model, batches, kwargs=kwargs)
    prune_oneshot(plain, batches, OneshotConfig(target_sparsity=0.5), progress=False)
    assert same(weights(model), weights(plain))
    assert all(result.after == result.before > 0 for result in found.values())
    assert "blocks.0: tuning does not lower the error on held-out samples" in caplog.text


def test_frozen_parameters_are_tuned_and_remain_frozen():
    architecture = ARCHITECTURES["llama"]
    model, free = architecture.model(), architecture.model()
    model.requires_grad_(False)
    free.model.norm.weight.requires_grad_(False)
    free.model.layers[0].input_layernorm.weight.grad = torch.ones(16)
    before = dict(model.named_parameters())
    run(model, architecture.batches())
    run(free, architecture.batches())
    assert same(weights(model), weights(free))
    assert all(weight is before[name] and not weight.requires_grad for name, weight in model.named_parameters())
    with_gradient = [name for name, weight in free.named_parameters() if weight.grad is not None]
    assert with_gradient == ["model.layers.0.input_layernorm.weight"], "which was there before"
    assert [name for name, weight in free.named_parameters() if not weight.requires_grad] == ["model.norm.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Small steps accumulate in float32."""
    architecture = ARCHITECTURES["llama"]
    model = architecture.model().to(dtype)
    found, report = run(model, architecture.batches(), kwargs=FAST | {"steps": 40})
    exact, _ = run(architecture.model(), architecture.batches(), kwargs=FAST | {"steps": 40})
    assert all(weight.dtype == dtype for weight in model.parameters()) and report.sparsity == 0.5
    for block, result in found.items():
        assert result.after < result.before
        assert result.after == pytest.approx(exact[block].after, rel=0.15)


def test_padding_does_not_count():
    architecture = ARCHITECTURES["bert"]
    batches, others = architecture.batches(), architecture.batches()
    for batch in others:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])
    first, second = architecture.model(), architecture.model()
    run(first, batches)
    run(second, others)
    second = weights(second)
    assert all(torch.allclose(weight, second[key], atol=1e-5) for key, weight in weights(first).items())


def test_batches_may_be_of_any_size():
    """Steps are the same 16 samples, whether they come in one batch or in many."""
    architecture = ARCHITECTURES["gpt2"]
    ids = torch.cat([batch["input_ids"] for batch in architecture.batches(8, 4)])
    states = []
    for rows in (1, 4, 32):
        model = architecture.model()
        run(model, [{"input_ids": part} for part in ids.split(rows)], kwargs=FAST | {"samples": 16})
        states.append(weights(model))
    for state in states[1:]:
        assert all(torch.allclose(weight, state[key], atol=1e-4) for key, weight in states[0].items())


def test_steps_of_2048_tokens():
    """Of token ids; padding does not count. 16 samples of anything else."""
    ids = torch.ones(40, 256, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, 128:] = 0
    for batch, samples in (({"input_ids": ids}, 8), ({"input_ids": ids, "attention_mask": mask}, 16), (ids * 1.0, 16)):
        found = TuningSamples.of([batch], Reconstruction(holdout=0.2), 1)
        assert len(found.steps) == 32 // samples and len(found.batches) == 1 + 32 // samples


@pytest.mark.parametrize("finished", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "sparsegpt"},
        {"criterion": "magnitude"},
        {"kwargs": {"steps": 5, "learning_rate": 0.01, "window": 1, "inputs": "dense"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_run_continues_after_the_last_finished_block(name, options, finished, monkeypatch, tmp_path):
    architecture = ARCHITECTURES[name]
    alone, cut, again = (architecture.model() for _ in range(3))
    run(alone, architecture.batches(), **options)
    real, left = FinishedSubgraphs.write, [finished]

    def write(*arguments):
        real(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FinishedSubgraphs, "write", write)
        with pytest.raises(KeyboardInterrupt):
            run(cut, architecture.batches(), tmp_path, **options)
    found, _ = run(again, architecture.batches(), tmp_path, **options)
    assert len(found) == len(architecture.blocks) - finished
    assert same(weights(again), weights(alone))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sequential": False}, "`reconstruct` tunes block by block, and `sequential=False` does not"),
        ({"forwards": 1}, "`reconstruct` tunes a block between two forwards: use `forwards=2`"),
        ({"pattern": "layer", "target_sparsity": 0.5}, '`pattern` "layer" may leave none: leave `reconstruct` out'),
        ({"kwargs": {"steps": 0}}, '`reconstruct_kwargs`: `reconstruct`: "steps" is 0: it must be at least 1'),
        ({"kwargs": {"window": 0}}, '"window" is 0: it must be at least 1, as in 3'),
        ({"kwargs": {"inputs": "pruned"}}, '"inputs" is "pruned": it must be sparse or dense'),
        ({"kwargs": {"inputs": None}}, 'option "inputs" of `reconstruct` is None: it must be text'),
        ({"kwargs": {"lr": 0.1}}, '`reconstruct` has no option "lr": known are steps, learning_rate'),
        ({"kwargs": {"holdout": 1.0}}, '"holdout" is 1.0: it must be above 0 and below 1'),
        ({"kwargs": {"learning_rate": 2.0}}, '"learning_rate" is 2.0: it must be above 0 and at most 1'),
    ],
    ids=str,
)
def test_refused_options(options, words):
    with pytest.raises(PruningConfigError, match=words):
        run(Linears(2), correlated(32), **options)


def test_refused_runs():
    with pytest.raises(PruningConfigError, match="`reconstruct_kwargs` is .*, but `reconstruct` is off"):
        OneshotConfig(target_sparsity=0.5, reconstruct_kwargs={"steps": 3})
    with pytest.raises(PruningConfigError, match="`reconstruct` needs calibration data"):
        run(Linears(2), None, criterion="magnitude")
    with pytest.raises(PruningConfigError, match="needs two calibration samples or more"):
        run(Linears(2), correlated(1))
    model = Linears(2)
    model.blocks = nn.ModuleDict({"0": nn.Linear(8, 8)})
    model.forward = lambda x: model.blocks["0"](x)
    with pytest.raises(ValueError, match="`reconstruct` needs blocks: leave it out"):
        run(model, correlated(32))
    with torch.inference_mode(), pytest.raises(PruningConfigError, match="prune outside of it"):
        run(Linears(2), correlated(32))
