"""Converts the start and end logits of context windows to one answer text per question.

Shapes: F windows (features), T tokens of a window. One question has one window or more.
"""

import json
import os
from collections import defaultdict

import numpy as np


def best_spans(
    start_T: np.ndarray, end_T: np.ndarray, offsets: list, n_best_size: int, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """Returns the best spans of one window as (score, first character, end character), best first.

    score(i, j) = start_i + end_j over the n_best_size best i and j each, with i <= j < i + max_answer_length and both
    tokens in the context.

    Args:
        offsets: (first, end) characters of each token in the context, or None outside of it. The logits are longer
            if the batch was padded further.

    Example: start [0, 5, 1], end [0, 1, 4], offsets [None, (0, 3), (4, 8)] give [(9, 0, 8), (6, 0, 3), (5, 4, 8)].
    """
    inside = np.array([offset is not None for offset in offsets])
    starts = _largest(start_T[: len(offsets)], n_best_size)
    ends = _largest(end_T[: len(offsets)], n_best_size)
    starts, ends = starts[inside[starts]], ends[inside[ends]]
    length = ends[None, :] - starts[:, None] + 1
    rows, columns = np.nonzero((length >= 1) & (length <= max_answer_length))
    spans = [
        (float(start_T[i] + end_T[j]), offsets[i][0], offsets[j][1])
        for i, j in zip(starts[rows], ends[columns], strict=True)
    ]
    return sorted(spans, key=lambda span: -span[0])[:n_best_size]


def _largest(values_T: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the largest values, ties by position."""
    return np.argsort(-values_T, kind="stable")[:count]


def answer(context: str, windows: list[tuple], n_best_size: int, max_answer_length: int) -> tuple[list[dict], float]:
    """Returns the n best answers of one question over its windows, and the score of "no answer".

    Args:
        windows: a list of (start_T, end_T, offsets, null_index).

    Returns:
        The answers, best first, as {"text", "score"}; and the lowest no-answer score of all windows: a question is
        unanswerable only if every window has no answer.
    """
    spans, null_score = [], float("inf")
    for start_T, end_T, offsets, null_index in windows:
        null_score = min(null_score, float(start_T[null_index] + end_T[null_index]))
        spans += best_spans(start_T, end_T, offsets, n_best_size, max_answer_length)
    spans = sorted(spans, key=lambda span: -span[0])[:n_best_size]
    return [{"text": context[first:end], "score": score} for score, first, end in spans], null_score


def with_probabilities(answers: list[dict]) -> list[dict]:
    """Adds the softmax over the scores as "probability"."""
    scores = np.array([item["score"] for item in answers])
    weights = np.exp(scores - scores.max())
    return [item | {"probability": float(p)} for item, p in zip(answers, weights / weights.sum(), strict=True)]


def postprocess(
    examples,
    features,
    predictions: tuple[np.ndarray, np.ndarray],
    version_2_with_negative: bool = False,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_score_diff_threshold: float = 0.0,
) -> tuple[dict[str, str], dict[str, list[dict]], dict[str, float]]:
    """Answers every question.

    Args:
        examples: rows with "id" and "context".
        features: windows with "example_id", "offset_mapping" (None outside the context) and "null_index".
        predictions: start_FT and end_FT logits.
        version_2_with_negative: whether a question may have no answer; then the answer is "" where
            null score - best score > null_score_diff_threshold.

    Returns:
        id -> text; id -> n-best list; id -> null score - best score (empty without version_2_with_negative).
    """
    start_FT, end_FT = predictions
    if len(start_FT) != len(features):
        raise ValueError(f"{len(start_FT)} predictions for {len(features)} windows: pass the windows predicted on.")
    windows = defaultdict(list)
    for index, (example_id, offsets, null_index) in enumerate(
        zip(features["example_id"], features["offset_mapping"], features["null_index"], strict=True)
    ):
        windows[example_id].append((start_FT[index], end_FT[index], offsets, null_index))

    texts, n_best, null_odds = {}, {}, {}
    for example_id, context in zip(examples["id"], examples["context"], strict=True):
        answers, null_score = answer(context, windows[example_id], n_best_size, max_answer_length)
        # Without any possible span the answer is empty, with probability 1.
        null = {"text": "", "score": null_score if version_2_with_negative or not answers else -float("inf")}
        best_score = answers[0]["score"] if answers else -float("inf")
        if version_2_with_negative:
            null_odds[example_id] = null_score - best_score
        is_unanswered = not answers or (version_2_with_negative and null_odds[example_id] > null_score_diff_threshold)
        texts[example_id] = "" if is_unanswered else answers[0]["text"]
        candidates = answers + ([null] if version_2_with_negative or not answers else [])
        n_best[example_id] = with_probabilities(sorted(candidates, key=lambda item: -item["score"]))
    return texts, n_best, null_odds


def write_answers(folder: str, prefix: str, texts: dict, n_best: dict, null_odds: dict) -> None:
    """Writes {prefix}_predictions.json, {prefix}_nbest_predictions.json and, if not empty, {prefix}_null_odds.json."""
    os.makedirs(folder, exist_ok=True)
    for name, content in (("predictions", texts), ("nbest_predictions", n_best), ("null_odds", null_odds)):
        if content or name != "null_odds":
            with open(os.path.join(folder, f"{prefix}_{name}.json"), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
