"""The state of optimizers is found for each weight, wherever a mode keeps it."""

import json

import pytest
import torch
from helpers.modes import MODES, mode_params
from safetensors.torch import load_file
from transformers.optimization import Adafactor

from hf_sparse.distributed import Shard, elementwise_state_keys, optimizer_state


STEP = 3


def states(folder, step):
    """Returns the whole state of each weight, from the parts that all ranks have saved: (name, key) -> tensor."""
    entries = {}
    for path in folder.glob(f"state-{step}-*.safetensors"):
        for label, flat in load_file(path).items():
            name, key, regions = label.split("|")
            for start, stop in json.loads(regions):
                region = tuple(slice(*bounds) for bounds in zip(start, stop, strict=True))
                sizes = [high - low for low, high in zip(start, stop, strict=True)]
                part, flat = flat[: torch.Size(sizes).numel()], flat[torch.Size(sizes).numel() :]
                entries.setdefault((name, key), []).append((region, part.view(sizes)))
    whole = {}
    for label, parts in entries.items():
        shape = [max(region[dim].stop for region, _ in parts) for dim in range(2)]
        whole[label] = torch.full(shape, torch.nan)
        for region, part in parts:
            whole[label][region] = part
    return whole


@pytest.fixture
def run(ranks, tmp_path):
    def run(mode, world=None):
        folder = tmp_path / f"{mode}-{world}"
        folder.mkdir()
        spies = {"state": {"step": STEP, "folder": str(folder)}}
        ranks.run(mode, f"{mode}-state", world=world, trainer="plain", options={"max_steps": STEP + 1}, spies=spies)
        return states(folder, STEP), states(folder, STEP + 1)

    return run


@pytest.mark.parametrize("mode", mode_params())
def test_every_mode_has_the_state_of_one_process(run, mode):
    """And the state is the optimizer's own memory: the moments after a reset differ as they do on one process."""
    base = MODES[mode].exact_as or "single_llama"
    expected = run(base, 1)
    found = run(mode)
    assert {key for _, key in found[0]} == {"exp_avg", "exp_avg_sq"}
    for after, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        assert wanted.keys() == got.keys()
        for label, tensor in wanted.items():
            assert tensor.any() and torch.isfinite(got[label]).all(), label
            if MODES[mode].exact_as:
                assert torch.equal(got[label], tensor), (label, after)
            else:
                torch.testing.assert_close(got[label], tensor, rtol=1e-3, atol=1e-9)


def shards_of(*weights):
    return {str(index): Shard(weight) for index, weight in enumerate(weights)}


@pytest.mark.parametrize(
    ("create", "keys"),
    [
        (lambda weights: torch.optim.AdamW(weights, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda weights: torch.optim.SGD(weights, lr=0.1), set()),
        (lambda weights: torch.optim.RMSprop(weights), {"square_avg"}),
        (lambda weights: Adafactor(weights, lr=0.1, relative_step=False, scale_parameter=False), set()),
    ],
    ids=["amsgrad", "momentum", "sgd", "rmsprop", "adafactor"],
)
def test_only_elementwise_state_is_returned(create, keys):
    weight, unused = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(1))
    optimizer, shards = create([weight, unused]), shards_of(weight, unused)
    assert optimizer_state(optimizer, shards) == {}
    weight.sum().backward()
    optimizer.step()
    found = optimizer_state(optimizer, shards)
    assert set(found.get("0", {})) == keys
    for key, tensor in found.get("0", {}).items():
        assert tensor.data_ptr() == optimizer.state[weight][key].data_ptr()


class Quantized(torch.Tensor):
    """A tensor whose memory holds no plain numbers."""


class Adam8bit(torch.optim.Adam):
    """Quantizes the state of large weights only, as optimizers of 8 bits do."""

    def step(self, closure=None):
        super().step(closure)
        for weight, state in self.state.items():
            if weight.numel() >= 4096:
                state["exp_avg_sq"] = state["exp_avg_sq"].as_subclass(Quantized)


def test_state_that_is_quantized_for_large_weights_only_is_known_before_training():
    weights = [torch.nn.Parameter(torch.ones(2, 3))]
    assert elementwise_state_keys(torch.optim.Adam(weights)) == {"exp_avg", "exp_avg_sq"}
    assert elementwise_state_keys(Adam8bit(weights)) == {"exp_avg"}
