"""Batches of every kind: called, cut, joined, counted, and which of their tokens are padding."""

from collections import UserDict

import pytest
import torch
from torch import nn

from hf_sparse.calibration.batches import (
    call_model,
    concatenate_batches,
    count_tokens,
    first_row,
    is_padded,
    mask_for_inputs,
    to_device,
    token_masks,
    with_labels,
)


IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_models_are_called_by_the_type_of_the_batch():
    def model(*args, **kwargs):
        return args, kwargs

    assert call_model(model, {"x": 1}) == ((), {"x": 1}) == call_model(model, UserDict(x=1))
    assert call_model(model, (1, 2)) == ((1, 2), {}) == call_model(model, [1, 2]) and call_model(model, 3) == (
        (3,),
        {},
    )


def test_batches_on_a_device_are_copies():
    batch = {"a": IDS, "b": [IDS, (MASK, "text")], "c": None}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["b"][1][1] == "text" and moved["c"] is None and torch.equal(moved["b"][1][0], MASK)
    moved["a"].zero_(), moved["b"][0].zero_()
    assert IDS.any() and to_device(IDS, torch.device("meta")).is_meta
    assert type(to_device(UserDict(a=IDS), torch.device("cpu"))) is dict


def test_the_first_row_of_what_has_rows():
    assert first_row({"a": IDS, "b": MASK, "c": 3})["b"].tolist() == [[1, 1, 1]]
    assert first_row((IDS, MASK))[0].tolist() == [[5, 6, 7]] and len(first_row(IDS)) == 1
    for batch in ({"a": IDS, "b": torch.ones(3)}, {"a": IDS, "b": torch.tensor(1.0)}, {"c": 3}):
        assert first_row(batch) is batch


def test_batches_are_concatenated():
    both = concatenate_batches([{"a": IDS, "flag": True}, {"a": IDS[:1], "flag": True}])
    assert both["a"].tolist() == [*IDS.tolist(), IDS[0].tolist()] and both["flag"] is True
    assert (
        concatenate_batches([(IDS,), (MASK,)])[0].shape == (4, 3)
        and concatenate_batches([UserDict(a=IDS)])["a"] is not None
    )
    for other in ({"a": IDS[:, :2]}, {"b": IDS}, {"a": IDS, "b": IDS}, (IDS,), {"a": 3}):
        with pytest.raises(ValueError, match="different lengths or kinds cannot be concatenated, .*forwards=2"):
            concatenate_batches([{"a": IDS}, other])


@pytest.mark.parametrize(
    "batch, tokens",
    [
        ({"input_ids": IDS, "attention_mask": MASK}, 5),
        ({"input_ids": IDS}, 6),
        ({"attention_mask": torch.ones(1, 1, 3, 3), "input_ids": IDS}, 6),
        ({"pixel_values": torch.ones(2, 3, 4, 4)}, 24),
        (torch.ones(2, 5, 3), 10),
        ((torch.ones(2, 3), IDS), 6),
        ({}, 0),
        ("text", 0),
    ],
)
def test_tokens_are_counted(batch, tokens):
    assert count_tokens(batch) == tokens


def test_only_masks_of_tokens_tell_padding():
    assert is_padded({"attention_mask": MASK}) and not is_padded({"attention_mask": MASK[:1]})
    assert not is_padded({"attention_mask": torch.zeros(1, 1, 3, 3)}) and not is_padded(IDS) and not is_padded({})


def shapes(batch, decodes):
    return [(mask.dtype, mask.sum().item(), tuple(mask.shape)) for mask in token_masks(batch, decodes)]


@pytest.mark.parametrize(
    "batch, decodes, expected",
    [
        ({"input_ids": IDS, "attention_mask": MASK}, False, [5]),
        ({"input_ids": IDS}, False, []),
        (IDS, True, []),
        ({"input_ids": IDS, "attention_mask": MASK, "labels": IDS}, False, [5]),
        # a decoder: by its own mask, by labels, or all
        ({"input_ids": IDS, "attention_mask": MASK, "decoder_attention_mask": MASK[:, :1]}, True, [5, 2]),
        ({"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([[3, -100]])}, True, [5, 1]),
        ({"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS}, True, [5, 6]),
        ({"input_ids": IDS, "labels": torch.tensor([[3, 4, -100], [3, 4, 5]])}, True, [6, 5]),
    ],
)
def test_masks_of_tokens(batch, decodes, expected):
    found = shapes(batch, decodes)
    assert [count for _, count, _ in found] == expected and all(kind == torch.bool for kind, *_ in found)


def test_which_mask_belongs_to_an_input():
    encoder, decoder = MASK.bool(), torch.tensor([[True, False], [True, True]])
    masks = [encoder, decoder]
    assert torch.equal(mask_for_inputs(masks, torch.ones(2, 3, 8)), encoder)
    assert torch.equal(mask_for_inputs(masks, torch.ones(2, 2, 8)), decoder)
    assert torch.equal(mask_for_inputs(masks, torch.ones(6, 8)), encoder.reshape(6)), "rows and tokens flattened"
    assert mask_for_inputs(masks, torch.ones(2, 5, 8)) is None and mask_for_inputs(masks, torch.ones(2, 8)) is None
    assert mask_for_inputs([torch.ones(2, 3).bool()], torch.ones(2, 3, 8)) is None
    assert torch.equal(mask_for_inputs([encoder, encoder.clone()], torch.ones(2, 3, 8)), encoder)
    with pytest.raises(ValueError, match=r"both \(2, 3\) tokens, .* pad them to different lengths"):
        mask_for_inputs([encoder, ~encoder], torch.ones(2, 3, 8))


class SomeForCausalLM(nn.Module): ...


class SomeLMHeadModel(nn.Module): ...


class SomeForSequenceClassification(nn.Module): ...


def test_labels_of_causal_language_models():
    for model in (SomeForCausalLM(), SomeLMHeadModel()):
        found = with_labels(model, {"input_ids": IDS, "attention_mask": MASK})
        assert found["labels"].tolist() == [[5, 6, 7], [8, 9, -100]] and IDS[1, 2] == 0
        assert with_labels(model, {"input_ids": IDS})["labels"].tolist() == IDS.tolist()
    given = {"input_ids": IDS, "labels": MASK}
    assert with_labels(SomeForCausalLM(), given) is given
    for model, batch in (
        (SomeForSequenceClassification(), {"input_ids": IDS}),
        (SomeForCausalLM(), (IDS,)),
        (SomeForCausalLM(), {"inputs_embeds": torch.ones(1)}),
    ):
        assert with_labels(model, batch) is batch
