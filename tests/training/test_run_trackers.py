"""What TensorBoard and Weights & Biases show of a run."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers.tiny import SCHEDULE, make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback, WandbCallback

from hf_sparse import SparseTrainer


PRUNING = {"target_sparsity": 0.5, "logging_steps": 5, **SCHEDULE}


class QuietWandb(WandbCallback):
    """`WandbCallback` without Trainer's own logs."""

    def __init__(self):
        pass

    def on_train_begin(self, *args, **kwargs):
        pass

    on_log = on_train_end = on_save = on_predict = on_train_begin


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with both: the trainer, the events of TensorBoard, and what W&B got: its config and its logs."""
    folder, config, sent = tmp_path_factory.mktemp("tracked"), {}, []
    run = SimpleNamespace(
        config=SimpleNamespace(update=lambda values, allow_val_change: config.update(values)), log=sent.append
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        patch.setitem(sys.modules, "wandb", SimpleNamespace(run=run, Image=lambda path: path))
        options = {"callbacks": [TensorBoardCallback(), QuietWandb()]}
        trainer = make(folder / "out", SparseTrainer, trainer_options=options, **PRUNING)
        trainer.train()
    events = EventAccumulator(str(folder / "events"), size_guidance={"images": 0, "tensors": 0}).Reload()
    return SimpleNamespace(trainer=trainer, events=events, config=config, sent=sent)


def test_the_sparsity_of_each_kind_of_layer(tracked):
    report = tracked.trainer.sparsity_callback.pruner.report()
    query = next(layer for layer in report.layers if layer.name.endswith("query.weight"))
    name = "sparsity/attention.self.query"
    found = [(event.step, event.value) for event in tracked.events.Scalars(name)]
    assert [step for step, _ in found] == [5, 10] and found[-1][1] == pytest.approx(query.sparsity)
    assert [log["train/global_step"] for log in tracked.sent if name in log] == [5, 10]
    assert tracked.sent[1][name] == pytest.approx(query.sparsity)
    kinds = {layer.name.removeprefix("bert.encoder.layer.0.").removesuffix(".weight") for layer in report.layers}
    assert {key for key in tracked.sent[0] if key.startswith("sparsity/")} == {f"sparsity/{kind}" for kind in kinds}
    assert not any("sparsity/" in key for log in tracked.trainer.state.log_history for key in log)


def test_the_options_have_the_defaults_that_were_chosen(tracked):
    text = tracked.events.Tensors("pruning/text_summary")[0].tensor_proto.string_val[0].decode()
    options = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert options == tracked.config
    chosen = [options[name] for name in ("criterion", "scope", "scheduler", "target_sparsity", "pattern")]
    assert chosen == ["snip_momentum", "global", "iterative", 0.5, "unstructured"]
    assert options["pruning_schedule"] == {"first_step": 3, "last_step": 8, "prune_steps": 4}
    assert None not in options.values()


def test_the_figures_at_the_end(tracked):
    assert set(tracked.events.Tags()["images"]) == {"pruning/schedule", "pruning/layers"}
    assert set(tracked.sent[-1]) == {"pruning/schedule", "pruning/layers"}


def test_all_that_is_logged_is_a_plain_number(tracked):
    values = [value for log in (*tracked.trainer.state.log_history, *tracked.sent[:2]) for value in log.values()]
    assert {type(value) for value in values} <= {float, int}
