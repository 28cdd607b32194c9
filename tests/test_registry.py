"""Registry: what is told about names that are unknown or taken."""

import pytest

from hf_sparse.registry import Registry, nearest


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


def test_an_unknown_name_is_told_the_known_and_the_nearest():
    colours = Registry("colour")
    colours.register("red")(dict)
    colours.register("green")(list)
    with pytest.raises(ValueError) as error:
        colours["gren"]
    assert str(error.value) == 'unknown colour "gren": known are green, red. Did you mean "green"?'
    with pytest.raises(ValueError, match='unknown colour "violet": known are green, red.$'):
        colours["violet"]
    assert nearest(7, ["red"]) == ""
