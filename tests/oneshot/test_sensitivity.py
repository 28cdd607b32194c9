"""Sensitivities against gradients that autograd gives for each row by itself."""

import pytest
import torch
from helpers.tiny import bert
from helpers.tiny_texts import WORDS, llama

from hf_sparse import OneshotConfig, PruningConfigError, prune_oneshot
from hf_sparse.distributed import get_communicator
from hf_sparse.model.layers import find_layers
from hf_sparse.oneshot.sensitivity import output_sensitivities


def token_ids(rows, length, seed=0):
    return torch.randint(1, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def test_it_is_the_squared_gradient_of_each_output():
    """The outputs of the last layer are those of the block: logits are W·norm(h + y)."""
    model, ids = llama(1), token_ids(3, 5)
    layers = [layer for layer in find_layers(model) if layer.name.endswith("down_proj.weight")]
    found = output_sensitivities(model, layers, [{"input_ids": ids}], get_communicator())
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    expected = 0.0
    for row in ids.split(1):
        hidden = model.model(row, output_hidden_states=True).hidden_states
        y = torch.zeros_like(hidden[0], requires_grad=True)
        handle = model.model.layers[0].register_forward_hook(lambda module, args, output, y=y: output + y)
        model(row).logits.log_softmax(-1).amax(-1).sum().backward()
        handle.remove()
        expected += float(y.grad.square().sum()) / y.shape[-1]
    assert found == pytest.approx({layers[0].name: expected}, rel=1e-4)


def test_neither_batches_nor_padding_matter():
    model = bert()
    layers = find_layers(model)
    ids = torch.randint(1, model.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    whole = output_sensitivities(model, layers, [{"input_ids": ids, "attention_mask": mask}], get_communicator())
    padded = [
        {
            "input_ids": torch.nn.functional.pad(part, (0, 2)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(part), (0, 2)),
        }
        for part in ids.split(1)
    ]
    split = output_sensitivities(model, layers, padded, get_communicator())
    assert split == pytest.approx(whole, rel=1e-3) and min(whole.values()) > 0


def test_a_global_budget_prunes_a_whole_model_exactly():
    batches = [{"input_ids": token_ids(4, 8, seed)} for seed in range(2)]
    model = llama()
    report = prune_oneshot(
        model, batches, OneshotConfig(target_sparsity=0.5, solver="sparsegpt", allocation="global"), progress=False
    )
    zeros, weights = (sum(getattr(layer, name) for layer in report.layers) for name in ("zeros", "weights"))
    assert zeros == round(0.5 * weights)
    assert len({layer.sparsity for layer in report.layers}) > 7


def test_the_allocation_and_the_scope_of_this_name_are_told_apart():
    with pytest.raises(PruningConfigError, match='`allocation` is "global", but `scope` "global" distributes nothing'):
        OneshotConfig(target_sparsity=0.5, allocation="global", scope="global")
