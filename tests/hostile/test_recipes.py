"""Recipes that were crafted or went wrong: one error with the name of the file, soon and in little memory."""

import json

import pytest
from helpers.bounds import Usage
from mutations import DEPTH, DIGITS

from hf_sparse import OneshotConfig, PruningConfig, PruningConfigError
from hf_sparse.files import parse_json


def nested(opening, closing):
    return f"target_sparsity: {opening * DEPTH}0{closing * DEPTH}"


BOMB = "\n".join(f"a{level}: &a{level} [{f'*a{level - 1},' * 9 if level else 'x'}]" for level in range(30))
MERGED = "m0: &m0 {x: 0}\n" + "\n".join(f"m{i}: &m{i} {{<<: [{f'*m{i - 1},' * 9}]}}" for i in range(1, 30))
CHAIN = "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 5_000))
LONG = f"a: &a {'x' * 100_000}\nb: [{'*a,' * 10_000}]"

YAML = {
    "aliases": (BOMB, "its aliases stand for too much"),
    "merges": (MERGED, "its aliases stand for too much"),
    "chain": (CHAIN, "its aliases stand for too much"),
    "long": (LONG, "its aliases stand for too much"),
    "cycle": ("groups: &a {b: *a}", "an alias stands for what it is a part of"),
    "lists": (nested("[", "]"), "nested more than 64 levels deep"),
    "mappings": ("groups: " + "{a: " * (DEPTH // 2), "nested more than 64 levels deep"),
    "sequences": ("- " * DEPTH, "nested more than 64 levels deep"),
    "keys": ("? " * DEPTH, "nested more than 64 levels deep"),
    "digits": (f"prune_end: {DIGITS}", "the number 9999999999... has 5,000 digits: at most 300"),
    "values": ("exclude: [" + "[]," * 80_000 + "]", "more than 20,000 keys and values: write it as JSON"),
    "size": (f"exclude: ['{'x' * 10**6}']", "more than 262,144 bytes"),
    "date": ("!!timestamp 2020-99-99: 1", "could not determine a constructor"),
    "number": ("prune_end: !!int x", '"x" is no int'),
    "truth": ("keep_zeros: !!bool x", '"x" is no bool'),
    "twice": ("target_sparsity: 0.5\npattern: 4x1\ntarget_sparsity: 0.9", 'the key "target_sparsity" is there twice'),
    "groups": ("groups:\n  a: {targets: [x]}\n  a: {targets: [y]}", 'the key "a" is there twice'),
    "quoted": ("groups: {a: {scope: row}, 'a': {scope: layer}}", 'the key "a" is there twice'),
}
JSON = {
    "lists": ("[" * DEPTH + "]" * DEPTH, "nested more than 64 levels deep"),
    "mappings": ('{"a":' * DEPTH + "0" + "}" * DEPTH, "nested more than 64 levels deep"),
    "few_levels": ("[" * 100 + "]" * 100, "nested more than 64 levels deep"),
    "digits": (f'{{"prune_end": {DIGITS}}}', "the number 9999999999... has 5,000 digits: at most 300"),
    "twice": ('{"prune_end": 5, "prune_end": 7}', 'the key "prune_end" is there twice'),
    "groups": ('{"groups": {"a": {"scope": "row"}, "a": {}}}', 'the key "a" is there twice'),
    "layer_sparsity": ('{"layer_sparsity": {"a": 0.5, "a": 0.6}}', 'the key "a" is there twice'),
    "half": ('{"prune_end": ', "cannot be read"),
}


@pytest.mark.parametrize(
    "name, text, words",
    [(f"recipe_{name}.yaml", *case) for name, case in YAML.items()]
    + [(f"recipe_{name}.json", *case) for name, case in JSON.items()],
    ids=lambda value: value if value.endswith((".yaml", ".json")) else "",
)
def test_crafted_recipes_are_refused_in_bounded_time_and_memory(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    for config in (PruningConfig, OneshotConfig):
        usage = Usage()
        with pytest.raises(PruningConfigError) as error:
            config.from_file(path)
        assert usage.excess() is None
        (reason,) = error.value.errors
        assert str(path) in reason and words in reason and len(reason) < 1_000


def test_anchors_within_bounds_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("groups:\n  a: &a {scope: row, targets: [x]}\n  b: {<<: *a, targets: [y]}\ntarget_sparsity: 0.5\n")
    assert PruningConfig.from_file(path).groups["b"] == {"scope": "row", "targets": ["y"]}


def test_a_long_recipe_is_read(tmp_path):
    layers = {f"model.layers.{number}.self_attn.q_proj": 0.5 for number in range(2_000)}
    for name in ("recipe.yaml", "recipe.json"):
        (tmp_path / name).write_text(json.dumps({"layer_sparsity": layers}, indent=1))
        assert len(OneshotConfig.from_file(tmp_path / name).groups) == len(layers)


@pytest.mark.parametrize("text, words", JSON.values(), ids=JSON)
@pytest.mark.parametrize("option", ["groups", "criterion_kwargs", "layer_sparsity"])
def test_options_that_are_given_as_json_are_read_as_strictly(option, text, words):
    config = OneshotConfig if option == "layer_sparsity" else PruningConfig
    with pytest.raises(PruningConfigError) as error:
        config(**{option: text})
    assert f"`{option}` is " in str(error.value) and len(str(error.value)) < 1_000
    assert words in str(error.value) or words == "cannot be read"


def test_the_error_of_an_option_of_a_recipe_names_the_file(tmp_path):
    path = tmp_path / "my_recipe.yaml"
    path.write_text("target_sparsity: 2\n")
    with pytest.raises(
        PruningConfigError, match=r"`target_sparsity` is 2: .*\(The options are those of .*my_recipe.yaml"
    ):
        PruningConfig.from_file(path)
    path.write_text("target_sparsity: 2\nscope: all\n")
    with pytest.raises(
        PruningConfigError, match=r"2 errors in the pruning config \(those of .*my_recipe.yaml and the"
    ):
        PruningConfig.from_file(path)


def test_a_message_has_a_bounded_number_of_errors():
    groups = {f"g{number}": {f"option{index}": 0 for index in range(30)} for number in range(1_000)}
    usage = Usage()
    with pytest.raises(PruningConfigError) as error:
        PruningConfig(target_sparsity=0.5, groups=groups)
    assert usage.excess() is None
    assert len(str(error.value)) < 50_000 and "The other groups were not checked." in error.value.errors


@pytest.mark.parametrize("option", ["prune_start", "prune_end", "prune_every", "target_sparsity", "initial_sparsity"])
@pytest.mark.parametrize("value", [10**400, 10**5_000, -(10**400), float("inf"), float("nan")], ids=lambda v: "")
def test_huge_numbers_are_refused(option, value):
    with pytest.raises(PruningConfigError, match=f"`{option}` is .*: it must be a (whole )?number"):
        PruningConfig(**{"target_sparsity": 0.5, option: value})


def test_json_within_bounds_is_read():
    assert parse_json('{"a": [1, 0.5, null, true, "x"], "b": {"a": 1e-3}}') == {
        "a": [1, 0.5, None, True, "x"],
        "b": {"a": 0.001},
    }
    assert parse_json("[" * 60 + "9" * 300 + "]" * 60) != []
