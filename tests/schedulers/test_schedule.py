"""When prune steps happen: the steps expected here are counted off by hand, or enumerated one by one."""

import itertools

import pytest

from hf_sparse.schedulers import PruningSchedule


def test_by_hand():
    # steps             1     2  3     4     5  6     7     8  9
    expected = [None, 1, None, None, 2, None, None, 3, 4, None]
    schedule = PruningSchedule(start=2, end=9, every=3)
    assert [schedule.prune_step(step) for step in range(1, 11)] == expected
    assert [schedule.done(step) for step in range(11)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("start, end, every", itertools.product((1, 3), (3, 4, 10, 17), (1, 2, 5, 100)))
def test_counts_from_one_to_total_and_ends_at_end(start, end, every):
    schedule = PruningSchedule(start, end, every)
    events = [(step, schedule.prune_step(step)) for step in range(1, end + every + 2) if schedule.prune_step(step)]
    assert [count for _, count in events] == list(range(1, schedule.total + 1))
    assert events[0][0] == start and events[-1][0] == end
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(events)]
    assert all(gap == every for gap in gaps[:-1]) and all(1 <= gap <= every for gap in gaps[-1:])
    for step in range(end + 3):
        assert schedule.done(step) == sum(event <= step for event, _ in events)


def test_the_answer_depends_on_the_step_alone():
    schedule = PruningSchedule(start=4, end=40, every=7)
    forwards = {step: schedule.prune_step(step) for step in range(1, 50)}
    assert {step: PruningSchedule(4, 40, 7).prune_step(step) for step in reversed(range(1, 50))} == forwards
    with pytest.raises(AttributeError):
        schedule.start = 5


@pytest.mark.parametrize(
    "settings, expected",
    [
        ((0.1, 0.5, 0.02, 200), (20, 100, 4)),
        ((20, 100, 4, 200), (20, 100, 4)),
        ((20, 0.5, 4.0, 200), (20, 100, 4)),
        ((0, 0.7, 0.01, 30), (1, 21, 1)),
        ((0, 0, 0, 30), (1, 1, 1)),
        ((0.0, 0.999, 0.5, 10), (1, 10, 5)),
        ((0.0, 0.7, 0.01, 1), (1, 1, 1)),
    ],
)
def test_below_one_is_a_fraction_of_training(settings, expected):
    assert PruningSchedule.from_fractions(*settings) == PruningSchedule(*expected)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="`prune_start` is step 5 and `prune_end` is step 4"):
        PruningSchedule(5, 4, 1)
    with pytest.raises(ValueError, match="`prune_start` is step 0"):
        PruningSchedule(0, 4, 1)
    with pytest.raises(ValueError, match="`prune_every` is 0 steps"):
        PruningSchedule(1, 4, 0)
    with pytest.raises(ValueError, match="`prune_end` is step 50, but training has 40 optimizer steps"):
        PruningSchedule.from_fractions(0, 50, 1, 40)
    with pytest.raises(ValueError, match="`prune_start` is step 50, but training has 40"):
        PruningSchedule.from_fractions(50, 60, 1, 40)
    with pytest.raises(ValueError, match="`prune_start` is step 30 and `prune_end` is step 20"):
        PruningSchedule.from_fractions(30, 0.5, 1, 40)
