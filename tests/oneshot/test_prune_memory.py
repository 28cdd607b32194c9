"""Memory holds the statistics and the outputs of one block at a time, whatever the depth of the model."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.oneshot.activation_cache import ActivationCache
from hf_sparse.oneshot.layerwise import LayerPruner
from hf_sparse.statistics import GramMatrix, InputNorms


WIDTH, TOKENS, BATCHES = 12, 7, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Ledger:
    """Counts the statistics and outputs that are alive whenever layers are pruned, without garbage collection."""

    def __init__(self, monkeypatch):
        self.stats, self.outputs = weakref.WeakSet(), weakref.WeakSet()
        self.most_stats = self.most_outputs = self.most_bytes = 0
        for kind in (GramMatrix, InputNorms):
            self._watch(monkeypatch, kind, "__init__", lambda stat, *_: self.stats.add(stat))
        self._watch(monkeypatch, ActivationCache, "__setitem__", self._kept)
        self._watch(monkeypatch, LayerPruner, "prune_layers", lambda *_: self._measure(), before=True)

    def _watch(self, monkeypatch, owner, name, see, before=False):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            if before:
                see(*args)
            result = real(*args, **kwargs)
            if not before:
                see(*args)
            return result

        monkeypatch.setattr(owner, name, watched)

    def _kept(self, activations, index, structure):
        for leaf in activations._entries[index][0]:
            if torch.is_tensor(leaf):
                self.outputs.add(leaf)
        self._measure()

    def _measure(self):
        self.most_stats = max(self.most_stats, sum(stat.total.numel() for stat in self.stats))
        self.most_outputs = max(self.most_outputs, len(self.outputs))


def most(depth, monkeypatch, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(depth)))
    batches = [torch.randn(2, TOKENS, WIDTH) for _ in range(BATCHES)]
    with monkeypatch.context() as patch:
        ledger = Ledger(patch)
        prune_oneshot(model, batches, OneshotConfig(target_sparsity=0.5, **options), progress=False)
    assert not ledger.stats and not ledger.outputs, "something outlives the run"
    return ledger


@pytest.mark.parametrize("forwards", [2, 1])
@pytest.mark.parametrize("solver, one_block", [("none", WIDTH + 2 * WIDTH), ("sparsegpt", WIDTH**2 + 4 * WIDTH**2)])
def test_one_block_at_a_time(solver, one_block, forwards, monkeypatch):
    """A block has a statistic for each of its two inputs, and an output for each batch; one more while the model is
    traced and while a block replaces the outputs of the one before it."""
    found = {depth: most(depth, monkeypatch, solver=solver, forwards=forwards) for depth in (3, 8)}
    for ledger in found.values():
        assert 0 < ledger.most_stats <= one_block
        assert 0 < ledger.most_outputs <= BATCHES + 1
    assert found[3].most_stats == found[8].most_stats and found[3].most_outputs == found[8].most_outputs


@pytest.mark.parametrize("options", [{"allocation": "owl"}, {"scope": "global"}], ids=str)
def test_the_dense_pass_keeps_only_norms(options, monkeypatch):
    """Masks ranked over all layers need the norms of the inputs of all layers, but no Gram matrices and no outputs."""
    ledger = most(6, monkeypatch, **options)
    assert ledger.most_stats <= 2 * 3 * WIDTH and ledger.most_outputs <= BATCHES + 1


def test_on_disk_nothing_is_kept_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    real = ActivationCache.__setitem__

    def watched(self, index, structure):
        real(self, index, structure)
        if self._folder is not None:
            assert not any(torch.is_tensor(leaf) for leaf in self._entries[index][0])
            seen.append(sorted(path.name for path in Path(tmp_path).glob("hf_sparse-*/*")))

    monkeypatch.setattr(ActivationCache, "__setitem__", watched)
    most(4, monkeypatch, activations="disk")
    assert max(seen, key=len) == [f"{index}.safetensors" for index in range(BATCHES)]
    assert not list(tmp_path.iterdir()), "the folder outlives the run"
