"""Lets `from_pretrained` open models whose layers have different sizes, see `hf_sparse.structured.uneven`.

transformers builds a model from its config and then loads the weights. A quantizer of transformers is called in
between: here it changes no weight, but gives layers their sizes. Importing this module registers it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..structured.uneven import QUANT_METHOD, SIZES_VERSION, apply_sizes


class HeterogeneousConfig(QuantizationConfigMixin):
    """The sizes of a model's layers, in its config.json as `quantization_config`.

    Raises:
        ValueError: the sizes are of a newer version, or are not valid.
    """

    def __init__(
        self,
        shapes: dict[str, list[int]],
        attributes: dict[str, dict[str, int]],
        version: int = SIZES_VERSION,
        **_: Any,
    ):
        if version != SIZES_VERSION:
            raise ValueError(f"the sizes of this model are of version {version}: it needs a newer hf_sparse.")
        if not isinstance(shapes, dict) or not isinstance(attributes, dict):
            raise ValueError(f'"quantization_config" in config.json is damaged: {type(shapes)}, {type(attributes)}.')
        for name, shape in shapes.items():
            if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError(f'"quantization_config" in config.json is damaged: shape of "{name}" is {shape!r}.')
        self.quant_method: Any = QUANT_METHOD
        self.version, self.shapes, self.attributes = version, shapes, attributes


class HeterogeneousQuantizer(HfQuantizer):
    """Gives the layers of a model their sizes before its weights are loaded."""

    requires_calibration = True  # The weights are final: nothing may quantize them while loading.

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        apply_sizes(model, {"shapes": config.shapes, "attributes": config.attributes})

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # The weights are ordinary ones, which may be cast.
        transformer: Any = model
        transformer.is_quantized = transformer.config._is_quantized = False
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


# Once: both functions refuse a name that is taken.
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(HeterogeneousConfig)
    register_quantizer(QUANT_METHOD)(HeterogeneousQuantizer)
