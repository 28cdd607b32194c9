"""Patterns: small masks drawn by hand, and text forms."""

import pytest
import torch

from hf_sparse import Pruner, PruningConfig
from hf_sparse.patterns import get_pattern
from hf_sparse.patterns.block import Block
from hf_sparse.patterns.channel import Channel, ChannelIn
from hf_sparse.patterns.n_of_m import NOfM
from hf_sparse.patterns.unstructured import Unstructured


WEIGHT = [
    [9.0, 1.0, 4.0, 2.0],
    [8.0, 2.0, 3.0, 9.0],
    [1.0, 7.0, 1.0, 1.0],
    [1.0, 9.0, 2.0, 9.0],
]

# Half of the units are pruned; # is kept.
DRAWINGS = {
    # all five 1s and all three 2s
    ("unstructured", "layer"): "#.#. #.## .#.. .#.#",
    # the two lowest of each row; in the third, of three 1s the first two
    ("unstructured", "row"): "#.#. #..# .#.# .#.#",
    ("2:4", "layer"): "#.#. #..# .#.# .#.#",
    # means 8.5 1.5 3.5 5.5 over 1 8 1.5 5
    ("2x1", "layer"): "#..# #..# .#.# .#.#",
    # means 5 4.5 over 4.5 3.25; of the equal ones the first
    ("2x2", "layer"): "##.. ##.. ##.. ##..",
    # means 4 5.5 2.5 5.25
    ("channel", "layer"): ".... #### .... ####",
    # sums 19 19 10 21; of the equal ones the first
    ("channel:in", "layer"): ".#.# .#.# .#.# .#.#",
}


@pytest.mark.parametrize("pattern, scope", DRAWINGS)
def test_masks_drawn_by_hand(pattern, scope):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(WEIGHT))
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, pattern=pattern, scope=scope, criterion="magnitude"))
    pruner.update(1, 1)
    rows = ["".join("#" if kept else "." for kept in row) for row in pruner.masks["0.weight"]]
    assert " ".join(rows) == DRAWINGS[pattern, scope]


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("unstructured", Unstructured()),
        ("2:4", NOfM(2, 4)),
        ("10:16", NOfM(10, 16)),
        ("4x1", Block(4, 1)),
        ("16x32", Block(16, 32)),
        ("channel", Channel()),
        ("channel:out", Channel()),
        ("channel:in", ChannelIn()),
    ],
)
def test_text_forms(text, pattern):
    assert get_pattern(text) == pattern


@pytest.mark.parametrize(
    "text, message",
    [
        ("4:2", r'`pattern` "4:2" keeps 4 of every 2: it needs 1 <= N < M, as in 2:4'),
        ("0:4", r'`pattern` "0:4" keeps 0 of every 4'),
        ("4:4", r'`pattern` "4:4" keeps 4 of every 4'),
        ("0x4", r'`pattern` "0x4" needs both sides at least 1'),
        ("2:4 ", r'unknown pattern "2:4 ": known are 4x1 \(block\), .* Did you mean "2:4"'),
        ("chanel", r'unknown pattern "chanel": .* Did you mean "channel"'),
        ("-1:4", r'unknown pattern "-1:4"'),
    ],
)
def test_malformed_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        get_pattern(text)


def test_implied_and_largest_sparsity():
    assert [get_pattern(text).implied_sparsity for text in ("2:4", "1:4", "4x1", "channel")] == [0.5, 0.75, None, None]
    assert [get_pattern(text).max_sparsity for text in ("2:4", "1:4", "unstructured")] == [0.5, 0.75, 1.0]


def test_n_of_m_leaves_nan_scores_for_the_ranking_to_refuse():
    scores = torch.tensor([[[float("nan"), 1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0, float("nan")]]])
    assert torch.isnan(NOfM(2, 4).pool(scores)).any(dim=2).all()
