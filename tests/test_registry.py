"""Registries: unknown, taken and invalid members are refused, of every family."""

import re
from dataclasses import dataclass

import pytest

import hf_sparse
from hf_sparse import Allocation, Criterion, Pattern, Requires, Scheduler, Solver, register_criterion, register_pattern
from hf_sparse.allocations import ALLOCATIONS
from hf_sparse.criteria import CRITERIA
from hf_sparse.patterns import PATTERNS, get_pattern
from hf_sparse.patterns.block import Block
from hf_sparse.patterns.unstructured import Unstructured
from hf_sparse.registry import Registry, nearest
from hf_sparse.schedulers import CURVES, SCHEDULERS
from hf_sparse.solvers import SOLVERS


FAMILIES = {
    "criterion": (CRITERIA, Criterion),
    "pattern": (PATTERNS, Pattern),
    "scheduler": (SCHEDULERS, Scheduler),
    "allocation": (ALLOCATIONS, Allocation),
    "solver": (SOLVERS, Solver),
}
"""The registry and the base class of each family of classes."""


def test_members_by_name():
    colours = Registry("colour")

    @colours.register("red")
    class Red: ...

    colours.register("blue")(len)
    assert colours["red"] is Red and colours["blue"] is len
    assert colours.names() == ["blue", "red"]
    assert "red" in colours and "green" not in colours


def test_a_taken_name_is_refused_and_its_owner_named():
    colours = Registry("colour")
    red = colours.register("red")(dict)
    assert colours.register("red")(red) is red
    with pytest.raises(ValueError, match='colour "red" is already registered, by builtins.dict: choose another name'):
        colours.register("red")(list)
    assert colours["red"] is dict


def test_a_definition_that_runs_again_replaces_the_member():
    """As in a notebook, whose cell registers a class of the same name once more."""

    def run_cell(cls, base, name, register, **attributes):
        return register(name)(type(cls, (base,), {"__module__": "__main__", **attributes}))

    run_cell("Mine", Criterion, "mine", register_criterion, score=lambda self, weight, statistic: weight)
    again = run_cell("Mine", Criterion, "mine", register_criterion, score=lambda self, weight, statistic: -weight)
    assert CRITERIA["mine"] is again
    forms = {"syntax": "mine", "example": "mine"}
    run_cell("MyUnits", Unstructured, "mine", register_pattern, **forms)
    again = run_cell("MyUnits", Unstructured, "mine", register_pattern, **forms)
    assert type(get_pattern("mine")) is again
    with pytest.raises(ValueError, match='"mine" is already registered, by __main__.Mine'):
        run_cell("Other", Criterion, "mine", register_criterion, score=lambda self, weight, statistic: weight)


def test_the_error_about_an_unknown_name_has_the_known_and_the_nearest():
    colours = Registry("colour")
    colours.register("red")(dict)
    colours.register("green")(list)
    with pytest.raises(ValueError) as error:
        colours["gren"]
    assert str(error.value) == 'unknown colour "gren": known are green, red. Did you mean "green"?'
    with pytest.raises(ValueError, match='unknown colour "violet": known are green, red.$'):
        colours["violet"]
    assert nearest(7, ["red"]) == ""


# The families


@pytest.mark.parametrize("family", FAMILIES)
def test_registering_is_public(family):
    registry, base = FAMILIES[family]
    assert f"register_{family}" in hf_sparse.__all__ and base.__name__ in hf_sparse.__all__
    name = next(name for name in registry.names() if registry[name].__module__.startswith("hf_sparse"))
    assert getattr(hf_sparse, f"register_{family}")(name)(registry[name]) is registry[name]
    with pytest.raises(ValueError, match=f'{family} "{name}" is already registered, by hf_sparse'):
        getattr(hf_sparse, f"register_{family}")(name)(type("Other", (registry[name],), {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_another_base_class_are_refused(family):
    registry, base = FAMILIES[family]
    register = getattr(hf_sparse, f"register_{family}")
    for member in (dict, len, Unstructured() if family == "pattern" else Block):
        message = f'{family} "mine" must be a subclass of {base.__name__}, but is {member!r}.'
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            register("mine")(member)
    with pytest.raises(TypeError, match=f'{family} "mine" must define [a-z]+'):
        register("mine")(type("Incomplete", (base,), {}))
    assert "mine" not in registry


@pytest.mark.parametrize(
    "registry, parent, requires, error, message",
    [
        (
            CRITERIA,
            "wanda",
            Requires.DENSE_NORMS,
            ValueError,
            "but it can require Requires.NOTHING or Requires.POSITION",
        ),
        (CRITERIA, "wanda", Requires.POSITION | Requires.INPUT_NORMS, ValueError, "but it can require"),
        (CRITERIA, "wanda", Requires.GRAM, TypeError, "it must be a subclass of UnitCriterion"),
        (CRITERIA, "wanda", Requires.GRADIENTS, TypeError, "it must be a subclass of GradientCriterion"),
        (
            ALLOCATIONS,
            "uniform",
            Requires.GRADIENTS,
            ValueError,
            "can require Requires.NOTHING or Requires.DENSE_NORMS",
        ),
        (ALLOCATIONS, "uniform", Requires.DENSE_GRAM, TypeError, "it must be a subclass of MeasuringAllocation"),
        (SOLVERS, "none", Requires.INPUT_NORMS, ValueError, "can require Requires.NOTHING or Requires.GRAM."),
    ],
)
def test_requirements_that_nobody_provides_are_refused(registry, parent, requires, error, message):
    member = type("Mine", (registry[parent],), {"requires": requires})
    with pytest.raises(error, match=f'{registry.family} "mine" requires .*{re.escape(message)}'):
        registry.register("mine")(member)


def test_curves_of_another_signature_are_refused():
    for curve in (lambda t: t, lambda t, target, steps: t, 0.5):
        with pytest.raises(TypeError, match=r'curve "mine" is called as curve\(t, target\)|not a callable'):
            hf_sparse.register_curve("mine")(curve)
    assert "mine" not in CURVES
    with pytest.raises(ValueError, match='"linear" is already registered, by hf_sparse.schedulers.curves.linear'):
        hf_sparse.register_curve("linear")(lambda t, target: t)


# Text forms of patterns


def pattern_class(**attributes):
    return dataclass(frozen=True)(type("Mine", (Unstructured,), attributes))


@pytest.mark.parametrize(
    "syntax, example, text, other",
    [
        (r"\d+x\d+", "4x1", "4x1", "block"),
        (r"\d+x\d+", "16x16", "4x1", "block"),
        (r"[a-z]+", "mine", "channel", "channel"),
        (r"(?:tile )?(\d+):(\d+)", "tile 2:4", "2:4", "n_of_m"),
        (r"(\d+):(\d+)", "1:3", "2:4", "n_of_m"),
    ],
)
def test_patterns_with_forms_of_another_are_refused(syntax, example, text, other):
    message = f'pattern "a_tile" (syntax "{syntax}") also matches "{text}", a form of pattern "{other}": choose'
    with pytest.raises(ValueError, match=re.escape(message)):
        hf_sparse.register_pattern("a_tile")(pattern_class(syntax=syntax, example=example))
    assert get_pattern("4x1") == Block(4, 1)


def test_a_form_of_two_patterns_is_refused():
    """Where neither example shows that the forms overlap."""
    first = hf_sparse.register_pattern("first")(pattern_class(syntax=r"[st]\d", example="s1"))
    hf_sparse.register_pattern("second")(pattern_class(syntax=r"[tu]\d", example="u1"))
    assert type(get_pattern("s7")) is first
    with pytest.raises(ValueError, match='pattern "t3" is a form of first and of second: give an instance of one'):
        get_pattern("t3")


def test_patterns_without_a_valid_form_are_refused():
    with pytest.raises(ValueError, match=r'pattern "mine": its example "4y" must match its syntax "\\d\+z"'):
        hf_sparse.register_pattern("mine")(pattern_class(syntax=r"\d+z", example="4y"))

    class NoForm(Pattern):
        def unit_shape(self, shape_RPC):
            return shape_RPC

        def pool(self, scores_RPC):
            return scores_RPC

        def expand(self, keep_U, shape_RPC):
            return keep_U

    with pytest.raises(TypeError, match='pattern "mine" must define syntax, example'):
        hf_sparse.register_pattern("mine")(NoForm)


def test_what_an_earlier_version_called_needs_is_refused():
    with pytest.raises(TypeError, match='criterion "old" declares `needs`: declare `requires`'):

        @register_criterion("old")
        class Old(Criterion):
            needs = "gradient"

            def score(self, weight, statistic):
                return statistic
