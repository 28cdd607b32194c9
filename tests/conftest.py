"""Nothing is downloaded, and one thread is enough for tiny models."""

import os
import tempfile


os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_cache = tempfile.TemporaryDirectory(prefix="hf_sparse_tests_")
os.environ["HF_HOME"] = _cache.name

import pytest  # noqa: E402 - the variables above are read when transformers is imported
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
