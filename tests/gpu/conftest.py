"""What only a CUDA device can show. Where the CPU runs the same code it does, with the code for accelerators, so that
these tests cannot rot where there is no GPU."""

import os

import pytest
import torch


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; products are then reproducible

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def environment():
    """Trainer and accelerate set variables for FSDP, which programs that other tests start would inherit, and TF32 for
    compiled models, which would make products of float32 coarser."""
    before, allows_tf32 = dict(os.environ), torch.backends.cuda.matmul.allow_tf32
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.backends.cuda.matmul.allow_tf32 = allows_tf32


interprets = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("interpreter", marks=pytest.mark.skipif(not interprets, reason="TRITON_INTERPRET is not 1")),
        pytest.param("cuda", marks=needs_cuda),
    ]
)
def device(request, monkeypatch):
    """The CPU, with the code for accelerators; the CPU with Triton's interpreter for kernels; and a GPU."""
    if request.param == "cuda":
        torch.cuda.manual_seed_all(0)
        return torch.device("cuda")
    monkeypatch.setattr("hf_sparse.numerics.NUMPY_DEVICES", ())
    if request.param == "interpreter":
        monkeypatch.setattr("hf_sparse.kernels.KERNEL_DEVICES", ("cpu",))
    return torch.device("cpu")


@pytest.fixture(params=[pytest.param("cuda", marks=needs_cuda)])
def cuda(request):
    """A GPU, for what does not exist on the CPU."""
    return torch.device(request.param)


@pytest.fixture
def reproducible():
    """Two runs of the same program give the same bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
