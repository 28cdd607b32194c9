"""Exact match and F1 of extractive question answering, without a download.

The metrics of the SQuAD evaluation: two answers are compared in lower case, without punctuation, English articles and
surplus spaces; each question counts with its best-matching reference. All metrics are percentages.
"""

import re
import string
from collections import Counter


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Example: `normalize("The  Eiffel-Tower!")` is "eiffeltower"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same after `normalize`, else 0."""
    return float(normalize(prediction) == normalize(reference))


def f1(prediction: str, reference: str) -> float:
    """F1 = 2 c / (p + r): c words in common, counted with repeats, of p predicted and r reference words."""
    predicted, referenced = normalize(prediction).split(), normalize(reference).split()
    common = sum((Counter(predicted) & Counter(referenced)).values())
    return 2 * common / (len(predicted) + len(referenced)) if common else 0.0


def squad(predictions: list[dict], references: list[dict]) -> dict[str, float]:
    """Mean exact match and F1 over the questions of SQuAD 1.1.

    Args:
        predictions: a list of {"id", "prediction_text"}.
        references: a list of {"id", "answers": {"text": [...]}}; every question has an answer.
    """
    texts = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
    exact, overlap = [], []
    for reference in references:
        text = texts.get(reference["id"], "")
        exact.append(max(exact_match(text, answer) for answer in reference["answers"]["text"]))
        overlap.append(max(f1(text, answer) for answer in reference["answers"]["text"]))
    return {"exact_match": _percent(exact), "f1": _percent(overlap)}


def squad_v2(predictions: list[dict], references: list[dict]) -> dict[str, float]:
    """Exact match and F1 where some questions have no answer; the right prediction for those is "".

    Returns the keys of `evaluate.load("squad_v2")` except the best_* ones, which tune the no-answer threshold on the
    references.
    """
    texts = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
    scores = {True: [], False: []}
    for reference in references:
        answers = [answer for answer in reference["answers"]["text"] if normalize(answer)]
        text = texts.get(reference["id"], "")
        if answers:
            pair = max(exact_match(text, answer) for answer in answers), max(f1(text, answer) for answer in answers)
        else:
            pair = (float(not normalize(text)),) * 2
        scores[bool(answers)].append(pair)
    result = _figures(scores[True] + scores[False], "")
    for answerable, prefix in ((True, "HasAns_"), (False, "NoAns_")):
        if scores[answerable]:
            result |= _figures(scores[answerable], prefix)
    return result


def metric_names(with_negative: bool) -> list[str]:
    """Returns the names of the metrics: of `squad`, or of `squad_v2` with those that evaluate alone computes."""
    predictions = [{"id": 0, "prediction_text": "a"}, {"id": 1, "prediction_text": ""}]
    references = [{"id": 0, "answers": {"text": ["a"]}}, {"id": 1, "answers": {"text": []}}]
    if not with_negative:
        return list(squad(predictions[:1], references[:1]))
    best = ["best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"]
    return [*squad_v2(predictions, references), *best]


def _figures(pairs: list[tuple[float, float]], prefix: str) -> dict[str, float]:
    return {
        f"{prefix}exact": _percent([exact for exact, _ in pairs]),
        f"{prefix}f1": _percent([overlap for _, overlap in pairs]),
        f"{prefix}total": len(pairs),
    }


def _percent(values: list[float]) -> float:
    return 100.0 * sum(values) / len(values)
