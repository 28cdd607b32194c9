"""Questions with contexts and answers, in the formats of SQuAD."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_wrapped_rows(path: Path) -> list[dict[str, Any]] | None:
    """Returns the rows under "data" of a JSON file, one per question; None if the file has another form.

    The rows may be nested in articles and paragraphs, as SQuAD has them.

    Raises:
        ValueError: if they are nested in another way.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if '"data"' not in file.read(4096):
                return None
            file.seek(0)
            content = json.load(file)
    except (ValueError, RecursionError):
        return None
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        return None
    if not data or "paragraphs" not in data[0]:
        return data
    try:
        return flatten_squad(data)
    except (KeyError, TypeError) as error:
        raise ValueError(f'"{path}" is not in the format of SQuAD: {error!r}') from error


def flatten_squad(articles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per question from the nested articles and paragraphs of SQuAD."""
    rows = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers", [])
                rows.append(
                    {
                        "id": question["id"],
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        },
                    }
                )
    return rows


def parse_answers(value: Any) -> dict[str, list[Any]]:
    """Returns answers as {"text": [...], "answer_start": [...]}, which may be given as JSON text.

    Raises:
        ValueError: if they are of another form.

    Example:
        >>> parse_answers('{"text": ["Oslo"], "answer_start": [12]}')
        {'text': ['Oslo'], 'answer_start': [12]}
    """
    try:
        answers = json.loads(value) if isinstance(value, str) else value
        texts, starts = list(answers["text"]), [int(start) for start in answers["answer_start"]]
        if len(texts) == len(starts) and all(isinstance(text, str) for text in texts):
            return {"text": texts, "answer_start": starts}
    except (TypeError, KeyError, ValueError):
        pass
    raise ValueError(
        f'a row has the answers {value!r}: they must be of the form {{"text": [...], "answer_start": [...]}}, as in '
        "SQuAD, in a .csv or .tsv file as JSON."
    )


def encode_question(tokenizer: Any, question: str, context: str, length: int) -> tuple[Any, int]:
    """Tokenizes a question with its context, cut into windows of `length` tokens that overlap by up to a quarter.

    Returns:
        The windows, and the index of the context in the pair: tokenizers that pad on the left want the question last.

    Raises:
        ValueError: if the question leaves the context no room.
    """
    context_index = 1 if tokenizer.padding_side == "right" else 0
    question = question.lstrip()  # some questions start with many spaces, which would leave the context no room
    num_special = tokenizer.num_special_tokens_to_add(pair=True)
    room = length - num_special - len(tokenizer(question, add_special_tokens=False)["input_ids"])
    if room < 1:
        raise ValueError(
            f"the question {question!r} leaves its context no room in {length} tokens: pass a larger length."
        )
    pair = (question, context) if context_index == 1 else (context, question)
    encoded = tokenizer(
        *pair,
        truncation="only_second" if context_index == 1 else "only_first",
        max_length=length,
        stride=min(length // 4, room // 2),
        return_overflowing_tokens=True,
    )
    return encoded, context_index


def answer_tokens(
    encoded: Any, window: int, answers: Mapping[str, list[Any]], context: str, context_index: int
) -> tuple[int, int] | None:
    """Returns the tokens of the first and last character of the first answer, or None if it is outside the window."""
    if not answers["text"]:
        return None
    first = answers["answer_start"][0]
    end = first + len(answers["text"][0])
    # A space belongs to no token in most tokenizers.
    while first < end and context[first : first + 1].isspace():
        first += 1
    while end > first and context[end - 1 : end].isspace():
        end -= 1
    if not 0 <= first < end <= len(context):
        return None
    start_token, end_token = (
        encoded.char_to_token(window, character, context_index) for character in (first, end - 1)
    )
    return None if start_token is None or end_token is None else (start_token, end_token)


def no_answer_position(tokenizer: Any, input_ids: list[int]) -> int:
    """Returns the position of the token for "no answer": the class token if there is one, else the first token."""
    token = tokenizer.cls_token_id
    return input_ids.index(token) if token in input_ids else 0
