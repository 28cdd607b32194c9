"""Arguments of a wrong kind in Python: a clear error before any work."""

import pytest
import torch
from helpers.tiny import bert, make
from torch import nn

from hf_sparse import (
    Criterion,
    OneshotConfig,
    PruningConfig,
    PruningConfigError,
    SparseTrainingArguments,
    prune_oneshot,
    register_criterion,
    register_curve,
    register_scheduler,
)
from hf_sparse.schedulers import Scheduler


@pytest.mark.parametrize("value", [5, True, {"a": 1}, ["x"]], ids=str)
def test_the_name_of_a_recipe_is_text(value, tmp_path):
    for cls in (PruningConfig, OneshotConfig, lambda **options: SparseTrainingArguments(str(tmp_path), **options)):
        with pytest.raises(PruningConfigError, match="^`pruning_config` is .*: it must be the name of a recipe file"):
            cls(pruning_config=value)


@pytest.mark.parametrize("value", [5, None, [("pattern", "2:4")], "2:4"], ids=str)
def test_a_config_is_a_mapping(value):
    with pytest.raises(PruningConfigError, match="a config is a mapping of options to values, but is"):
        PruningConfig.from_dict(value)
    with pytest.raises(TypeError, match="takes a OneshotConfig or a PruningConfig, not"):
        prune_oneshot(bert(), None, value)


@pytest.mark.parametrize("name", [1, None, "", 0.5, ("a",)], ids=str)
def test_names_are_text(name):
    with pytest.raises(PruningConfigError, match="the name of a group must be text"):
        PruningConfig(target_sparsity=0.5, groups={name: {"targets": ["*"]}})
    with pytest.raises(TypeError, match="the name of a sparsity_decay_type must be text"):
        register_curve(name)(lambda t, target: t * target)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1", "channel", "channel:in"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_is_refused(shape, pattern):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(shape[1], shape[0]))
    target = 0.5
    options = {"target_sparsity": target, "pattern": pattern, "criterion": "magnitude"}
    with pytest.raises(
        PruningConfigError, match=r'"1.weight" of shape .* holds no weights: exclude it, as with `exclude=\["1"\]`'
    ):
        prune_oneshot(model, None, OneshotConfig(**options), progress=False)
    report = prune_oneshot(model, None, OneshotConfig(**options, exclude=["1"]), progress=False)
    assert report.zeros == 32


def test_a_layer_without_weights_is_refused_in_training(tmp_path):
    model = bert()
    model.bert.encoder.layer[0].output.empty = nn.Linear(0, 4)
    with pytest.raises(PruningConfigError, match="output.empty.weight.* holds no weights"):
        make(tmp_path, model=model, target_sparsity=0.5).train()


@pytest.mark.parametrize("targets", ["re:(", "re:a{99999999999}", "re:" + "(" * 5_000], ids=["open", "large", "deep"])
def test_a_pattern_that_is_no_regular_expression_is_refused(targets):
    config = OneshotConfig(target_sparsity=0.5, criterion="magnitude", targets=[targets])
    with pytest.raises(PruningConfigError, match="is not a regular expression"):
        prune_oneshot(bert(), None, config, progress=False)


@pytest.mark.parametrize(
    "curve", [lambda t: t, lambda: 0.5, lambda t, target, power: t, lambda *, t, target: t, int, divmod, 0.5]
)
def test_a_curve_of_another_signature_is_refused(curve):
    with pytest.raises(TypeError, match='curve "bent" (is called as|returns)'):
        register_curve("bent")(curve)


@pytest.mark.parametrize("value", ["x", None, float("nan"), float("inf"), torch.tensor(0.5), [0.5]], ids=repr)
def test_a_curve_that_returns_no_number_is_refused(value):
    with pytest.raises(TypeError, match='curve "bent" returns .*: it must return a sparsity, a number'):
        register_curve("bent")(lambda t, target: value)


def test_a_method_of_another_signature_is_refused():
    with pytest.raises(TypeError, match=r'criterion "bent": score is called as score\(weight, statistic\), which it'):

        @register_criterion("bent")
        class Bent(Criterion):
            def score(self, weight):
                return weight

    with pytest.raises(
        TypeError, match=r'scheduler "bent": update_sparsity_ratio is called as update_sparsity_ratio\('
    ):

        @register_scheduler("bent")
        class BentScheduler(Scheduler):
            def update_sparsity_ratio(self, target, step):
                return target
