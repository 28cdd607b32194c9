"""A plan says what the run then does and changes nothing; its memory is that computed by hand."""

import copy
import dataclasses

import pytest
import torch
from helpers.tiny_texts import WORDS, llama

from hf_sparse import OneshotConfig, PruningConfigError, plan_oneshot, prune_oneshot
from hf_sparse.oneshot import costs
from hf_sparse.oneshot.prepare import prepare_run
from hf_sparse.solvers.none import NoUpdate
from hf_sparse.solvers.sparsegpt import SparseGPT


BATCHES = [
    {"input_ids": torch.randint(len(WORDS), (4, 8), generator=torch.Generator().manual_seed(seed))}
    for seed in range(6)
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_sparsity": 0.3},
        {"pattern": "2:4", "solver": "sparsegpt"},
        {"pattern": "4x1", "criterion": "magnitude", "scope": "layer", "target_sparsity": 0.5},
        {"layer_sparsity": {"*.q_proj": 0.25, "*.mlp.*": 0.75}},
        {"target_sparsity": 0.5, "forwards": 1},
        {"target_sparsity": 0.5, "sequential": False},
        {"target_sparsity": 0.5, "reconstruct": True, "reconstruct_kwargs": {"steps": 3}},
    ],
)
def test_a_run_does_what_was_planned(options):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    plan = plan_oneshot(model, BATCHES, OneshotConfig(**options))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    report = prune_oneshot(model, BATCHES, OneshotConfig(**options), progress=False)
    size = 4 if options.get("pattern") == "4x1" else 1
    assert [(layer.name, layer.num_pruned * size) for layer in plan.layers] == [
        (layer.name, layer.zeros) for layer in report.layers
    ]
    assert plan.num_tokens == 6 * 4 * 8


def test_subgraphs():
    plan = plan_oneshot(llama(), BATCHES, OneshotConfig(target_sparsity=0.5))
    assert plan.num_subgraphs == 3 and {layer.subgraph for layer in plan.layers} == {
        f"model.layers.{n}" for n in range(3)
    }
    assert plan_oneshot(llama(), BATCHES, OneshotConfig(target_sparsity=0.5, sequential=False)).num_subgraphs == 1
    unseen = plan_oneshot(llama(), None, OneshotConfig(target_sparsity=0.5, criterion="magnitude", scope="layer"))
    assert (
        unseen.num_subgraphs
        == unseen.num_tokens
        == unseen.costs.activation_bytes
        == unseen.costs.statistics_bytes
        == 0
    )
    assert {layer.subgraph for layer in unseen.layers} == {None}


@pytest.mark.parametrize("options", [{"allocation": "owl"}, {"criterion": "taylor", "scope": "global"}])
def test_counts_that_are_decided_during_the_run_are_none(options):
    plan = plan_oneshot(llama(), BATCHES, OneshotConfig(target_sparsity=0.5, **options))
    assert {layer.num_pruned for layer in plan.layers} == {None} and "ranked" in str(plan)


def test_locked_zeros_are_counted():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:3] = 0
    groups = {"pruned": {"targets": ["*.1.mlp.down_proj"], "target_sparsity": 0.5}, "kept": {"targets": ["*.up_proj"]}}
    plan = plan_oneshot(model, BATCHES, OneshotConfig(keep_zeros=True, groups=groups))
    assert [(layer.group, layer.num_pruned) for layer in plan.layers] == [
        ("pruned", 256),
        ("kept", 0),
        ("kept", 3 * 16),
        ("kept", 0),
    ]


def test_memory_by_hand():
    """A block of 16 wide, 32 within: q, k, v and o are 16x16, gate and up 32x16, down 16x32, two norms of 16. Inputs:
    that of q, k and v; of o; of gate and up, 16 wide each; of down, 32 wide. 128 tokens of each are sampled."""
    sample = 128 * (3 * 16 + 32)
    block = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    outputs = 4 * (6 * 4 * 8 * 16)

    def memory(**options):
        found = plan_oneshot(llama(), BATCHES, OneshotConfig(target_sparsity=0.5, **options)).costs
        return found.block_bytes, found.statistics_bytes, found.solver_bytes, found.activation_bytes

    # Norms are a vector each; masks of gate and up take a byte as they are chosen, and another as bool.
    assert memory() == (block, 4 * (3 * 16 + 32 + sample), 2 * 16 * 64, outputs)
    # Gram matrices; down has the largest factor: it and its source, and weights before and after.
    assert memory(solver="sparsegpt") == (
        block,
        4 * (3 * 16 * 16 + 32 * 32 + sample),
        max(8 * (32 * 32 + 32 * 16), 8 * (16 * 16 + 16 * 64)),
        outputs,
    )
    # Gradients of all parameters, sums and masks of 3 blocks' matrices.
    model, matrices = llama(), 3 * (4 * 16 * 16 + 3 * 16 * 32)
    found = plan_oneshot(model, BATCHES, OneshotConfig(target_sparsity=0.5, criterion="taylor", scope="global")).costs
    assert found.model_wide_bytes == 4 * model.num_parameters() + 4 * matrices + 2 * matrices
    assert (found.statistics_bytes, found.activation_bytes) == (0, 0)
    # One input at a time.
    assert memory(forwards=1)[1] == 4 * (32 + 128 * 32)


def test_reconstruction_by_hand():
    """Gradients, two moments, and the weights at the start and the best ones of all 2,592 parameters of each of two
    blocks, and masks of their matrices; activations are those of the pruned and of the dense model."""
    kwargs = {"steps": 20, "samples": 7, "learning_rate": 0.01, "window": 2}
    options = {"reconstruct": True, "reconstruct_kwargs": kwargs}
    plain = plan_oneshot(llama(), BATCHES, OneshotConfig(target_sparsity=0.5)).costs
    found = plan_oneshot(llama(), BATCHES, OneshotConfig(target_sparsity=0.5, **options)).costs
    matrices = 4 * 16 * 16 + 3 * 16 * 32
    assert found.reconstruction_bytes == 2 * (5 * 4 * (matrices + 2 * 16) + matrices)
    assert found.activation_bytes == 2 * plain.activation_bytes
    for window, kept in ((1, 1), (2, 2), (5, 2)):  # the first of three blocks has no cached inputs
        chosen = options | {"reconstruct_kwargs": {"inputs": "dense", "window": window}}
        dense = plan_oneshot(llama(), BATCHES, OneshotConfig(target_sparsity=0.5, **chosen)).costs
        assert dense.activation_bytes == (2 + kept) * plain.activation_bytes
    assert found.seconds > found.reconstruction_seconds > 0
    assert "reconstruction 108.8 kB" in str(found) and "pruning" in str(found).split("reconstruction")[1]
    assert "reconstruction" not in str(plain)
    half = plan_oneshot(llama().bfloat16(), BATCHES, OneshotConfig(target_sparsity=0.5, **options)).costs
    assert half.reconstruction_bytes == 2 * ((4 * 4 + 2 * 2) * (matrices + 2 * 16) + matrices)
    # 21 of 24 samples are tuned with, in three steps of seven; the error on the other three is measured 11 times.
    run = prepare_run(llama(), BATCHES, OneshotConfig(target_sparsity=0.5, **options))
    dense = 3.0 + 3 * 1.0
    first = 20 * 0.875 / 3 * (3 * 1.0 + 1.0) + 11 * 0.125 * (1.0 + 1.0)
    others = 20 * 0.875 / 3 * (3 * 2.0 + 1.0) + 11 * 0.125 * (2.0 + 1.0) + 2 * 1.0  # with the block before
    assert costs._tuning_seconds(run, run.trace(), 3.0, 1.0) == pytest.approx(dense + first + 2 * others)


def test_time_grows_with_the_data_and_the_forwards():
    """Computed from the seconds of the blocks and of what is before them."""
    run = prepare_run(llama(), BATCHES, OneshotConfig(target_sparsity=0.5))
    trace = run.trace()
    # Three blocks: two of them twice, the last once; five times up to the first block.
    assert costs._forward_seconds(run, trace, 3.0, 1.0) == pytest.approx(5 * 1.0 + 5 * 1.0)
    run = dataclasses.replace(run, single_forward=True)
    assert costs._forward_seconds(run, trace, 3.0, 1.0) == pytest.approx(3.0 + 3 * 1.0)
    small, large = (costs._SharedInput("block", 64, 32, gram=True).operations(tokens) for tokens in (1000, 3000))
    assert large[0] == 3 * small[0] == 3 * 1000 * 64 * 64 and large[1] == small[1]


def test_the_operations_of_a_solver_are_counted_once_per_input(monkeypatch):
    """Query, key and value share a factor, and so do gate and up; the other two have their own."""
    monkeypatch.setattr(SparseGPT, "factor_operations", lambda self, columns: 1e6 * columns)
    monkeypatch.setattr(SparseGPT, "operations", lambda self, rows, columns: 1e9 * rows)
    shapes = [(3 * 16, 16), (16, 16), (2 * 32, 16), (16, 32)]
    for solver, factors in ((SparseGPT(), 1), (NoUpdate(), 0)):
        run = prepare_run(llama(1), BATCHES, OneshotConfig(target_sparsity=0.5, solver=solver, criterion="wanda"))
        found = [shared.operations(0)[1] for shared in costs._shared_inputs(run, run.trace())]
        ranking = [costs.RANKING_OPERATIONS * rows * columns for rows, columns in shapes]
        solving = [factors * (1e6 * columns + 1e9 * rows) for rows, columns in shapes]
        assert found == [sum(both) for both in zip(ranking, solving, strict=True)]


def test_the_operations_of_swaps_are_counted_for_each_row_and_no_more_than_a_row_has():
    shapes = [(3 * 16, 16), (16, 16), (2 * 32, 16), (16, 32)]
    for swaps, most in ((1, 1), (100, 2)):
        config = OneshotConfig(target_sparsity=0.5, criterion="magnitude", scope="layer", swaps=swaps)
        run = prepare_run(llama(1), BATCHES, config)
        found = [shared.operations(0)[1] for shared in costs._shared_inputs(run, run.trace())]
        rounds = [min(most, columns // costs._INPUTS_PER_SWAP) for _, columns in shapes]
        expected = [costs.RANKING_OPERATIONS + costs._SWAP_OPERATIONS * number for number in rounds]
        assert found == [rows * columns * each for (rows, columns), each in zip(shapes, expected, strict=True)]


def test_a_plan_raises_the_errors_of_a_run():
    with pytest.raises(PruningConfigError, match='`criterion` "wanda" needs calibration data'):
        plan_oneshot(llama(), None, OneshotConfig(target_sparsity=0.5))


def test_the_printed_plan():
    lines = str(plan_oneshot(llama(1), BATCHES, OneshotConfig(target_sparsity=0.5))).splitlines()
    assert lines[1].split() == [
        "model.layers.0.self_attn.q_proj.weight",
        "16x16",
        "unstructured",
        "model.layers.0",
        "256",
        "128",
    ]
    assert lines[-5:-3] == ["", "criterion wanda, scope row, allocation uniform, solver none"]
    assert lines[-3] == "layers: 7 with 2,560 weights; blocks: 1; calibration tokens: 192"
    assert lines[-2].startswith(
        "memory: largest block 10.4 kB, its statistics 41.3 kB, solver 2.0 kB, activations 12.3 kB on cpu"
    )
    assert lines[-1].startswith("time: about ")
    (group,) = OneshotConfig(target_sparsity=0.5, quality="best").resolve_groups().values()
    chosen = f"scope layer, allocation {group.allocation_name}, solver {group.solver_name}, reconstruct"
    plan = plan_oneshot(llama(1), BATCHES, OneshotConfig(target_sparsity=0.5, quality="best"))
    assert plan.methods == (f"quality best: {chosen}",)


@pytest.mark.parametrize("option", [{"sequential": False}, {"forwards": 1}, {"activations": "disk"}], ids=str)
def test_options_of_the_data_need_a_method_that_observes_inputs(option):
    (name,) = option
    config = OneshotConfig(target_sparsity=0.5, criterion="magnitude", **option)
    with pytest.raises(
        PruningConfigError, match=f"^`{name}` has no effect, because no method that was chosen observes"
    ):
        prepare_run(llama(1), BATCHES, config)
