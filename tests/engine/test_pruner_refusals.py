"""Configs that a pruner refuses at the start, with names of weights; its state, restored completely or not at all."""

import pytest
import torch
from helpers.mixed import NAMES, Mixed
from torch import nn

from hf_sparse import Pruner, PruningConfig, PruningConfigError
from hf_sparse.distributed import build_shards


def errors_of(model, **options):
    with pytest.raises(PruningConfigError) as error:
        Pruner(model, PruningConfig(**options))
    return error.value.errors


def odd_model():
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 7))


def test_indivisible_weights_are_refused_all_by_name():
    errors = errors_of(odd_model(), target_sparsity=0.5, pattern="4x1")
    assert len(errors) == 2
    assert errors[0].startswith('`pattern` "4x1" needs the output size divisible by 4, but "0.weight" has 6 outputs')
    assert '8 inputs. Exclude it with `exclude=["0"]`, set `on_indivisible="skip"`' in errors[0]
    assert '"2.weight" has 7 outputs and 4 inputs' in errors[1]


def test_indivisible_weights_are_skipped_by_name():
    pruner = Pruner(odd_model(), PruningConfig(pattern="2:4", on_indivisible="skip", criterion="magnitude"))
    assert pruner.skipped == ["1.weight"] and list(pruner.parameters) == ["0.weight", "2.weight"]
    (error,) = errors_of(odd_model(), target_sparsity=0.5, pattern="9x9", on_indivisible="skip")
    assert error == '`pattern` "9x9" divides none of the 3 selected weights.'


def test_empty_targets_overlapping_groups_and_shapes_are_reported_together():
    groups = {
        "a": {"targets": ["0", "1"]},
        "b": {"targets": ["1", "2"], "pattern": "4x1"},
        "c": {"targets": ["encoder"]},
    }
    errors = errors_of(odd_model(), target_sparsity=0.5, groups=groups)
    assert errors[0] == '"1.weight" is in the groups "a" and "b": narrow one.'
    assert errors[1].startswith('group "b": `pattern` "4x1" needs the output size divisible by 4, but "2.weight"')
    assert errors[2].startswith('group "c": `targets`: "encoder" matches none of the 3 prunable parameters')
    assert len(errors) == 3
    assert "nothing is left to prune" in errors_of(nn.Embedding(3, 4), target_sparsity=0.5)[0]


def test_frozen_weights_need_a_criterion_without_gradients():
    model = odd_model()
    model[1].weight.requires_grad_(False)
    (error,) = errors_of(model, target_sparsity=0.5, criterion="snip")
    assert (
        error.startswith('`criterion` "snip" needs gradients, but "1.weight" is frozen') and 'exclude=["1"]' in error
    )
    (error,) = errors_of(model, target_sparsity=0.5, algorithm="rigl")
    assert error.startswith('`algorithm` "rigl" needs gradients, but "1.weight" is frozen') and "gradual" in error
    assert Pruner(model, PruningConfig(target_sparsity=0.5, algorithm="set"))
    config = PruningConfig(target_sparsity=0.5, criterion="magnitude", scope="layer")
    assert [layer.zeros for layer in Pruner(model, config).update(1, 1).layers] == [24, 12, 14]


def test_unsupported_parameters_are_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    shards, communicator = build_shards({"w": weight})
    assert communicator.world_size == 1 and shards["w"].tensor.data_ptr() == weight.data_ptr()
    flattened = nn.Parameter(torch.ones(4))
    flattened._fsdp_flattened = True
    with pytest.raises(NotImplementedError, match='"w" cannot be pruned: it is flattened by FSDP version 1: set'):
        build_shards({"v": weight, "w": flattened})
    with pytest.raises(NotImplementedError, match="meta device"):
        Pruner(nn.Linear(2, 2, device="meta"), PruningConfig(target_sparsity=0.5))


def trained(criterion, **options):
    pruner = Pruner(Mixed(), PruningConfig(target_sparsity=0.75, criterion=criterion, **options))
    for step in (1, 2):
        pruner.model.fake_gradients(step)
        pruner.observe()
        pruner.update(step, 4)
    pruner.model.fake_gradients(3)
    pruner.observe()
    return pruner


def resumed(pruner):
    other = Pruner(Mixed(seed=7), pruner.config)
    other.model.load_state_dict(pruner.model.state_dict())
    return other


@pytest.mark.parametrize(
    "criterion", ["magnitude", "random", "snip", "greedy_movement", "snip_momentum", "obert", "mfac"]
)
def test_a_restored_pruner_makes_the_same_decisions(criterion):
    first = trained(criterion)
    tensors, values = first.state_dict()
    second = resumed(first)
    second.load_state_dict(({name: tensor.clone() for name, tensor in tensors.items()}, values))
    assert second.masks.digest() == first.masks.digest()
    for pruner in (first, second):
        for step in (3, 4):
            pruner.model.fake_gradients(step + 1)
            pruner.observe()
            pruner.update(step, 4)
    assert second.masks.digest() == first.masks.digest()
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in NAMES)
    left, right = first.state_dict(), second.state_dict()
    assert left[1] == right[1] and all(torch.equal(left[0][name], right[0][name]) for name in left[0])


def prune_one_more(tensors, values):
    mask = tensors["mask/conv1d.weight"]
    first = int(mask.nonzero()[0])
    mask[first] &= mask[first] - 1


def drop_mask(tensors, values):
    del tensors["mask/conv1d.weight"]


def shorten_mask(tensors, values):
    tensors["mask/conv1d.weight"] = tensors["mask/conv1d.weight"][:-1]


def drop_sum(tensors, values):
    del tensors["stat/transposed.up"]


def misshape_sum(tensors, values):
    tensors["stat/transposed.up"] = torch.zeros(3)


def test_a_missing_gradient_of_a_history_is_refused():
    first = trained("obert")
    tensors, values = first.state_dict()
    assert tensors["gradient2/experts.up"].dtype == torch.bfloat16
    for damaged, message in (
        ({name: tensor for name, tensor in tensors.items() if name != "gradient2/experts.up"}, "missing or misshapen"),
        (tensors | {"gradient2/experts.up": torch.zeros(2, 4, 8)}, "torch.float32 instead of torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=f'"gradient2" of "experts.up" .*{message}'):
            resumed(first).load_state_dict((damaged, values))


def drop_counters(tensors, values):
    del values["counters"]["transposed.up"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (prune_one_more, 'the masks belong to other weights: 1 of the pruned weights of "conv1d.weight" are not zero'),
        (drop_mask, 'the mask of "conv1d.weight" is missing or misshapen'),
        (shorten_mask, 'the mask of "conv1d.weight" is missing or misshapen: a mask is torch.uint8 of shape'),
        (drop_sum, 'the scores of "transposed.up" are missing or misshapen'),
        (misshape_sum, 'the scores of "transposed.up" are missing or misshapen'),
        (drop_counters, 'the scores of "transposed.up" are missing or misshapen'),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_state_is_refused_and_nothing_changes(damage, message):
    first = trained("snip_momentum")
    tensors, values = first.state_dict()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second = resumed(first)  # nothing pruned or observed yet
    before_tensors, before_values = second.state_dict()
    before_tensors = {name: tensor.clone() for name, tensor in before_tensors.items()}
    damage(tensors, values)
    with pytest.raises(ValueError, match=message):
        second.load_state_dict((tensors, values))
    after_tensors, after_values = second.state_dict()
    assert after_values == before_values and after_tensors.keys() == before_tensors.keys()
    assert all(torch.equal(after_tensors[name], before_tensors[name]) for name in before_tensors)


def test_masks_of_other_weights_are_refused():
    first = trained("magnitude")
    other = Pruner(Mixed(seed=7), first.config)
    with pytest.raises(ValueError, match='the masks belong to other weights: .* pruned weights of "linear.weight"'):
        other.load_state_dict(first.state_dict())
    assert all(other.masks[name].all() for name in NAMES)
