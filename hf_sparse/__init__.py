"""hf_sparse: pruning inside Hugging Face Trainer."""

import lazy_loader

from .import_hooks import import_after


# A name is imported when it is first asked for: `hf-sparse --help` should not wait for torch and transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"


# So that from_pretrained opens models that were shrunk with `heterogeneous`.
import_after("transformers.quantizers.auto", "hf_sparse.hub.heterogeneous")
