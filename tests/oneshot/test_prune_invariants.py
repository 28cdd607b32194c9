"""Invariants of one-shot pruning: exact counts, zeros that are +0.0, no other change of the model, and independence of
how the data are split into batches."""

import itertools

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.tiny import bits_equal, weights
from torch import nn

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.config import PruningConfigError
from hf_sparse.oneshot.layerwise import LayerPruner


PATTERNS = ["unstructured", "2:4", "1:4", "4x1", "2x2", "channel", "channel:in"]
METHODS = [*itertools.product(["wanda", "magnitude", "snip", "fisher", "random"], ["none", "sparsegpt"])]
METHODS += [(None, "sparsegpt"), ("taylor", "none"), ("gradient", "none")]
IMPLIED = {"2:4": 0.5, "1:4": 0.75}


def pruned(model, batches, **options):
    """A report; None if the options are refused."""
    try:
        config = OneshotConfig(**options)
        return prune_oneshot(model, batches, config, progress=False)
    except PruningConfigError as error:
        assert any(
            word in str(error) for word in ("scope", "cannot select", "allocation", "`forwards` has no effect")
        ), error
        return None


def lock(model, names):
    """Make about a third of each weight zero, one of them -0.0."""
    generator = torch.Generator().manual_seed(5)
    for name in names:
        weight = model.get_parameter(name).data
        zeros = torch.rand(weight.shape, generator=generator) < 0.3
        weight[zeros] = 0.0
        weight.view(-1)[0] = -0.0


def groups_of(matrix_RC, of):
    return (matrix_RC != 0).reshape(len(matrix_RC), -1, of).sum(-1)


def units_gone(weight, pattern, kind):
    """The number of zero units and of all units, counted by the definition of the pattern."""
    total = gone = 0
    for matrix in weight if weight.ndim == 3 else [weight]:
        kept = (matrix.t() if kind in ("conv1d", "experts_transposed") else matrix) != 0
        high, wide = {"4x1": (4, 1), "2x2": (2, 2)}.get(pattern, (1, 1))
        high, wide = {"channel": (1, kept.shape[1]), "channel:in": (kept.shape[0], 1)}.get(pattern, (high, wide))
        units = kept.reshape(kept.shape[0] // high, high, kept.shape[1] // wide, wide).any(3).any(1)
        total, gone = total + units.numel(), gone + int((~units).sum())
    return gone, total


def check(model, before, report, options):
    names = {layer.name for layer in report.layers}
    for name, tensor in model.state_dict().items():
        if name not in names:
            assert bits_equal(tensor, before[name]), f"{name} was touched"
    gone = total = 0
    for layer in report.layers:
        weight, old = model.get_parameter(layer.name).detach(), before[layer.name]
        zero = weight == 0
        assert layer.zeros == int(zero.sum()) and not torch.signbit(weight[zero & (old != 0)]).any()
        if options["solver"] == "none":
            assert bits_equal(weight[~zero], old[~zero]), f"kept weights of {layer.name} changed"
        if options.get("keep_zeros"):
            assert zero[old == 0].all()
        kind = "conv1d" if ".c_" in layer.name else "linear"
        matrix = weight.t() if kind == "conv1d" else weight
        if ":" in options["pattern"] and options["pattern"] != "channel:in":
            keep, of = map(int, options["pattern"].split(":"))
            left = groups_of(matrix, of)
            most = groups_of(old.t() if kind == "conv1d" else old, of) if options.get("keep_zeros") else keep
            assert torch.equal(left, torch.full_like(left, keep).clamp(max=torch.as_tensor(most)))
        else:
            found = units_gone(weight, options["pattern"], kind)
            gone, total = gone + found[0], total + found[1]
    assert gone == round(options.get("target_sparsity", 0) * total)


@pytest.mark.parametrize("forwards", [2, 1])
@pytest.mark.parametrize("criterion, solver", METHODS)
def test_every_method_with_every_pattern_scope_and_allocation(criterion, solver, forwards):
    """Scopes and allocations change with the pattern, so that each is combined with each method, but not with all."""
    turn = METHODS.index((criterion, solver)) + forwards
    scopes = itertools.islice(itertools.cycle(["row", "layer", "global", None]), turn, None)
    allocations = itertools.cycle(["uniform", "owl"])
    architecture, count = ARCHITECTURES["gpt2"], 0
    language = architecture.batches(4)
    for pattern, keep_zeros in itertools.product(PATTERNS, [False, True]):
        scope = next(scopes)
        if keep_zeros and pattern not in ("unstructured", "2:4", "1:4"):
            continue
        scope = None if pattern in IMPLIED and not keep_zeros else scope
        options = {"pattern": pattern, "criterion": criterion, "solver": solver, "scope": scope}
        options |= {"keep_zeros": keep_zeros, "forwards": forwards}
        if pattern not in IMPLIED:
            options |= {"target_sparsity": 0.6, "allocation": next(allocations)}
        if forwards == 1 and criterion is not None and pattern in ("unstructured", "2:4", "1:4"):
            options["swaps"] = 2
        model = architecture.model()
        if keep_zeros:
            lock(model, [name for name, _ in model.named_parameters() if ".c_" in name and "weight" in name])
        before = weights(model)
        report = pruned(model, language, **options)
        if report is not None:
            check(model, before, report, options)
            count += 1
    assert count >= 3


def test_groups_prune_what_they_name_and_nothing_else():
    model = ARCHITECTURES["llama"].model()
    before = weights(model)
    groups = {
        "attention": {"targets": ["*.q_proj", "*.k_proj"], "target_sparsity": 0.25, "criterion": "wanda"},
        "mlp": {"targets": ["*.layers.1.mlp.*"], "pattern": "2:4", "solver": "sparsegpt"},
        "out": {"targets": ["*.o_proj"], "target_sparsity": 0.75, "criterion": "magnitude", "scope": "global"},
    }
    report = prune_oneshot(model, ARCHITECTURES["llama"].batches(), OneshotConfig(groups=groups), progress=False)
    for layer in report.layers:
        expected = {"q_proj": 0.25, "k_proj": 0.25, "o_proj": None}.get(layer.name.split(".")[-2], 0.5)
        assert expected is None or layer.sparsity == expected
    out = [layer for layer in report.layers if layer.group == "out"]
    assert sum(layer.zeros for layer in out) == round(0.75 * sum(layer.weights for layer in out))
    names = {layer.name for layer in report.layers}
    assert all(bits_equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name not in names)


def state_of(model):
    """All state of the modules that a run may change, except weights."""
    modules = {}
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), module.__dict__.get("forward")]
        modules[name] = [module.training, *hooks, sorted(module.__dict__)]
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    return modules, flags, model.config.use_cache, experts, torch.is_grad_enabled()


@pytest.mark.parametrize(
    "options", [{}, {"solver": "sparsegpt"}, {"criterion": "snip"}, {"allocation": "owl"}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_state_of_modules_is_restored(name, options, monkeypatch):
    """Some modules are in training mode, others not; also after an exception during the run."""
    architecture = ARCHITECTURES[name]
    options = {"on_unreached": "magnitude", "target_sparsity": 0.5} | options
    for broken in (None, "prune_layers", "prune_without_inputs"):
        model = architecture.model().train()
        model.model.layers[0].eval()
        model.config.use_cache = True
        before = state_of(model)
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(LayerPruner, broken, _after(2, getattr(LayerPruner, broken)))
            try:
                prune_oneshot(model, architecture.batches(), OneshotConfig(**options), progress=False)
            except KeyboardInterrupt:
                pass
            else:
                assert broken is None or (broken == "prune_without_inputs") != (options.get("criterion") == "snip")
        assert state_of(model) == before


def _after(calls, real):
    count = itertools.count(1)

    def spy(*args, **kwargs):
        if next(count) == calls:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return spy


def test_hidden_states_and_attentions_of_transformers_change_nothing():
    """transformers puts hooks on blocks to collect them, which stopped forwards must not break."""
    architecture = ARCHITECTURES["bert"]
    plain, wrapped = architecture.model(), architecture.model()
    wrapped.config.output_hidden_states = True
    wrapped.set_attn_implementation("eager")
    wrapped.config.output_attentions = True
    hidden = wrapped(**architecture.batches()[0]).hidden_states
    before = state_of(wrapped)
    for model in (plain, wrapped):
        prune_oneshot(model, architecture.batches(), OneshotConfig(target_sparsity=0.5), progress=False)
    assert state_of(wrapped) == before
    assert all(torch.equal(wrapped.state_dict()[name] == 0, plain.state_dict()[name] == 0) for name in weights(plain))
    again = wrapped(**architecture.batches()[0]).hidden_states
    assert len(again) == len(hidden) == 3 and not torch.equal(again[2], hidden[2])


def masks(name, batches, **options):
    model = ARCHITECTURES[name].model()
    report = prune_oneshot(model, batches, OneshotConfig(**{"target_sparsity": 0.5} | options), progress=False)
    return {layer.name: model.get_parameter(layer.name) != 0 for layer in report.layers}


def same_masks(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def cut(batch, sizes):
    parts = zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


@pytest.mark.parametrize(
    "options", [{}, {"solver": "sparsegpt"}, {"scope": "global", "swaps": 3}, {"allocation": "owl"}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5"])
def test_the_same_data_in_other_batches_or_another_order_give_the_same_masks(name, options):
    batches = ARCHITECTURES[name].batches(4)
    options = {"on_unreached": "magnitude"} | options
    expected, whole = masks(name, batches, **options), joined(batches)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    shuffled = {key: tensor[order] for key, tensor in whole.items()}
    for other in ([whole], cut(whole, [1, 7, 4]), batches[::-1], cut(shuffled, [5, 5, 2])):
        assert same_masks(masks(name, other, **options), expected)


@pytest.mark.parametrize("options", [{}, {"solver": "sparsegpt"}, {"forwards": 1}, {"allocation": "owl"}], ids=str)
@pytest.mark.parametrize("name, side", [("bert", "right"), ("llama", "left"), ("t5", "right")])
def test_padding_has_no_effect(name, side, options):
    """Neither its tokens nor their number."""
    batches = ARCHITECTURES[name].batches(4)
    expected = masks(name, batches, **options)
    other, more = [], []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        other.append(batch | {"input_ids": torch.where(mask.bool(), ids, 47 - ids)})
        added = [(ids, torch.full((len(ids), 3), 9)), (mask, torch.zeros(len(ids), 3, dtype=torch.long))]
        ids, mask = (torch.cat(pair if side == "right" else pair[::-1], dim=1) for pair in added)
        more.append(batch | {"input_ids": ids, "attention_mask": mask})
    assert same_masks(masks(name, other, **options), expected)
    assert same_masks(masks(name, more, **options), expected)


@pytest.mark.parametrize("kind", ["in place", "activation in place"])
def test_blocks_may_write_to_their_inputs(kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act = nn.Linear(8, 8), nn.ReLU(inplace=True)

        def forward(self, x):
            if kind == "in place":
                x += self.up(x)
                return x
            return self.up(self.act(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    batches = [torch.randn(12, 8) for _ in range(3)]
    kept = [batch.clone() for batch in batches]
    expected, inputs = {name: weight.clone() for name, weight in model.state_dict().items()}, kept
    for number in range(3):
        with torch.no_grad():
            block = Block()
            block.load_state_dict({key: expected[f"{number}.{key}"] for key in ("up.weight", "up.bias")})
            seen = torch.cat(inputs) if kind == "in place" else torch.cat(inputs).relu()
            weight = expected[f"{number}.up.weight"]
            scores = weight.abs() * seen.norm(dim=0)
            weight[scores <= scores.kthvalue(4, dim=1, keepdim=True)[0]] = 0.0
            block.up.weight.copy_(weight)
            inputs = [block(x.clone()) for x in inputs]
    prune_oneshot(model, batches, OneshotConfig(target_sparsity=0.5), progress=False)
    assert all(torch.equal(left, right) for left, right in zip(batches, kept, strict=True)), "the data changed"
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
