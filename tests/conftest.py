"""Nothing is downloaded, and tiny models train fast: one thread, no figures unless a test looks at them."""

import gc
import os
import tempfile
import time
import types


os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CI": "true",  # or OpenVINO's telemetry forks processes, which can crash
}
_cache = tempfile.TemporaryDirectory(prefix="hf_sparse_tests_")
os.environ["HF_HOME"] = _cache.name

import pytest  # noqa: E402 - the variables above are read when transformers is imported
import torch  # noqa: E402


class RestoreRegistries:
    """Removes the methods that a test or a doctest registers, so that no other one sees them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        from hf_sparse.cli.catalogue import FAMILIES

        families = [registry for registry, _ in FAMILIES]
        members = [dict(family._members) for family in families]
        try:
            return (yield)
        finally:
            for family, before in zip(families, members, strict=True):
                family._members = before


def pytest_configure(config):
    config.pluginmanager.register(RestoreRegistries())  # a hook of this file would not see the doctests of the package


@pytest.fixture(autouse=True, scope="session")
def fast():
    import hf_sparse  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # Trainer collects garbage at the start of every run, and what was imported is none


@pytest.fixture(params=["numpy", "torch"])
def library(request, monkeypatch):
    """Runs a test with the code for CPU memory and with the code for accelerators."""
    if request.param == "torch":
        monkeypatch.setattr("hf_sparse.numerics.NUMPY_DEVICES", ())


@pytest.fixture
def plots():
    """For tests that look at the figures of a run."""


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    if "plots" not in request.fixturenames:
        for name in ("plot_schedule", "plot_layers"):
            monkeypatch.setattr(f"hf_sparse.training.callback.{name}", lambda *args, **kwargs: None)


@pytest.fixture
def hub(monkeypatch):
    """A Hub of its own, which this process takes for the real one and may write to. Nobody waits between attempts."""
    import huggingface_hub
    import huggingface_hub.utils._http as http
    from helpers.hub_server import TOKEN, HubServer, speak_to

    import hf_sparse.hub.upload

    with HubServer() as server:
        speak_to(server.url, monkeypatch.setattr)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hf_sparse.hub.upload, "RETRY_DELAYS", (0, 0))
        monkeypatch.setattr(http, "time", types.SimpleNamespace(**vars(time) | {"sleep": lambda _: None}))
        yield server
    huggingface_hub.close_session()
