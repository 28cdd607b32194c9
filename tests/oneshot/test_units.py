"""One-shot pruning of coupled units: FFN neurons, attention heads and whole layers."""

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.tiny import bert, samples
from helpers.tiny_texts import WORDS, llama

from hf_sparse import OneshotConfig, PruningConfigError, plan_oneshot, prune_oneshot
from hf_sparse.model.coupling import find_unit_groups
from hf_sparse.solvers.lstsq import LeastSquares
from hf_sparse.statistics import WeightedGram


def token_batches(count=3, rows=4, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(len(WORDS), (rows, length), generator=generator)} for _ in range(count)]


def prune(model, batches, **options):
    return prune_oneshot(model, batches, OneshotConfig(**options), progress=False)


def zero_units(model, kind):
    """The units of each group of which every entry is zero."""
    parameters, found = dict(model.named_parameters()), []
    for group in find_unit_groups(model, kind):
        units = torch.arange(group.num_units)
        is_zero = torch.ones(group.num_units, dtype=torch.bool)
        for part in group.slices:
            tensor = parameters[part.name] if part.expert is None else parameters[part.name][part.expert]
            dim = part.dim - (part.expert is not None)
            rows = tensor.detach().index_select(dim, part.indices(units)).movedim(dim, 0)
            is_zero &= (rows.reshape(group.num_units, -1) == 0).all(1)
        found.append(is_zero)
    return found


BOTH = {
    "neurons": {"pattern": "neuron", "target_sparsity": 0.5},
    "heads": {"pattern": "head", "target_sparsity": 0.5},
}


@pytest.mark.parametrize("forwards", [None, 2])
@pytest.mark.parametrize("criterion", [None, "wanda", "obs", "magnitude", "random"])
def test_neurons_and_heads_are_pruned_together_and_uniformly(criterion, forwards):
    model = llama()
    report = prune(model, token_batches(), groups=BOTH, criterion=criterion, forwards=forwards)
    assert [int(zero.sum()) for zero in zero_units(model, "neuron")] == [16, 16, 16]
    assert [int(zero.sum()) for zero in zero_units(model, "head")] == [1, 1, 1]
    assert report.sparsity == pytest.approx(0.5)
    errors = {layer.name: layer.error for layer in report.layers}
    readers = {name for name, error in errors.items() if error is not None}
    assert readers == {name for name in errors if name.endswith(("down_proj.weight", "o_proj.weight"))}


def test_readers_are_the_least_squares_of_their_own_inputs_and_the_block_before_is_pruned():
    """Block by block, heads before neurons, as one forward prunes; computed again with hooks on a plain model."""
    options = {"groups": BOTH, "criterion": "magnitude"}
    model, batches = llama(), token_batches()
    prune(model, batches, **options)
    expected, ids = llama(), torch.cat([batch["input_ids"] for batch in batches])
    parameters = dict(expected.named_parameters())
    masks = {kind: zero_units(model, kind) for kind in ("neuron", "head")}
    for kind in ("neuron", "head"):
        for group, pruned in zip(find_unit_groups(expected, kind), masks[kind], strict=True):
            (reader,) = group.readers
            module = expected.get_submodule(reader.name.removesuffix(".weight"))

            def solve(module, args, group=group, pruned=pruned, reader=reader):
                gram = WeightedGram(args[0].shape[-1])
                gram.observe_outputs(args[0], args[0] @ module.weight.t())
                mask = (~pruned).repeat_interleave(reader.width).expand(module.weight.shape)
                module.weight.data = LeastSquares().solve(module.weight.data, gram, mask_RC=mask.contiguous())[0]
                for part in group.slices:
                    parameters[part.name].data.index_fill_(part.dim, part.indices(pruned.nonzero()[:, 0]), 0.0)

            module.register_forward_pre_hook(solve)
    with torch.no_grad():
        expected(ids)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, dict(expected.named_parameters())[name], atol=1e-5), name


def test_the_bias_of_a_reading_matrix_is_solved_and_biases_of_units_are_pruned():
    names, model = ("input_ids", "attention_mask"), bert()
    batches = [{name: torch.tensor([row[name]]) for name in names} for row in samples(6)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prune(model, batches, pattern="neuron:1", target_sparsity=0.5)
    for group, pruned in zip(find_unit_groups(model, "neuron"), zero_units(model, "neuron"), strict=True):
        assert int(pruned.sum()) == group.num_units // 2
        (reader,) = group.readers
        bias = reader.name.replace("weight", "bias")
        assert not torch.equal(dict(model.named_parameters())[bias], before[bias])
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert all("intermediate" in name or "output.dense" in name and "attention" not in name for name in changed)


@pytest.mark.parametrize("kind", ["neuron", "head"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_units_of_all_architectures(architecture, kind):
    case = ARCHITECTURES[architecture]
    model, groups = case.model(), find_unit_groups(case.model(), kind)
    if not groups or all(group.num_units == 1 for group in groups):
        pytest.skip("has no such units")
    pattern = "neuron:1" if kind == "neuron" else kind
    prune(model, case.batches(), pattern=pattern, target_sparsity=0.5, on_unreached="magnitude")
    for group, pruned in zip(groups, zero_units(model, kind), strict=True):
        assert int(pruned.sum()) == min(round(group.num_units / 2), group.num_units - 1), group.name
    with torch.no_grad():
        output = model(**case.batches()[0])
    assert all(torch.isfinite(value).all() for value in output.values() if torch.is_tensor(value))


@pytest.mark.parametrize("criterion", ["fluctuation", "obs", "taylor"])
def test_global_scope_ranks_the_units_of_all_layers(criterion):
    model = llama()
    prune(model, token_batches(), pattern="neuron:1", target_sparsity=0.5, scope="global", criterion=criterion)
    counts = [int(zero.sum()) for zero in zero_units(model, "neuron")]
    assert sum(counts) == 48 and max(counts) < 32


def test_gradients_of_unit_masks_are_those_of_their_definition():
    model, batches = llama(), token_batches(count=2, rows=1)
    scores = {}
    for batch in batches:
        masks, handles = {}, []
        for group in find_unit_groups(model, "neuron"):
            masks[group.name] = torch.ones(group.num_units, requires_grad=True)
            module = model.get_submodule(group.readers[0].name.removesuffix(".weight"))
            handles.append(
                module.register_forward_pre_hook(lambda module, args, mask=masks[group.name]: (args[0] * mask,))
            )
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name, mask in masks.items():
            scores[name] = scores.get(name, 0) + mask.grad.square()
        for handle in handles:
            handle.remove()
    model.zero_grad()
    prune(model, batches, pattern="neuron", target_sparsity=0.5, criterion="taylor", solver="none")
    for (name, score), pruned in zip(scores.items(), zero_units(model, "neuron"), strict=True):
        assert set(score.argsort()[:16].tolist()) == set(pruned.nonzero()[:, 0].tolist()), name


def test_whole_layers_by_block_influence():
    model, batches = llama(4), token_batches()
    inputs, influences = {}, {}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda module, args, output, number=number: inputs.setdefault(number, []).append((args[0], output))
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for number, pairs in inputs.items():
        x, y = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        influences[number] = float((1 - torch.cosine_similarity(x, y, dim=-1)).mean())
    model = llama(4)
    prune(model, batches, pattern="layer", target_sparsity=0.5)
    pruned = [number for number, zero in enumerate(zero_units(model, "layer")) if zero.all()]
    assert pruned == sorted(sorted(influences, key=influences.__getitem__)[:2])


def test_an_interrupted_run_continues(tmp_path):
    options = {"groups": BOTH, "criterion": "fluctuation"}
    whole, again = llama(), llama()
    prune_oneshot(whole, token_batches(), OneshotConfig(**options), state_dir=tmp_path, progress=False)
    files = sorted(tmp_path.iterdir())
    files[-1].unlink()
    prune_oneshot(again, token_batches(), OneshotConfig(**options), state_dir=tmp_path, progress=False)
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_zeros_are_kept_and_count():
    model = llama()
    prune(model, token_batches(), pattern="neuron", target_sparsity=0.25)
    before = [zero.clone() for zero in zero_units(model, "neuron")]
    prune(model, token_batches(), pattern="neuron", target_sparsity=0.5, keep_zeros=True)
    for old, new in zip(before, zero_units(model, "neuron"), strict=True):
        assert int(new.sum()) == 16 and (new | ~old).all()


def test_the_plan_counts_units():
    plan = plan_oneshot(llama(), token_batches(), OneshotConfig(groups=BOTH))
    units = {layer.name.split(".")[-2]: (layer.num_units, layer.num_pruned) for layer in plan.layers}
    assert units["down_proj"] == units["gate_proj"] == (32, 16) and units["o_proj"] == units["k_proj"] == (2, 1)
    assert plan.costs.statistics_bytes > 0 and plan.costs.seconds > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"criterion": "fluctuation"}, '`criterion` "fluctuation" scores neurons and heads, not units of `pattern`'),
        ({"criterion": "obs"}, '`criterion` "obs" scores neurons and heads'),
        ({"criterion": "block_influence"}, '`criterion` "block_influence" scores whole layers'),
        ({"solver": "lstsq"}, '`solver` "lstsq" updates weights of which whole columns are pruned'),
        ({"pattern": "layer", "criterion": "wanda"}, '`criterion` "wanda" scores the inputs of single weights'),
        ({"pattern": "layer", "solver": "lstsq"}, '`pattern` "layer" leaves none: use `solver="none"`'),
        ({"pattern": "neuron", "allocation": "owl"}, '`allocation` "owl" is of weights by themselves'),
    ],
)
def test_methods_of_other_units_are_refused(options, message):
    with pytest.raises(PruningConfigError, match=message):
        OneshotConfig(target_sparsity=0.5, **options)
