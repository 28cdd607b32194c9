"""Reads questions in the SQuAD formats and splits their contexts into overlapping windows."""

import json
from pathlib import Path

from _data import TABLE_FILES, check_columns, check_files, load_files
from datasets import Dataset, DatasetDict


def load_qa_files(files: dict[str, str | None], cache_dir: str | None = None) -> DatasetDict:
    """Loads SQuAD's nested JSON ({"data": [{"paragraphs": ...}]}), {"data": [rows]}, or tables of questions.

    In a .csv or .tsv file the column "answers" holds JSON: {"text": ["Oslo"], "answer_start": [12]}.
    """
    splits = DatasetDict()
    for split, path in check_files(files, TABLE_FILES).items():
        rows = _wrapped_rows(path) if path.suffix.lower() == ".json" else None
        if rows is None:
            dataset = load_files({split: str(path)}, cache_dir=cache_dir)[split]
        elif rows:
            dataset = Dataset.from_list(rows)
        else:
            raise ValueError(f'{split} file "{path}" has no rows.')
        if path.suffix.lower() in (".csv", ".tsv") and "answers" in dataset.column_names:
            dataset = dataset.map(lambda row, path=path: {"answers": _parse_answers(row["answers"], path)})
        splits[split] = dataset
    return splits


def _wrapped_rows(path: Path) -> list[dict] | None:
    """Returns the rows under "data" of a JSON file, or None if the file is a plain list or JSON lines."""
    with open(path, encoding="utf-8") as file:
        if '"data"' not in file.read(4096):
            return None
        file.seek(0)
        try:
            content = json.load(file)
        except json.JSONDecodeError:
            return None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    data = content["data"]
    return flatten_squad(data) if data and "paragraphs" in data[0] else data


def flatten_squad(articles: list[dict]) -> list[dict]:
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


def _parse_answers(text: str, path: Path) -> dict:
    try:
        answers = json.loads(text)
        return {"text": list(answers["text"]), "answer_start": [int(start) for start in answers["answer_start"]]}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f'"{path}": the answers {text!r} are not JSON of the form {{"text": [...], "answer_start": [...]}}. '
            "Write them so, or use a .json, .jsonl or .parquet file."
        ) from error


def check_questions(dataset: Dataset, split: str, may_be_unanswerable: bool) -> Dataset:
    """Refuses missing columns and, unless they are allowed, questions without an answer; numbers rows without ids."""
    needed = ("question", "context") if split == "test" else ("question", "context", "answers")
    check_columns(dataset.column_names, needed, split)
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [str(index) for index in range(len(dataset))])
    if "answers" in dataset.column_names and not may_be_unanswerable:
        empty = [row["id"] for row in dataset.select_columns(["id", "answers"]) if not row["answers"]["text"]]
        if empty:
            raise ValueError(
                f'{len(empty)} questions of the {split} split have no answer (the first is "{empty[0]}"). '
                "Pass --version_2_with_negative, or leave them out."
            )
    return dataset


class Windows:
    """Cuts question and context pairs into windows of `max_length` tokens that overlap by `stride` tokens."""

    def __init__(self, tokenizer, max_length: int, stride: int, pad_to_max_length: bool):
        self.tokenizer = tokenizer
        # The question stays whole; a tokenizer that pads on the left wants it after the context.
        self.context_index = 1 if tokenizer.padding_side == "right" else 0
        self.options = {
            "truncation": "only_second" if self.context_index == 1 else "only_first",
            "max_length": max_length,
            "stride": stride,
            "padding": "max_length" if pad_to_max_length else False,
            "return_overflowing_tokens": True,
            "return_offsets_mapping": True,
        }

    def encode(self, rows):
        # Some questions start with many spaces, which would leave the context no room.
        pair = [[question.lstrip() for question in rows["question"]], rows["context"]]
        return self.tokenizer(*(pair if self.context_index == 1 else pair[::-1]), **self.options)

    def null_index(self, input_ids: list[int]) -> int:
        """Returns the position of the token for "no answer": the class token if there is one, else the first token."""
        token = self.tokenizer.cls_token_id
        return input_ids.index(token) if token in input_ids else 0

    def for_training(self, rows) -> dict:
        """Returns windows with the first and last token of the answer, or the no-answer token if it lies outside."""
        encoded = self.encode(rows)
        del encoded["offset_mapping"]
        starts, ends = [], []
        for window, row in enumerate(encoded.pop("overflow_to_sample_mapping")):
            span = self.answer_tokens(encoded, window, rows["answers"][row], rows["context"][row])
            first, last = span or (self.null_index(encoded["input_ids"][window]),) * 2
            starts.append(first)
            ends.append(last)
        return dict(encoded) | {"start_positions": starts, "end_positions": ends}

    def answer_tokens(self, encoded, window: int, answers: dict, context: str) -> tuple[int, int] | None:
        """Returns the tokens of the first and last character of the first answer, or None if outside this window."""
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
        tokens = [encoded.char_to_token(window, character, self.context_index) for character in (first, end - 1)]
        return None if None in tokens else tuple(tokens)

    def for_evaluation(self, rows) -> dict:
        """Returns windows with the columns of `postprocess`; offsets outside the context are None."""
        encoded = self.encode(rows)
        samples = encoded.pop("overflow_to_sample_mapping")
        encoded["example_id"] = [rows["id"][row] for row in samples]
        encoded["null_index"] = [self.null_index(ids) for ids in encoded["input_ids"]]
        encoded["offset_mapping"] = [
            [
                offset if sequence == self.context_index else None
                for offset, sequence in zip(offsets, encoded.sequence_ids(window), strict=True)
            ]
            for window, offsets in enumerate(encoded["offset_mapping"])
        ]
        return dict(encoded)
