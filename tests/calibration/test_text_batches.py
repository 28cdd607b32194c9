"""Texts to batches: which tokens, how many, from where; and what is refused."""

import pytest
import torch
from datasets import Dataset
from helpers import tiny_texts
from helpers.tiny_texts import BOS, WORDS, bert_tokenizer, classifier, llama, word_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse.calibration.text_batches import TextReader, max_positions
from hf_sparse.calibration.text_tables import find_text_columns, load_texts
from hf_sparse.oneshot import calibration_batches


def numbered(count: int) -> list[str]:
    """Texts of one word each, all different as long as the words last."""
    return [WORDS[index % len(WORDS)] for index in range(count)]


def test_blocks_are_full_and_cut_from_the_joined_texts():
    reader = TextReader(word_tokenizer(), llama(), length=5)
    # <s> good, <s> bad, <s> film, ...: words are tokens from 2 on. Eleven texts are 22 tokens, or 4 blocks and a rest.
    batches = reader.first(numbered(11))
    assert len(batches) == 1 and batches[0].keys() == {"input_ids"}
    assert batches[0]["input_ids"].tolist() == [
        [BOS, 2, BOS, 3, BOS],
        [4, BOS, 5, BOS, 6],
        [BOS, 7, BOS, 8, BOS],
        [9, BOS, 10, BOS, 11],
    ]
    assert [len(batch["input_ids"]) for batch in TextReader(word_tokenizer(), llama(), 5, 3).first(numbered(11))] == [
        3,
        1,
    ]
    assert reader.first(numbered(11), limit=2)[0]["input_ids"].tolist() == batches[0]["input_ids"][:2].tolist()


def test_empty_rows_are_left_out():
    reader = TextReader(word_tokenizer(), llama(), length=2)
    assert reader.first(["good", "", None, " \n", "bad"])[0]["input_ids"].tolist() == [[BOS, 2], [BOS, 3]]


def test_samples_come_from_all_over_the_data_and_are_chosen_by_the_seed():
    # Every text repeats one word, so the tokens of a block tell which part of the data it is from.
    texts = [" ".join([WORDS[index // 5 % len(WORDS)]] * 7) for index in range(5 * len(WORDS))]
    options = {"length": 8, "samples": 9, "batch_size": 4}

    def drawn(seed):
        batches = calibration_batches(texts, word_tokenizer(), llama(), seed=seed, **options)
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 1]
        return torch.cat([batch["input_ids"] for batch in batches])

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    words = {int(row[-1]) for seed in range(10) for row in drawn(seed)}
    assert words == set(range(2, 2 + len(WORDS)))
    assert len(set(drawn(0)[:, -1].tolist())) > 4


def test_neighbours_stay_together_where_rows_are_short():
    texts = numbered(180)
    row = calibration_batches(texts, word_tokenizer(), llama(), length=12, samples=1)[0]["input_ids"][0]
    words = row[row != BOS] - 2
    # A block of 12 tokens is six rows, which follow each other as they do in the data.
    assert ((words[1:] - words[:-1]) % len(WORDS)).tolist() == [1] * 5


def test_rows_are_truncated_padded_and_sorted_by_length():
    rows = [("very " * 20, 1), ("good", 0), ("bad film", 1)]
    data = Dataset.from_list([{"sentence": text, "label": label} for text, label in rows])
    batches = TextReader(bert_tokenizer(), classifier(), length=6, batch_size=2).first(data)
    # [CLS] good [SEP] and [CLS] bad film [SEP], then 4 words of the long one.
    assert batches[0]["input_ids"].tolist() == [[2, 5, 3, 0], [2, 6, 7, 3]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batches[0]["labels"].tolist() == [0, 1]
    assert batches[1]["input_ids"].tolist() == [[2, 13, 13, 13, 13, 3]] and batches[1]["labels"].tolist() == [1]
    even = TextReader(bert_tokenizer(), classifier(), length=6, batch_size=2, same_length=True).first(data)
    assert [batch["input_ids"].shape[1] for batch in even] == [6, 6]
    assert even[0]["attention_mask"].sum(1).tolist() == [3, 4]


def test_decoders_take_rows_when_asked_and_need_no_padding_token():
    batch = TextReader(word_tokenizer(), llama(), length=9, per_row=True).first(["good", "bad film"])[0]
    assert batch["input_ids"].tolist() == [[BOS, 2, 0], [BOS, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_pairs():
    batch = TextReader(bert_tokenizer(), classifier(), length=9, text_column="one, two").first(
        [{"one": "good", "two": "bad", "label": 1}]
    )[0]
    assert batch["input_ids"].tolist() == [[2, 5, 3, 6, 3]] and batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert torch.equal(
        TextReader(bert_tokenizer(), classifier(), length=9).first([("good", "bad")])[0]["input_ids"],
        batch["input_ids"],
    )


def test_labels_are_numbers_or_names_that_the_model_knows():
    model = classifier(id2label={0: "negative", 1: "positive"})
    reader = TextReader(bert_tokenizer(), model, length=9)
    assert reader.first([{"text": "good", "label": "positive"}])[0]["labels"].tolist() == [1]
    for label, text in (
        ("nice", "label 'nice'"),
        (2, "must be from 0 to 1"),
        (-1, "the label -1"),
        (None, "label None"),
    ):
        with pytest.raises(ValueError, match=text):
            reader.first([{"text": "good", "label": label}])
    score = TextReader(bert_tokenizer(), classifier(num_labels=1), length=9).first([{"text": "good", "label": 2.5}])
    assert score[0]["labels"].tolist() == [2.5]


def test_an_encoder_with_a_decoder_gets_target_texts():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    reader = TextReader(bert_tokenizer(), model, length=6, label_column="short")
    batch = reader.first([{"text": "good film", "short": "good"}, {"text": "bad", "short": "bad bad"}])[0]
    assert batch["labels"].tolist() == [[2, 6, 6, 3], [2, 5, 3, -100]]
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match='`label_column` .columns: "text", "short"'):
        TextReader(bert_tokenizer(), model, length=6).first([{"text": "good film", "short": "good"}])


def test_batches_that_are_ready_are_left_alone():
    batches = [{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3]])}]
    assert calibration_batches(iter(batches), word_tokenizer(), llama(), length=4) == batches


def test_the_column_of_texts():
    def columns(named=None, **data):
        return find_text_columns(Dataset.from_dict(data), named)

    assert columns(id=[1], text=["a"], sentence=["b"]) == ("text",)
    assert columns(title=["a"], sentence=["b"]) == ("sentence",)
    assert columns(label=[1], review=["a"]) == ("review",)
    assert columns("title", title=["a"], text=["b"]) == ("title",)
    for named, text in (
        (None, r"2 columns hold texts \(title, body\): name one with `text_column`"),
        ("tilte", 'no column "tilte": the data have "title", "body"'),
        ("title,body,x", "names 3 columns"),
    ):
        with pytest.raises(ValueError, match=text):
            columns(named, title=["a"], body=["b"])


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_files(tmp_path, ending):
    path = tmp_path / f"texts.{ending}"
    rows = Dataset.from_dict({"text": ["good film", "bad"]})
    if ending == "txt":
        path.write_text("good film\n\nbad\n")
    elif ending in ("csv", "tsv"):
        rows.to_csv(path, sep="," if ending == "csv" else "\t", index=False)
    else:
        (rows.to_parquet if ending == "parquet" else rows.to_json)(path)
    blocks = TextReader(word_tokenizer(), llama(), length=5).first(load_texts(str(path)))
    assert blocks[0]["input_ids"].tolist() == [[BOS, 2, 4, BOS, 3]]


def test_a_stream_is_read_as_far_as_it_is_kept(tmp_path, monkeypatch):
    tiny_texts.write_rows(tmp_path / "train.jsonl", [{"text": text} for text in numbered(9)])
    monkeypatch.setattr("hf_sparse.calibration.text_tables.MAX_STREAMED_ROWS", 4)
    assert list(load_texts(None, str(tmp_path), streaming=True)["text"]) == numbered(4)
    assert len(load_texts(None, str(tmp_path))) == 9


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.json").write_text('{"text": ')
    (tmp_path / "empty.jsonl").write_text("")
    for file, error, text in (
        ("no.txt", FileNotFoundError, 'calibration file ".*no.txt" does not exist'),
        ("x.pdf", ValueError, r"must end with one of: \.csv"),
        ("broken.json", ValueError, 'broken.json" cannot be read as json'),
    ):
        with pytest.raises(error, match=text):
            load_texts(str(tmp_path / file))
    with pytest.raises(ValueError, match="empty.jsonl"):
        load_texts(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="pass `validation_file` or `dataset_name`, not both"):
        load_texts("a.txt", "name", purpose="validation")
    with pytest.raises(ConnectionError, match='"no/such" could not be loaded.*local files with `calibration_file`'):
        load_texts(None, "no/such")


def test_too_little_text_is_refused_with_what_there_is():
    def make(texts, **options):
        return calibration_batches(texts, word_tokenizer(), llama(), **{"length": 4, "samples": 3} | options)

    # Five texts of two tokens are two blocks of four and a half.
    with pytest.raises(
        ValueError,
        match=r"`samples` is 3, but the 5 rows .* only 2 blocks of 4 tokens: .* use `samples=2`, or lower",
    ):
        make(numbered(5))
    with pytest.raises(ValueError, match="`samples` is 3, .* only 2 rows with text: .* use `samples=2`"):
        make(["good", "", "bad"], per_row=True)
    with pytest.raises(ValueError, match="no blocks"):
        make(["", " "])
    with pytest.raises(ValueError, match="there is no calibration text"):
        make([])
    with pytest.raises(ValueError, match="do not give one block of 4 tokens"):
        TextReader(word_tokenizer(), llama(), length=4).first(["good"])
    with pytest.raises(ValueError, match="holds 7: it must be text"):
        TextReader(word_tokenizer(), llama(), length=4, text_column="n").first([{"n": 7}])
    with pytest.raises(ValueError, match="not cut into blocks: name one `text_column`"):
        make([("good", "bad")])
    for name, text in (
        ("length", "`length` is 1"),
        ("batch_size", "`batch_size` is 0"),
        ("samples", "`samples` is 0"),
    ):
        with pytest.raises(ValueError, match=text):
            make(numbered(9), **{name: int(name == "length")})


def test_a_length_beyond_the_models_positions_is_refused():
    with pytest.raises(ValueError, match="`length` 33 is beyond the model's 32 positions: use `length=32` or less"):
        TextReader(word_tokenizer(), llama(), length=33)
    TextReader(word_tokenizer(), llama(), length=32)
    assert (
        max_positions(GPT2LMHeadModel(GPT2Config(n_positions=24, n_embd=4, n_layer=1, n_head=1)), word_tokenizer())
        == 24
    )
    torch.manual_seed(0)
    roberta = BertModel(BertConfig(vocab_size=9, hidden_size=4, num_attention_heads=1, num_hidden_layers=1))
    roberta.config = RobertaConfig(max_position_embeddings=514)
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 512
    assert max_positions(roberta, tokenizer) == 512
    tokenizer.model_max_length = 128  # as a tokenizer says that was saved for short texts
    assert max_positions(roberta, tokenizer) == 514
