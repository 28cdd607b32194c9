"""MaskStore: zeros are +0.0 bit for bit, kept weights keep their bits, and masks are saved and restored."""

import math

import pytest
import torch

from hf_sparse.engine import masks as masks_module
from hf_sparse.engine.masks import MaskStore, unpack_mask


BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def store_of(**masks):
    store = MaskStore({name: (mask.shape, mask.device) for name, mask in masks.items()})
    for name, mask in masks.items():
        store.replace(name, mask)
    return store


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_enforce_writes_plus_zero_and_changes_no_other_bit(dtype, layout):
    values = torch.tensor([1.5, -0.0, math.nan, math.inf, -math.inf, -2.0, 0.0, 1e-7], dtype=dtype)
    weight = values.repeat(6).view(2, 4, 3, 2).clone()
    if layout == "transposed":
        weight = weight.permute(3, 2, 1, 0)
    elif layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    before = weight.contiguous().view(BITS[dtype]).clone()
    store_of(w=mask).enforce({"w": weight})
    after = weight.contiguous().view(BITS[dtype])
    assert torch.equal(after, torch.where(mask, before, 0))


def test_enforce_on_parameters_that_need_gradients_and_many_chunks(monkeypatch):
    monkeypatch.setattr(masks_module, "_CHUNK", 10)
    weight = torch.nn.Parameter(torch.arange(1.0, 38.0).view(37, 1))
    mask = torch.arange(37).view(37, 1) % 3 > 0
    store_of(w=mask).enforce({"w": weight})
    assert torch.equal(weight.detach(), torch.arange(1.0, 38.0).view(37, 1) * mask)
    assert weight.grad_fn is None and weight.requires_grad


def test_a_tensor_larger_than_a_chunk():
    count = masks_module._CHUNK + 3
    weight, mask = torch.full((count, 1), -1.0), torch.ones(count, 1, dtype=torch.bool)
    mask[[0, -2]] = False
    store_of(w=mask).enforce({"w": weight})
    assert weight.nonzero().shape[0] == count - 2 and not torch.signbit(weight[[0, -2]]).any()


def test_counts_and_reading():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    store = store_of(a=mask, b=torch.ones(2, dtype=torch.bool))
    assert (store.kept("a"), store.pruned("a"), store.pruned("b")) == (3, 3, 0)
    assert torch.equal(store["a"], mask) and store["a"].dtype == torch.bool
    assert list(store) == ["a", "b"] and len(store) == 2
    assert store.bits("a").tolist() == [[-1, 0, 0], [-1, -1, 0]]
    with pytest.raises(KeyError):
        store["c"]


@pytest.mark.parametrize("bad", [torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3)])
def test_replace_refuses_another_shape_or_dtype(bad):
    with pytest.raises(ValueError, match=r'mask of "a": .* instead of torch.bool of \(2, 3\)'):
        store_of(a=torch.ones(2, 3, dtype=torch.bool)).replace("a", bad)


def test_packed_by_hand():
    """1010 0000 1 -> 0xA0, and 1 in the highest bit of the next byte."""
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 1]]).bool()
    assert store_of(w=mask).packed("w").tolist() == [0b10100000, 0b10000000]


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 4), (3, 3), (5, 7), (2, 3, 3)])
def test_packed_round_trip(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(unpack_mask(store_of(w=mask).packed("w"), mask.numel()), mask.flatten())


@pytest.mark.parametrize(
    "packed, message",
    [
        (torch.zeros(1, dtype=torch.uint8), r"of shape \(1,\); for 9 weights it must be torch.uint8 of \(2,\)"),
        (torch.zeros(2, dtype=torch.int32), "a mask is torch.int32"),
    ],
)
def test_a_packed_mask_of_another_size_is_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack_mask(packed, 9)


def test_digest_changes_with_one_bit_one_name_and_one_shape():
    mask = torch.ones(4, 4, dtype=torch.bool)
    flipped = mask.clone()
    flipped[3, 3] = False
    digests = [store_of(a=m).digest() for m in (mask, flipped, mask.view(2, 8))] + [store_of(b=mask).digest()]
    digests.append(store_of(a=mask, b=mask).digest())
    assert len(set(digests)) == 5
    assert digests[0] == store_of(a=mask.clone()).digest()
    assert store_of(a=mask, b=flipped).digest() == store_of(b=flipped, a=mask).digest()
