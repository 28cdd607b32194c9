"""Reads questions in the SQuAD formats and splits their contexts into overlapping windows."""

from pathlib import Path

from _data import TABLE_FILES, check_columns, check_files, load_files
from datasets import Dataset, DatasetDict

from hf_sparse.calibration.questions import answer_tokens, no_answer_position, parse_answers, read_wrapped_rows


def load_qa_files(files: dict[str, str | None], cache_dir: str | None = None) -> DatasetDict:
    """Loads SQuAD's nested JSON ({"data": [{"paragraphs": ...}]}), {"data": [rows]}, or tables of questions.

    In a .csv or .tsv file the column "answers" holds JSON: {"text": ["Oslo"], "answer_start": [12]}.
    """
    splits = DatasetDict()
    for split, path in check_files(files, TABLE_FILES).items():
        rows = read_wrapped_rows(path) if path.suffix.lower() == ".json" else None
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


def _parse_answers(text: str, path: Path) -> dict:
    try:
        return parse_answers(text)
    except ValueError as error:
        raise ValueError(f'"{path}": {error}') from error


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
                "Pass `version_2_with_negative`, or leave them out."
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

    def for_training(self, rows) -> dict:
        """Returns windows with the first and last token of the answer, or the no-answer token if it lies outside."""
        encoded = self.encode(rows)
        del encoded["offset_mapping"]
        starts, ends = [], []
        for window, row in enumerate(encoded.pop("overflow_to_sample_mapping")):
            span = answer_tokens(encoded, window, rows["answers"][row], rows["context"][row], self.context_index)
            first, last = span or (no_answer_position(self.tokenizer, encoded["input_ids"][window]),) * 2
            starts.append(first)
            ends.append(last)
        return dict(encoded) | {"start_positions": starts, "end_positions": ends}

    def for_evaluation(self, rows) -> dict:
        """Returns windows with the columns of `postprocess`; offsets outside the context are None."""
        encoded = self.encode(rows)
        samples = encoded.pop("overflow_to_sample_mapping")
        encoded["example_id"] = [rows["id"][row] for row in samples]
        encoded["null_index"] = [no_answer_position(self.tokenizer, ids) for ids in encoded["input_ids"]]
        encoded["offset_mapping"] = [
            [
                offset if sequence == self.context_index else None
                for offset, sequence in zip(offsets, encoded.sequence_ids(window), strict=True)
            ]
            for window, offsets in enumerate(encoded["offset_mapping"])
        ]
        return dict(encoded)
