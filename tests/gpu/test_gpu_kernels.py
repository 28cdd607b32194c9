"""Each Triton kernel computes what torch computes on the CPU, bit for bit: on a GPU, or in Triton's interpreter."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.tiny import bits_equal

from hf_sparse.kernels import StoredScores, has_kernels
from hf_sparse.patterns.n_of_m_kernel import keep_n_of_m
from hf_sparse.selection.row_masks import keep_mask_by_row
from hf_sparse.selection.scores import TensorScores
from hf_sparse.selection.threshold import find_thresholds
from hf_sparse.statistics import GradientStatistic, ProductSaliency, observe_all


SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, 1e-41, -1e-41, 1.0, 1.0, -1.0, 3.4e38]
SIZES = [1, 5, 16, 4096, 5007]  # below, at and above a block, with and without accesses of 16 bytes
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def device(device):
    """A device that has kernels."""
    if not has_kernels(device):
        if device.type == "cuda":
            pytest.importorskip("triton")
            pytest.fail("Triton is installed, but its kernels do not run")
        pytest.skip("kernels run on CUDA, and on the CPU with TRITON_INTERPRET=1")
    return device


@contextmanager
def without_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse.kernels.KERNEL_DEVICES", ())
        yield


def values(size, dtype=torch.float32, seed=0):
    """Random numbers with ties and special values."""
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(size + 1, generator=generator, dtype=torch.float64) * 8).round() / 8
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    tensor[: len(special)] = special[: size + 1]
    return tensor[:size].to(dtype)


def shifted(tensor, device):
    """The tensor on the device, at an address that is no multiple of 16 if its size is not."""
    memory = torch.empty(len(tensor) + 1, dtype=tensor.dtype, device=device)[len(tensor) % 16 != 0 :]
    return memory[: len(tensor)].copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_enforced_and_zeros_counted(device, dtype):
    from hf_sparse.kernels.masks import count_zeros_of, enforce_masks

    weights = [values(size, dtype, size) for size in SIZES]
    masks = [torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5 for size in SIZES]
    pairs = [
        (shifted(weight, device), shifted(mask.to(torch.int8).neg(), device))
        for weight, mask in zip(weights, masks, strict=True)
    ]
    counted = [pairs[0][1], *(weight for weight, _ in pairs), torch.empty(0, device=device)]
    expected = [int((tensor.cpu() == 0).sum()) for tensor in counted]
    assert count_zeros_of(counted).tolist() == expected
    enforce_masks(pairs)
    for weight, mask, (found, _) in zip(weights, masks, pairs, strict=True):
        assert bits_equal(found.cpu(), torch.where(mask, weight, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("function", ["abs", "square", "neg"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtypes", [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_sums_of_saliencies(device, dtypes, weighted, function):
    saliency = ProductSaliency(weighted, function)
    decay = 0.9 if device.type == "cuda" else 0.5  # the interpreter rounds twice what a GPU rounds once
    weights = [values(size, dtypes[0], size).clamp(-2.0, 2.0) for size in SIZES]
    on_cpu = [GradientStatistic(padded(weight), decay) for weight in weights]
    found = [GradientStatistic(weight.to(device), decay) for weight in weights]
    for step in range(3):
        gradients = [values(size, dtypes[1], size + step + 1).clamp(-3.0, 3.0) for size in SIZES]
        for statistic, weight, gradient in zip(on_cpu, weights, gradients, strict=True):
            statistic.observe(padded(weight), padded(gradient), saliency)
        rows = zip(found, weights, gradients, strict=True)
        observe_all([(one, shifted(w, device), shifted(g, device)) for one, w, g in rows], saliency)
        if step == 1:
            on_cpu[0].restart()
            found[0].restart()
    for expected, statistic in zip(on_cpu, found, strict=True):
        total = statistic.total.cpu()
        assert bits_equal(total, expected.total[: len(total)]) and statistic.state()[1] == expected.state()[1]


def padded(tensor):
    """So long that a CPU computes all entries with vector instructions, which round as a GPU does."""
    return torch.nn.functional.pad(tensor, (0, -len(tensor) % 64))


@pytest.mark.parametrize("keep, of", [(2, 4), (1, 4), (3, 7), (0, 2), (5, 12)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_n_of_m_masks(device, dtype, keep, of):
    for groups in (1, 300, 1001):
        scores = values(groups * of, dtype, groups).view(groups, of)
        found = keep_n_of_m(scores.to(device), keep)
        with without_kernels():
            expected = keep_n_of_m(scores if dtype == torch.float64 else scores.float(), keep)
        assert torch.equal(found.cpu(), expected) and bool((found.sum(1) == keep).all())


def layers_on(device, dtype, magnitude):
    """Scores of layers of several sizes and scales; one of them is not contiguous, so that its scores are chunks."""
    tensors = [values(size, dtype, size) * (1 + index / 8) for index, size in enumerate(SIZES)]
    tensors.append(values(2 * 3000, dtype, 7).view(-1, 2).to(device)[:, 0])
    return [TensorScores(tensor.to(device), magnitude) for tensor in tensors]


@pytest.mark.parametrize("sampled", [500, None], ids=["sample", "no sample"])
@pytest.mark.parametrize("dtype, magnitude", zip(DTYPES, [True, False, True, False], strict=True), ids=str)
def test_thresholds_of_histograms(device, dtype, magnitude, sampled, monkeypatch):
    if sampled:
        monkeypatch.setattr("hf_sparse.selection.histogram_search._SAMPLED", sampled)
    on_device, on_cpu = layers_on(device, dtype, magnitude), layers_on("cpu", dtype, magnitude)
    sizes = np.array([layer.numel for layer in on_cpu])
    bounds = [(None, None), ((0.3 * sizes).astype(int).tolist(), (0.8 * sizes).astype(int).tolist())]
    halves = (sizes // 2).tolist()
    for k in (int(0.35 * sizes.sum()), sum(halves), int(sizes.sum()) - 1):
        for floors, caps in [*bounds, (halves, halves)]:
            if sum(floors or [0]) <= k <= sum(caps or sizes):
                found = find_thresholds(on_device, k, floors, caps)
                with without_kernels():
                    assert found == find_thresholds(on_cpu, k, floors, caps)


def test_a_sample_that_misleads_is_corrected(device, monkeypatch):
    monkeypatch.setattr("hf_sparse.selection.histogram_search._SAMPLED", 100)
    scores = torch.arange(40 * 2048.0).view(40, 2048)
    scores[0], scores[1:] = -1.0, scores[1:].clone()  # the block that is read has none of the others
    for k in (2048, 2049, 40 * 2048 - 1):
        (found,) = find_thresholds([TensorScores(scores.to(device))], k)
        with without_kernels():
            assert [found] == find_thresholds([TensorScores(scores)], k)


def test_scores_that_are_nan(device):
    for bad in (torch.nan, -torch.nan):
        tensors = [torch.randn(5000, device=device) for _ in range(3)]
        tensors[1][4999] = bad
        with pytest.raises(ValueError, match="the scores of layer 1 must not be NaN"):
            find_thresholds([TensorScores(tensor) for tensor in tensors], 7000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_thresholds(device, dtype):
    from hf_sparse.kernels.scores import ALL_TIES, write_masks

    for size in SIZES:
        scores = values(size, dtype, size)
        kept = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.7
        seen = torch.where(kept, scores.float(), -torch.inf)
        cases = [(1.0, 0), (1.0, 1), (1.0, ALL_TIES), (0.0, min(100, size)), (-torch.inf, 0), (torch.inf, ALL_TIES)]
        for value, count in cases:
            ties = (seen == value).nonzero()[:, 0][:count]
            expected = kept & (seen >= value)
            expected[ties] = False
            bits = shifted(kept.to(torch.int8).neg(), device)
            write_masks([StoredScores(shifted(scores, device), mask_bits=bits)], [value], [count])
            assert torch.equal(bits.cpu(), expected.to(torch.int8).neg())


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_lowest_scores_of_a_stack(device, masked):
    from hf_sparse.kernels.lowest_scores import LowestScores

    heights, size = [5, 70, 33], 24
    updated, scale = (values(size * sum(heights)) / 4).view(size, -1).clamp(-9, 9), values(size, seed=1).abs() + 0.5
    kept = values(updated.numel(), seed=2).view(size, -1) > -0.5 if masked else updated == updated
    scores = (updated * scale.clamp(max=4)[:, None]).square().masked_fill(~kept, -torch.inf)
    parts = scores.split(heights, 1)
    counts = [[max(int(share * part.numel()), int((part < 0).sum())) for part in parts] for share in (0, 0.3, 0.8, 1)]
    lowest = LowestScores(heights, list(zip(*counts, strict=True)), device)
    for block, numbers in enumerate(counts):
        found = kept.to(device).to(torch.uint8)
        lowest.prune(updated.to(device), found, scale.clamp(max=4).to(device), block)
        for part, count, found_part, before in zip(parts, numbers, found.split(heights, 1), kept.split(heights, 1)):
            flat = torch.ones(part.numel(), dtype=torch.bool)
            flat[part.t().reshape(-1).sort(stable=True)[1][:count]] = False
            assert torch.equal(found_part.cpu() != 0, flat.view(-1, size).t() & before)


@pytest.mark.parametrize("units", [1, 5, 300, 1000])
def test_masks_by_row(device, units):
    scores = values(6 * units, seed=units).view(6, units)
    for k in (units // 3, torch.arange(6) * units // 5):
        found = keep_mask_by_row(scores.to(device), k)
        with without_kernels():
            assert torch.equal(found.cpu(), keep_mask_by_row(scores, k))
    scores[4, units // 2] = torch.nan
    with pytest.raises(ValueError, match="must not be NaN"):
        keep_mask_by_row(scores.to(device), 1)
