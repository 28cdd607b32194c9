"""Evaluation mode holds within a context, and every setting returns after it."""

from helpers.architectures import ARCHITECTURES

from hf_sparse.model.evaluation_mode import evaluation_mode


def test_settings_return_also_after_an_exception():
    model = ARCHITECTURES["qwen3_moe"].model().train()
    model.config.use_cache = True
    model.model.layers[1].mlp.eval()
    model.set_experts_implementation("grouped_mm")
    for raising in (False, True):
        try:
            with evaluation_mode(model):
                assert not any(module.training for module in model.modules())
                assert model.config.use_cache is False and model.config._experts_implementation == "eager"
                if raising:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert model.config.use_cache is True and model.config._experts_implementation == "grouped_mm"
        assert model.training and not model.model.layers[1].mlp.training and model.model.layers[0].mlp.training
