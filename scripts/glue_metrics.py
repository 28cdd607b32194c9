"""The GLUE metrics: from the evaluate library, or from the functions below if it cannot load them.

Both have the same keys. `evaluate.load` downloads a small module from the Hub the first time, which fails without a
network; the functions below need scikit-learn and scipy only.
"""

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from hf_sparse.evaluation import Metric, accuracy, load_metric_or_fallback


def accuracy_and_f1(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 = 2 tp / (2 tp + fp + fn) of label 1."""
    return accuracy(predictions, references) | {"f1": float(f1_score(references, predictions, zero_division=0.0))}


def matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """(tp tn - fp fn) / sqrt((tp+fp) (tp+fn) (tn+fp) (tn+fn)); 0 where a factor is 0."""
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def pearson_and_spearman(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Pearson correlation of the values and Spearman correlation of their ranks."""
    return {
        "pearson": float(pearsonr(predictions, references)[0]),
        "spearmanr": float(spearmanr(predictions, references)[0]),
    }


def mse(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Mean squared error, 1/n sum (p_i - r_i)^2."""
    return {"mse": float(np.mean((np.asarray(predictions, np.float64) - np.asarray(references, np.float64)) ** 2))}


GLUE_METRICS: dict[str, Metric] = {
    "cola": matthews_correlation,
    "mnli": accuracy,
    "mrpc": accuracy_and_f1,
    "qnli": accuracy,
    "qqp": accuracy_and_f1,
    "rte": accuracy,
    "sst2": accuracy,
    "stsb": pearson_and_spearman,
    "wnli": accuracy,
}


def local_metric(task: str | None, is_regression: bool) -> Metric:
    """Returns the function for a GLUE task, or, without a task, mean squared error or accuracy."""
    if task is not None:
        return GLUE_METRICS[task]
    return mse if is_regression else accuracy


def load_metric(task: str | None, is_regression: bool, cache_dir: str | None = None) -> Metric:
    """Returns `metric(predictions=..., references=...) -> dict`, from evaluate if it can be loaded.

    Args:
        task: one of `GLUE_METRICS`, or None for other data.
        is_regression: without a task, whether labels are numbers rather than classes.
        cache_dir: cache folder of evaluate.
    """
    name = ("glue", task) if task is not None else ("mse" if is_regression else "accuracy",)
    return load_metric_or_fallback(name, local_metric(task, is_regression), cache_dir)


def with_combined_score(metrics: dict[str, float]) -> dict[str, float]:
    """Adds the mean of all metrics as "combined_score" if there is more than one."""
    if len(metrics) < 2:
        return metrics
    return metrics | {"combined_score": float(np.mean(list(metrics.values())))}


def metric_names(task: str | None, is_regression: bool) -> list[str]:
    """Returns the names of the metrics, with the arguments of `load_metric`."""
    values = np.array([0, 1])
    return list(with_combined_score(local_metric(task, is_regression)(predictions=values, references=values)))
