"""The pace of long work: how much at a time, how long a rest."""

from __future__ import annotations

import pytest

from relay.records.pacing import LEAST, LONGEST_STEP_S, MOST, STEP_S, Pace


def settled(cost: float, *, commit: float = 0.0) -> Pace:
    """A pace after many steps whose every row takes `cost` seconds."""
    pace = Pace()
    for _ in range(100):
        pace.took(pace.work * cost, commit=commit, commits=True)
    return pace


@pytest.mark.parametrize("cost", [STEP_S / 300, STEP_S / 100, STEP_S / 30])
def test_a_step_becomes_as_long_as_it_may_be(cost: float) -> None:
    assert STEP_S / 3 < settled(cost).work * cost <= STEP_S * 1.5


def test_slower_commits_allow_longer_steps_up_to_a_bound() -> None:
    cost = STEP_S / 20
    assert settled(cost, commit=STEP_S * 3).work > settled(cost).work * 2
    assert settled(LONGEST_STEP_S / 30, commit=60.0).work * LONGEST_STEP_S / 30 <= LONGEST_STEP_S * 1.5


def test_work_has_bounds() -> None:
    assert settled(1.0).work == LEAST
    assert settled(0.0).work == MOST


def test_the_rest_is_longer_beside_commits() -> None:
    assert Pace().took(0.01, commit=0.0, commits=False) == pytest.approx(0.01)
    assert Pace().took(0.01, commit=0.0, commits=True) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("weights", "count"),
    [
        ([], 0),
        ([1], 1),
        ([LEAST], 1),
        ([LEAST + 1], 1),
        ([1000, 1], 1),
        ([LEAST - 1, 1, 1], 2),
        ([1] * 99, LEAST),
    ],
)
def test_a_step_has_at_least_one_item_and_no_more_than_fit(weights: list[int], count: int) -> None:
    assert Pace().first(weights) == count
