"""What is selected by default in models of transformers, by name, and in which layout it is shown."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sparse.model.layers import PrunableLayer, find_layers, select_layers


BERT = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=8, num_labels=3,
)  # fmt: skip
BERT_LAYER = [
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
]  # fmt: skip


def build(model_class, config):
    """A model's structure, without its values."""
    with torch.device("meta"):
        return model_class(config)


def selected(model):
    layers, errors = select_layers(find_layers(model), None, None)
    assert not errors
    return {layer.name.removesuffix(".weight"): layer.kind for layer in layers}


def test_bert_is_its_body_without_embeddings_and_head():
    names = [f"bert.encoder.layer.0.{name}" for name in BERT_LAYER]
    model = build(BertForSequenceClassification, BERT)
    assert selected(model) == dict.fromkeys(names, "linear")
    body, _ = select_layers(find_layers(model), ["all-body"], None)
    assert [layer.module for layer in body] == [*names, "bert.pooler.dense"]
    assert select_layers(find_layers(model), ["all-blocks", "pooler.dense"], None)[0] == body
    untied = BertConfig(**BERT.to_dict() | {"tie_word_embeddings": False})
    assert selected(build(BertForMaskedLM, untied)) == dict.fromkeys(names, "linear")
    heads = [layer.module for layer in find_layers(build(BertForMaskedLM, untied)) if not layer.in_body]
    assert heads == ["cls.predictions.transform.dense", "cls.predictions.decoder"]


def test_a_task_head_can_be_named():
    layers = find_layers(build(BertForSequenceClassification, BERT))
    chosen, errors = select_layers(layers, ["classifier"], None)
    assert [layer.name for layer in chosen] == ["classifier.weight"] and not errors


def test_gpt2_is_conv1d_and_its_tied_head_is_left_out():
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    model = build(GPT2LMHeadModel, config)
    assert selected(model) == {f"transformer.h.0.{name}": "conv1d" for name in names}
    model.tie_weights()
    _, errors = select_layers(find_layers(model), ["lm_head"], None)
    assert '`targets`: "lm_head" matches none' in errors[0]


def test_t5_and_bart_have_encoder_and_decoder():
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )  # fmt: skip
    attention = ["q", "k", "v", "o"]
    names = [f"encoder.block.0.layer.0.SelfAttention.{name}" for name in attention]
    names += [f"encoder.block.0.layer.1.DenseReluDense.{name}" for name in ("wi", "wo")]
    names += [f"decoder.block.0.layer.0.SelfAttention.{name}" for name in attention]
    names += [f"decoder.block.0.layer.1.EncDecAttention.{name}" for name in attention]
    names += [f"decoder.block.0.layer.2.DenseReluDense.{name}" for name in ("wi", "wo")]
    model = build(T5ForConditionalGeneration, config)
    assert sorted(selected(model)) == sorted(names)

    config = BartConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=8,
    )  # fmt: skip
    attention = ["k_proj", "v_proj", "q_proj", "out_proj"]
    names = [f"encoder.layers.0.self_attn.{name}" for name in attention]
    names += [f"decoder.layers.0.{kind}.{name}" for kind in ("self_attn", "encoder_attn") for name in attention]
    names += [f"{side}.layers.0.{name}" for side in ("encoder", "decoder") for name in ("fc1", "fc2")]
    model = build(BartForConditionalGeneration, config)
    model.tie_weights()
    assert sorted(selected(model)) == sorted(f"model.{name}" for name in names)


def test_experts_are_three_dimensional_and_say_how_they_lie():
    size = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    attention = {f"model.layers.0.self_attn.{name}_proj": "linear" for name in "qkvo"}
    mixtral = selected(build(MixtralForCausalLM, MixtralConfig(**size)))
    experts = {f"model.layers.0.mlp.experts.{name}": "experts" for name in ("gate_up_proj", "down_proj")}
    assert mixtral == attention | experts
    gpt_oss = selected(build(GptOssForCausalLM, GptOssConfig(**size, head_dim=4)))
    assert gpt_oss == attention | dict.fromkeys(experts, "experts_transposed")


def test_vit_leaves_its_patch_embedding_out():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )  # fmt: skip
    names = list(selected(build(ViTForImageClassification, config)))
    assert len(names) == 6 and all(name.startswith("vit.") and "embed" not in name for name in names)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.second.weight, self.out.weight = self.first.weight, self.words.weight
        self.steps = nn.Linear(2, 2).to(torch.float8_e4m3fn)
        self.steps.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.conv = nn.Conv2d(4, 8, (3, 2))


def test_a_plain_module_with_tied_quantized_and_parametrized_weights():
    layers = find_layers(Tied())
    assert layers == [
        PrunableLayer("first.weight", "linear", (4, 4)),
        PrunableLayer("conv.weight", "conv2d", (8, 4, 3, 2)),
    ]


def test_globs_and_regular_expressions():
    layers = find_layers(build(BertForSequenceClassification, BERT))

    def modules(targets, exclude=None):
        chosen, errors = select_layers(layers, targets, exclude)
        assert not errors
        return [layer.module.removeprefix("bert.encoder.layer.0.") for layer in chosen]

    assert modules(["*.attention.*"]) == BERT_LAYER[:4]
    assert modules(["query", "key.weight"]) == BERT_LAYER[:2]
    assert modules([r"re:self\.(key|value)"]) == BERT_LAYER[1:3]
    assert modules(None, ["*.attention.*"]) == BERT_LAYER[4:]
    assert modules(["*"])[-1] == "classifier"
    # in the model's order, each once
    assert modules(["*.output.dense", "query", "query"]) == [BERT_LAYER[0], BERT_LAYER[3], BERT_LAYER[5]]


def test_faults_name_the_pattern_and_the_nearest_module():
    layers = find_layers(build(BertForSequenceClassification, BERT))
    _, errors = select_layers(layers, ["bert.pooler.dens", "re:("], ["nothing"])
    assert errors[0].startswith(
        '`targets`: "bert.pooler.dens" matches none of the 8 prunable parameters (such as bert.'
    )
    assert errors[0].endswith('Did you mean "bert.pooler.dense"?')
    assert errors[1].startswith('`targets`: "re:(" is not a regular expression')
    assert errors[2].startswith('`exclude`: "nothing" matches none')
    assert "nothing is left to prune" in select_layers(layers, ["classifier"], ["classifier"])[1][0]
    assert "(such as none)" in select_layers([], ["a"], None)[1][0]


@pytest.mark.parametrize(
    "kind, shape, matrix_shape",
    [
        ("linear", (5, 3), (5, 1, 3)),
        ("conv1d", (3, 5), (5, 1, 3)),
        ("conv2d", (5, 3, 2, 4), (5, 8, 3)),
        ("experts", (2, 5, 3), (5, 1, 3)),
        ("experts_transposed", (2, 3, 5), (5, 1, 3)),
    ],
)
def test_matrices_are_views_of_outputs_positions_and_inputs(kind, shape, matrix_shape):
    """Output o, position p, input i of the weight is entry (o, p, i), and writing there writes to the weight."""
    weight, layer = torch.zeros(shape), PrunableLayer("w", kind, shape)
    matrices = layer.matrices(weight)
    assert layer.matrix_shape == matrix_shape and {tuple(matrix.shape) for matrix in matrices} == {matrix_shape}
    assert len(matrices) == layer.num_matrices == (2 if kind.startswith("experts") else 1)
    assert (shape[layer.row_dim], shape[layer.column_dim]) == (5, 3)
    position = 5 if kind == "conv2d" else 0
    matrices[-1][4, position, 2] = 1.0
    place = {
        "linear": (4, 2),
        "conv1d": (2, 4),
        "conv2d": (4, 2, 1, 1),
        "experts": (1, 4, 2),
        "experts_transposed": (1, 2, 4),
    }[kind]
    assert weight[place] == 1 and weight.sum() == 1


def test_a_projection_of_embeddings_is_pruned_only_when_named_and_a_one_byte_weight_never():
    model = nn.ModuleDict({"embeddings_project": nn.Linear(4, 4), "body": nn.Linear(4, 4), "small": nn.Linear(4, 4)})
    model["small"].weight = nn.Parameter(model["small"].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    layers = find_layers(model)
    assert [layer.name for layer in select_layers(layers, None, None)[0]] == ["body.weight"]
    named = select_layers(layers, ["*embeddings*"], None)[0]
    assert [layer.name for layer in named] == ["embeddings_project.weight"]


def test_a_model_most_of_whose_weights_are_in_no_list_is_selected_as_a_whole():
    model = nn.ModuleDict({"trunk": nn.Linear(8, 8), "heads": nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 1)])})
    assert [layer.module for layer in select_layers(find_layers(model), None, None)[0]] == [
        *("trunk", "heads.0", "heads.1")
    ]
    model["heads"].append(nn.Linear(8, 8))
    assert [layer.module for layer in find_layers(model) if layer.in_blocks] == ["heads.0", "heads.1", "heads.2"]


def test_a_pooler_is_beside_the_blocks_whatever_the_model_is_wrapped_in():
    """As sentence-transformers does, where the model is an entry of an `nn.Sequential`."""
    model = nn.Sequential(build(BertModel, BERT), nn.Linear(8, 8))
    layers = find_layers(model)
    assert [layer.module for layer in layers if not layer.in_blocks] == ["0.pooler.dense", "1"]
