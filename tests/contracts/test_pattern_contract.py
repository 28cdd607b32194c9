"""The contract of every registered pattern of one matrix, on matrices (R, P, C). Coupled patterns, whose units are in
several parameters, are in `test_coupled_contract`."""

import pytest
import torch

from hf_sparse import Pruner, PruningConfig
from hf_sparse.patterns import PATTERNS, get_pattern


# The example of each pattern, and relatives of those that take numbers.
MATRIX_PATTERNS = [PATTERNS[name] for name in PATTERNS.names() if PATTERNS[name].coupled_kind is None]
EXAMPLES = sorted({pattern.example for pattern in MATRIX_PATTERNS} | {"1:4", "3:4", "4:8", "2x2", "1x4", "1x1"})
SHAPE = (8, 3, 16)


def kept_units(pattern, mask):
    return pattern.pool(mask.float()) > 0


@pytest.mark.parametrize("text", EXAMPLES)
def test_expand_is_the_inverse_of_pool(text):
    pattern = get_pattern(text)
    assert pattern == get_pattern(text) and pattern.check(SHAPE[0], SHAPE[2]) is None
    units = torch.Size(pattern.unit_shape(SHAPE))
    assert torch.Size(SHAPE).numel() % units.numel() == 0
    keep = torch.rand(units, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = pattern.expand(keep, SHAPE).expand(SHAPE)
    assert mask.dtype == torch.bool
    if pattern.max_sparsity == 1:
        scores = pattern.pool(mask.float())
        assert scores.shape == units and torch.equal(scores, keep.float())
    share = torch.count_nonzero(mask) / mask.numel()
    assert share == torch.count_nonzero(keep) / keep.numel()


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_unit_scores_the_same_bit_for_bit_in_a_part_of_the_weight_and_in_any_layout(text):
    """A rank with a part of a weight, down to one row of units, must decide as a rank with all of it."""
    pattern = get_pattern(text)
    scores = torch.randn(24, 3, 48, generator=torch.Generator().manual_seed(0)).exp()
    whole = pattern.pool(scores.clone())
    high = pattern.unit_rows(24)
    for rows in {high, 24} if high == 24 else (high, 2 * high, 24 - high):
        part = scores[:rows]
        for layout in (part, part.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
            assert torch.equal(pattern.pool(layout.clone(memory_format=torch.preserve_format)), whole[: rows // high])


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_score_of_a_unit_is_the_mean_of_its_weights(text):
    pattern = get_pattern(text)
    scores = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    pooled = pattern.pool(scores)
    assert torch.equal(scores, before)
    spread = pattern.expand(torch.arange(pooled.numel()).view(pooled.shape) if pooled.ndim else pooled, SHAPE)
    for unit in (0, pooled.numel() // 2, pooled.numel() - 1):
        score = pooled.reshape(-1)[unit]
        if torch.isfinite(score):
            assert torch.isclose(score, before[spread.expand(SHAPE) == unit].mean(), atol=1e-6)


@pytest.mark.parametrize("text", EXAMPLES)
def test_row_blocks_pool_as_the_whole_matrix(text):
    pattern = get_pattern(text)
    scores = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    high = pattern.unit_rows(SHAPE[0])
    row_blocks = [pattern.pool(part) for part in scores.split(high)]
    assert torch.equal(torch.cat(row_blocks), pattern.pool(scores))


def model_with(values):
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(values)
    return model


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
@pytest.mark.parametrize("text", EXAMPLES)
def test_exactly_the_scheduled_number_of_units_is_pruned(text, kind):
    pattern = get_pattern(text)
    generator = torch.Generator().manual_seed(0)
    values = {
        "normal": torch.randn(8, 16, generator=generator),
        "ties": torch.randint(1, 3, (8, 16), generator=generator).float(),
        "constant": torch.ones(8, 16),
    }[kind]
    total = torch.Size(pattern.unit_shape((8, 1, 16))).numel()
    target = pattern.implied_sparsity or 0.9
    config = PruningConfig(target_sparsity=target, pattern=text, scope="layer", criterion="magnitude")
    pruner = Pruner(model_with(values), config)
    for step in range(1, 6):
        pruner.update(step, 5)
        units = kept_units(pattern, pruner.masks["0.weight"][:, None, :])
        if pattern.max_sparsity < 1:  # the pattern protects units: count weights, which are its units
            units = pruner.masks["0.weight"]
        assert torch.count_nonzero(~units) == round(pruner.scheduled(step, 5) * total)


@pytest.mark.parametrize("text", EXAMPLES)
def test_target_0_prunes_nothing(text):
    model = model_with(torch.ones(8, 16))
    assert Pruner(model, PruningConfig(target_sparsity=0.0, pattern=text)).update(1, 1).zeros == 0


@pytest.mark.parametrize("text", [text for text in EXAMPLES if get_pattern(text).implied_sparsity is not None])
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_n_of_m_holds_in_every_group_with_and_without_ties(text, scope):
    keep, of = map(int, text.split(":"))
    for values in (torch.ones(8, 16), torch.randn(8, 16), torch.randint(1, 3, (8, 16)).float()):
        pruner = Pruner(model_with(values), PruningConfig(pattern=text, scope=scope, criterion="magnitude"))
        for step in range(1, 4):
            pruner.update(step, 3)
            assert (pruner.masks["0.weight"].view(-1, of).sum(1) >= keep).all()
        assert (pruner.masks["0.weight"].view(-1, of).sum(1) == keep).all()


@pytest.mark.parametrize("text", EXAMPLES)
def test_check_refuses_shapes_that_the_pattern_does_not_divide(text):
    """A weight of 7 by 13 is not divisible by any pattern with a side above 1."""
    pattern = get_pattern(text)
    problem = pattern.check(7, 13)
    divides = text in ("unstructured", "1x1") or text.startswith("channel")
    assert (problem is None) == divides
    assert divides or (text in problem and "divisible by" in problem)
