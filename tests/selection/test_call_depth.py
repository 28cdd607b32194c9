"""A prune step reaches the score of a criterion through few calls, so that its path can be read."""

import inspect

import pytest
from helpers.mixed import Mixed

from hf_sparse import Criterion, Pruner, PruningConfig, register_criterion


MAX_FRAMES = 8


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("options", [{}, {"pattern": "4x1"}, {"max_sparsity_per_layer": 0.6}])
def test_few_frames_lie_between_update_and_score(scope, options):
    paths = []

    @register_criterion("stack_depth")
    class StackDepth(Criterion):
        def score(self, weight, statistic):
            names = [frame.function for frame in inspect.stack()]
            paths.append(names[: names.index("update") + 1])
            return weight.detach().float().abs()

    config = PruningConfig(target_sparsity=0.5, criterion="stack_depth", scope=scope, **options)
    Pruner(Mixed(), config).update(1, 1)
    longest = max(paths, key=len)
    assert len(longest) <= MAX_FRAMES, longest
