"""What a pruner refuses before it starts, by name; and its state, which comes back whole or changes nothing."""

import pytest
import torch
from mixed import NAMES, Mixed
from torch import nn

from hf_sparse import Pruner, PruningConfig, PruningConfigError
from hf_sparse.sharding import check_supported


def faults_of(model, **options):
    with pytest.raises(PruningConfigError) as error:
        Pruner(model, PruningConfig(**options))
    return error.value.faults


def odd_model():
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 7))


def test_indivisible_weights_are_refused_all_by_name():
    faults = faults_of(odd_model(), target_sparsity=0.5, pattern="4x1")
    assert len(faults) == 2
    assert faults[0].startswith('pattern "4x1" needs the output size divisible by 4, but "0.weight" has 6 outputs')
    assert '8 inputs. Exclude it with exclude=["0"], set on_indivisible="skip"' in faults[0]
    assert '"2.weight" has 7 outputs and 4 inputs' in faults[1]


def test_indivisible_weights_are_skipped_by_name():
    pruner = Pruner(odd_model(), PruningConfig(pattern="2:4", on_indivisible="skip", criterion="magnitude"))
    assert pruner.skipped == ["1.weight"] and list(pruner.parameters) == ["0.weight", "2.weight"]
    (fault,) = faults_of(odd_model(), target_sparsity=0.5, pattern="9x9", on_indivisible="skip")
    assert fault == 'pattern "9x9" divides none of the 3 selected weights.'


def test_empty_matches_double_claims_and_shapes_are_told_together():
    groups = {
        "a": {"targets": ["0", "1"]},
        "b": {"targets": ["1", "2"], "pattern": "4x1"},
        "c": {"targets": ["encoder"]},
    }
    faults = faults_of(odd_model(), target_sparsity=0.5, groups=groups)
    assert faults[0] == '"1.weight" is claimed by the groups "a" and "b": narrow one.'
    assert faults[1].startswith('group "b": pattern "4x1" needs the output size divisible by 4, but "2.weight"')
    assert faults[2].startswith('group "c": targets: "encoder" matches none of the 3 prunable parameters')
    assert len(faults) == 3
    assert "nothing is left to prune" in faults_of(nn.Embedding(3, 4), target_sparsity=0.5)[0]


def test_frozen_weights_need_a_criterion_without_gradients():
    model = odd_model()
    model[1].weight.requires_grad_(False)
    (fault,) = faults_of(model, target_sparsity=0.5, criterion="snip")
    assert fault.startswith('criterion "snip" needs gradients, but "1.weight" is frozen') and 'exclude=["1"]' in fault
    assert len(faults_of(model, target_sparsity=0.5, criterion="magnitude", regrow=0.1)) == 1
    config = PruningConfig(target_sparsity=0.5, criterion="magnitude", scope="layer")
    assert [layer.zeros for layer in Pruner(model, config).update(1, 1).layers] == [24, 12, 14]


def test_weights_that_are_not_whole_here_are_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    check_supported({"w": weight})
    for attribute, strategy in (("ds_id", "DeepSpeed ZeRO-3"), ("_hp_mapping", "DeepSpeed ZeRO")):
        sharded = nn.Parameter(torch.ones(2, 2))
        setattr(sharded, attribute, 1)
        with pytest.raises(NotImplementedError, match=f'"w" is sharded by {strategy}: pruning needs weights'):
            check_supported({"v": weight, "w": sharded})
    with pytest.raises(NotImplementedError, match="FSDP1"):
        check_supported({"w": nn.Parameter(torch.ones(4))})
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


@pytest.mark.parametrize("criterion", ["magnitude", "random", "snip", "movement", "snip_momentum"])
def test_a_state_that_comes_back_decides_the_same(criterion):
    first = trained(criterion)
    tensors, values = first.state_dict()
    second = resumed(first)
    second.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, values)
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


def damage_bit(tensors, values):
    tensors["mask/conv1d.weight"][0] ^= 1


def drop_mask(tensors, values):
    del tensors["mask/conv1d.weight"]


def add_mask(tensors, values):
    tensors["mask/other.weight"] = tensors["mask/conv1d.weight"]


def shorten_mask(tensors, values):
    tensors["mask/conv1d.weight"] = tensors["mask/conv1d.weight"][:-1]


def drop_sum(tensors, values):
    del tensors["stat/transposed.up"]


def misshape_sum(tensors, values):
    tensors["stat/transposed.up"] = torch.zeros(3)


def drop_counters(tensors, values):
    del values["counters"]["transposed.up"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_bit, "the masks are damaged: their digest is not the one saved with them"),
        (drop_mask, r"masks do not fit the model: missing \['conv1d.weight'\]"),
        (add_mask, r"of no selected weight \['other.weight'\]"),
        (shorten_mask, 'mask of "conv1d.weight" is torch.uint8 of shape'),
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
        second.load_state_dict(tensors, values)
    after_tensors, after_values = second.state_dict()
    assert after_values == before_values and after_tensors.keys() == before_tensors.keys()
    assert all(torch.equal(after_tensors[name], before_tensors[name]) for name in before_tensors)


def test_masks_of_other_weights_are_refused():
    first = trained("magnitude")
    other = Pruner(Mixed(seed=7), first.config)
    with pytest.raises(ValueError, match='the masks belong to other weights: .* pruned weights of "linear.weight"'):
        other.load_state_dict(*first.state_dict())
    assert all(other.masks[name].all() for name in NAMES)
