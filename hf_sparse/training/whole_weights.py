"""Loads and saves models whole in a process whose own model is split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


@contextmanager
def loading_whole_weights(accelerator: Any) -> Iterator[None]:
    """Within, `from_pretrained` does not split weights over ranks, as it does in a process that uses ZeRO-3."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            set_hf_deepspeed_config(plugin.hf_ds_config)


@contextmanager
def saving_whole_weights(accelerator: Any) -> Iterator[None]:
    """Within, Trainer saves the whole model under FSDP, also where `state_dict_type` asks for shards, which
    `from_pretrained` cannot open."""
    plugin = accelerator.state.fsdp_plugin
    given = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.state_dict_type = given
