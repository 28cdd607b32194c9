"""What `shrink` removes and keeps where layers differ, what the caller can name, and what it refuses."""

import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import BertModel, CohereConfig, CohereForCausalLM, Olmo2Config, Olmo2ForCausalLM

from hf_sparse.model.coupling import find_unit_groups
from hf_sparse.structured.obstacles import shrink_obstacle
from hf_sparse.structured.reduction import ShrinkError
from hf_sparse.structured.shrink import plan_shrink, shrink
from hf_sparse.structured.slicing import KeptEntries
from tests.helpers.model_types import GROUPED, MODEL_TYPES
from tests.structured.test_shrink_contract import assert_close, first_output, generate, prune


@torch.no_grad()
def zero_columns(weight: nn.Parameter, columns) -> None:
    weight[:, columns] = 0


def shrunk_like(name: str, dense: nn.Module, **options) -> nn.Module:
    """The shrunk model, after its outputs have been compared with those of the dense one."""
    small = shrink(dense, verify=False, **options)
    inputs = MODEL_TYPES[name].inputs()
    assert_close(first_output(small, inputs), first_output(dense, inputs))
    return small


def test_the_layer_that_uses_most_neurons_decides_and_the_plan_says_what_it_costs():
    dense = MODEL_TYPES["bert"].make()
    for layer, zeros in zip(dense.bert.encoder.layer, (20, 13, 9), strict=True):
        zero_columns(layer.output.dense.weight, torch.randperm(24)[:zeros])
    plan = plan_shrink(dense)
    # 24 - 9 = 15 neurons are in use in the last layer, a multiple of 8 is 16; a neuron has 32 + 1 + 32 parameters.
    assert [(change.before, change.after) for change in plan.changes] == [(24, 16)]
    assert plan.changes[0].detail == "9 to 20 of 24 neurons are zero in 3 modules"
    assert plan.parameters[0] - plan.parameters[1] == 3 * 8 * 65
    assert plan.num_bytes == tuple(4 * count for count in plan.parameters)
    assert plan.kept == (
        f"18 neurons ({18 * 65:,} parameters): intermediate_size is one size for 3 modules, and 15 are in use in one; "
        "it is a multiple of 8.",
    )
    assert "24 -> 16" in str(plan) and "zero, but kept:" in str(plan)
    assert sum(parameter.numel() for parameter in shrunk_like("bert", dense).parameters()) == plan.parameters[1]
    assert shrunk_like("bert", dense, multiple_of=5).config.intermediate_size == 15
    assert shrunk_like("bert", dense, multiple_of=64).config.intermediate_size == 24


def test_a_model_without_zeros_stays_and_one_of_zeros_keeps_a_unit_of_each_size():
    dense = MODEL_TYPES["t5"].make()
    plan = plan_shrink(dense)
    assert not plan.changes and not plan.kept and "nothing is removed." in str(plan)
    with torch.no_grad():
        for kind in ("neuron", "head", "layer"):
            for group in find_unit_groups(dense, kind):
                for part in group.slices:
                    dense.get_parameter(part.name).zero_()
    config = shrunk_like("t5", dense).config
    # The first blocks have the position biases.
    assert (config.num_layers, config.num_decoder_layers, config.d_ff, config.num_heads) == (1, 1, 8, 1)


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_units_that_are_always_zero_are_removed_though_something_reads_them(name):
    """Rows of gate and up, or of queries, keys and values. Without a gate, act(0) is not known."""
    dense = MODEL_TYPES[name].make()
    with torch.no_grad():
        for kind in MODEL_TYPES[name].kinds:
            for group in find_unit_groups(dense, kind) if kind != "layer" else ():
                units = torch.arange(group.num_units // 2)
                for part in group.slices:
                    if not part.reads:
                        whole = dense.get_parameter(part.name)
                        whole = whole if part.expert is None else whole[part.expert]
                        whole.index_fill_(part.dim - (part.expert is not None), part.indices(units), 0)
    small = shrunk_like(name, dense, multiple_of=4)
    gated = name != "bert"
    assert small.config.intermediate_size == (12 if gated else 24)
    assert small.config.num_attention_heads == (2 if gated else 4)


@pytest.mark.parametrize("name", ["t5", "modernbert"])
def test_a_first_block_with_parameters_of_its_own_stays(name):
    dense = MODEL_TYPES[name].make()
    groups = {group.name: group for group in find_unit_groups(dense, "layer")}
    stack = MODEL_TYPES[name].stacks[0]
    with torch.no_grad():
        for part in groups[f"{stack}.0"].slices:
            dense.get_parameter(part.name).zero_()
    plan = plan_shrink(dense)
    assert not plan.layers and f'block 0 of "{stack}": the blocks after it have other parameters' in plan.kept[0]
    with pytest.raises(ShrinkError, match=r"block 0 has other parameters .* `layers=\[0, 1, 2\]`"):
        shrink(dense, layers={stack: [1, 2]})


def test_the_number_of_heads_is_one_that_the_config_allows():
    dense = MODEL_TYPES["llama"].make(num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    for layer in dense.model.layers:  # 3 of 8 heads are in use, and 32 is no multiple of 3
        zero_columns(layer.self_attn.o_proj.weight, slice(16, 56))
    plan = plan_shrink(dense)
    assert [(change.field, change.before, change.after) for change in plan.changes] == [("num_attention_heads", 8, 4)]
    assert "3 are in use in one; the config allows no size between." in plan.kept[0]
    config = shrunk_like("llama", dense).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 8)


def test_layers_are_renumbered_with_their_types():
    dense = MODEL_TYPES["qwen3"].make(num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2)
    small = shrink(dense, layers=[0, 3])
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert dense.config.num_hidden_layers == len(dense.config.layer_types) == 4


def test_blocks_without_experts_keep_their_place():
    """Every second block has experts: blocks 1 and 3, and of them 3 is in `mlp_only_layers`."""
    dense = MODEL_TYPES["qwen3_moe"].make(num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[3])
    small = shrink(dense, layers=[1, 2, 3, 4])
    assert small.config.mlp_only_layers == [1, 2, 3] and small.config.decoder_sparse_step == 1
    assert [hasattr(layer.mlp, "experts") for layer in small.model.layers] == [True, False, False, False]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_are_named_are_as_if_the_router_never_chose_the_others(name):
    dense = MODEL_TYPES[name].make()
    kept = {0: [0, 3], 1: [1, 2], 2: [2, 3]}
    small = shrink(dense, experts=kept)
    assert small.config.num_local_experts == 2
    removed = {}
    for number, layer in enumerate(dense.model.layers):
        if hasattr(layer.mlp, "experts"):
            removed[id(layer.mlp.gate.weight)] = [expert for expert in range(4) if expert not in kept[number]]
    linear = nn.functional.linear

    def without(hidden, weight, bias=None):
        logits = linear(hidden, weight, bias)
        logits[:, removed.get(id(weight), [])] = float("-inf")
        return logits

    inputs = MODEL_TYPES[name].inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", without)
        expected = first_output(dense, inputs)
        tokens = generate(dense, inputs)
    assert_close(first_output(small, inputs), expected)
    assert generate(small, inputs) == tokens
    assert not torch.equal(expected, first_output(dense, inputs))


def test_widths_of_experts_are_multiples_of_16_bytes():
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 8)):
        dense = MODEL_TYPES["mixtral"].make().to(dtype)
        for layer in dense.model.layers:
            with torch.no_grad():
                layer.mlp.experts.down_proj[:, :, 3:] = 0
        small = shrink(dense, multiple_of=1)
        assert small.config.intermediate_size == width and small.dtype == dtype


def test_what_belongs_to_the_model_is_kept():
    dense = BertModel(MODEL_TYPES["bert"].make().config, add_pooling_layer=False).train()
    for layer in dense.encoder.layer:
        zero_columns(layer.output.dense.weight, slice(8, 24))
    dense.embeddings.requires_grad_(False)
    small = shrink(dense)
    assert small.pooler is None and small.training and dense.training
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in small.named_parameters() if name.startswith("embeddings")}
    with torch.no_grad():
        small.embeddings.word_embeddings.weight.zero_()
    assert dense.embeddings.word_embeddings.weight.any()  # the models share no memory

    dense = MODEL_TYPES["gpt2"].make()
    dense.generation_config.max_new_tokens = 5
    small = shrink(dense, layers=[0, 1])
    assert small.generation_config.max_new_tokens == 5 and small.generation_config is not dense.generation_config
    assert small.lm_head.weight is small.transformer.wte.weight


def test_types_that_are_not_in_the_table_are_tried_by_building():
    dense = CohereForCausalLM(CohereConfig(**GROUPED)).eval()
    assert [shrink_obstacle(dense, kind) for kind in ("neuron", "head")] == [None, None]
    prune(dense, ("neuron", "head"))
    small = shrink(dense)
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (8, 1)
    dense = Olmo2ForCausalLM(Olmo2Config(**GROUPED)).eval()  # its norms of queries and keys span all heads
    reason = 'num_attention_heads in the config of a "olmo2" model does not set the number of heads alone'
    assert shrink_obstacle(dense, "head").startswith(reason) and "Prune neurons" in shrink_obstacle(dense, "head")
    prune(dense, ("neuron", "head"))
    plan = plan_shrink(dense)
    assert [change.field for change in plan.changes] == ["intermediate_size"] and reason in plan.kept[0]
    assert shrink_obstacle(dense, "layer").startswith("whether a block of zeros is the identity is not known")


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("bert", "head", 'the config of a "bert" model has no field for fewer heads .* to a quarter instead'),
        ("bart", "layer", r'"bart" model has norms on its residual stream \(post-norm\).*with `layers`'),
    ],
)
def test_an_obstacle_is_known_before_training_and_without_weights(name, kind, reason):
    model = MODEL_TYPES[name].make().to("meta")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(shrink_obstacle(model, kind))
    assert shrink_obstacle(model, "neuron") is None


def test_opt_says_by_its_config_where_its_norms_are():
    assert shrink_obstacle(MODEL_TYPES["opt"].make(), "layer") is None
    assert "post-norm" in shrink_obstacle(MODEL_TYPES["opt"].make(do_layer_norm_before=False), "layer")


def test_a_wrong_coupling_is_never_returned(monkeypatch):
    dense = MODEL_TYPES["llama"].make()
    prune(dense, ("neuron",))
    remove = KeptEntries.remove_units
    others = [(0, torch.arange(16))]
    monkeypatch.setattr(KeptEntries, "remove_units", lambda self, group, units: remove(self, group, others[0][1]))
    with pytest.raises(ShrinkError, match=r"outputs of the shrunk LlamaForCausalLM differ .* Do not use the result"):
        shrink(dense)
    assert shrink(dense, verify=False).config.intermediate_size == 8


def test_a_model_whose_inputs_are_not_known_is_not_compared(caplog, monkeypatch):
    dense = MODEL_TYPES["llama"].make()
    monkeypatch.setattr(type(dense), "main_input_name", "input_values")
    with caplog.at_level(logging.WARNING):
        shrink(dense)
    assert "LlamaForCausalLM was not compared with the dense model: it needs input_values" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_of_half_precision_are_compared_within_its_rounding(dtype):
    dense = MODEL_TYPES["qwen2"].make().to(dtype)
    prune(dense, ("neuron", "head"))
    assert shrink(dense).dtype == dtype


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"layers": [0, 3]}, r'`layers` is \[0, 3\] for "model.layers": .* from 0 to 2'),
        ("llama", {"layers": [1, 0]}, "in increasing order"),
        ("llama", {"layers": []}, "must list the blocks to keep"),
        ("t5", {"layers": [0]}, r'"encoder.block", "decoder.block". Pass a mapping'),
        (
            "bart",
            {"layers": {"coder": [0]}},
            '`layers` names "coder", but the lists of blocks whose length can change',
        ),
        ("llama", {"experts": [0]}, "no field of the config of LlamaForCausalLM is known"),
        ("mixtral", {"experts": [0, 4]}, r'`experts` is \[0, 4\] for "model.layers.0.mlp.experts"'),
        ("mixtral", {"experts": [1]}, "`experts` keeps 1, but 2 compute each token"),
        ("mixtral", {"experts": {0: [0, 1]}}, "`experts` has no entry for block 1"),
        ("mixtral", {"experts": {0: [0, 1], 1: [0, 1, 2], 2: [0, 1]}}, "the same number in every block"),
        ("llama", {"multiple_of": 0}, "`multiple_of` is 0: it must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(name, options, message):
    with pytest.raises(ShrinkError, match=message):
        plan_shrink(MODEL_TYPES[name].make(), **options)


def test_models_that_cannot_be_shrunk_are_refused():
    with pytest.raises(ShrinkError, match="Sequential is not a model of transformers.*model.module of DDP"):
        plan_shrink(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ShrinkError, match="is on the meta device: save the whole model"):
        plan_shrink(MODEL_TYPES["bert"].make().to("meta"))
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(MODEL_TYPES["llama"].make(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ShrinkError, match=r"adapters of PEFT: merge them first, with hf_sparse.merge_and_unload"):
        plan_shrink(adapted)
    assert [shrink_obstacle(adapted, kind) for kind in ("neuron", "head", "layer")] == [None] * 3


def test_a_language_model_inside_a_model_of_images_and_text_has_its_own_section():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = dict(MODEL_TYPES["gemma3_text"].options)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    dense = transformers.Gemma3ForConditionalGeneration(config).eval()
    prune(dense, ("neuron", "head", "layer"))
    small = shrink(dense)
    assert small.config.text_config.intermediate_size == 8
    # The field of the vision model is also the width of the FFN in its pooling head, which is no repeated block.
    assert small.config.vision_config.intermediate_size == 24
    assert small.config.text_config.num_hidden_layers == len(small.config.text_config.layer_types) == 2
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    assert_close(first_output(small, inputs), first_output(dense, inputs))
