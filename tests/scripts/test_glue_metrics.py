"""GLUE metrics. Expected values are computed by hand, from the confusion counts beside them."""

import math
import sys
import types

import glue_metrics
import pytest

from hf_sparse.evaluation import load_metric_or_fallback


# tp 2, fp 1, fn 1, tn 2
PREDICTIONS, REFERENCES = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
ACCURACY = 4 / 6
F1 = 2 * 2 / (2 * 2 + 1 + 1)
MATTHEWS = (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)
# Deviations from the means 2 and 3: (-1, 0, 1) and (-2, -1, 3), so r = 5 / sqrt(2 * 14); the ranks agree.
SCORES, GRADES = [1.0, 2.0, 3.0], [1.0, 2.0, 6.0]
PEARSON = 5 / math.sqrt(28)

EXPECTED = {
    "cola": {"matthews_correlation": MATTHEWS},
    "mnli": {"accuracy": ACCURACY},
    "mrpc": {"accuracy": ACCURACY, "f1": F1},
    "qnli": {"accuracy": ACCURACY},
    "qqp": {"accuracy": ACCURACY, "f1": F1},
    "rte": {"accuracy": ACCURACY},
    "sst2": {"accuracy": ACCURACY},
    "stsb": {"pearson": PEARSON, "spearmanr": 1.0},
    "wnli": {"accuracy": ACCURACY},
}


@pytest.mark.parametrize("task", sorted(EXPECTED))
def test_every_task_gives_the_figures_worked_out_by_hand(task):
    data = (SCORES, GRADES) if task == "stsb" else (PREDICTIONS, REFERENCES)
    metric = glue_metrics.load_metric(task, is_regression=task == "stsb")
    assert metric(predictions=data[0], references=data[1]) == pytest.approx(EXPECTED[task])


def test_all_nine_tasks_are_there():
    assert sorted(glue_metrics.GLUE_METRICS) == sorted(EXPECTED)


def test_own_data_is_scored_by_accuracy_or_squared_error():
    accuracy, mse = glue_metrics.load_metric(None, False), glue_metrics.load_metric(None, True)
    assert accuracy(predictions=[2, 0], references=[2, 1]) == {"accuracy": 0.5}
    assert mse(predictions=[1.0, 2.0], references=[1.0, 4.0]) == {"mse": 2.0}


def test_f1_is_zero_when_nothing_is_positive():
    assert glue_metrics.accuracy_and_f1([0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_combined_score_is_the_mean_of_several_figures_only():
    assert glue_metrics.with_combined_score({"f1": 0.5, "accuracy": 1.0})["combined_score"] == 0.75
    assert glue_metrics.with_combined_score({"accuracy": 1.0}) == {"accuracy": 1.0}


def online(monkeypatch, load):
    for variable in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, "evaluate", types.SimpleNamespace(load=load))


def test_online_the_evaluate_metric_is_taken(monkeypatch):
    asked = []

    def load(*name, cache_dir):
        asked.append((name, cache_dir))
        return types.SimpleNamespace(compute="the compute method")

    online(monkeypatch, load)
    assert glue_metrics.load_metric("mrpc", False, "somewhere") == "the compute method"
    assert glue_metrics.load_metric(None, True) == "the compute method"
    assert asked == [(("glue", "mrpc"), "somewhere"), (("mse",), None)]


@pytest.mark.parametrize("error", [FileNotFoundError("no module"), ConnectionError("no net"), ImportError("sklearn")])
def test_a_metric_that_cannot_be_loaded_is_replaced_with_a_warning(monkeypatch, caplog, error):
    def load(*name, cache_dir):
        raise error

    online(monkeypatch, load)
    assert glue_metrics.load_metric("cola", False) is glue_metrics.matthews_correlation
    assert "could not load the metric glue cola" in caplog.text
    assert type(error).__name__ in caplog.text


def test_without_evaluate_installed_the_local_function_is_taken(monkeypatch, caplog):
    online(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert glue_metrics.load_metric("sst2", False) is glue_metrics.accuracy


def test_other_errors_are_not_hidden(monkeypatch):
    def load(*name, cache_dir):
        raise RuntimeError("an unrelated error")

    online(monkeypatch, load)
    with pytest.raises(RuntimeError, match="an unrelated error"):
        load_metric_or_fallback(("accuracy",), glue_metrics.accuracy)


def test_offline_evaluate_is_not_asked(monkeypatch, caplog):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "evaluate", types.SimpleNamespace(load=None))
    caplog.set_level("INFO", "hf_sparse.evaluation")
    assert glue_metrics.load_metric("rte", False) is glue_metrics.accuracy
    assert "offline mode" in caplog.text
