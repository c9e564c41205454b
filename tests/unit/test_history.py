"""The last hour in the process's own memory, on a clock of the test's."""

from __future__ import annotations

import sys

import pytest

from relay.history import MINUTES, History, quantile
from relay.metrics import DURATIONS, Metrics
from relay.outcome import Outcome

NOON = 1_795_176_000.0
"""A full minute of the clock."""
ACCEPTED, REJECTED = list(Outcome).index(Outcome.ACCEPTED), list(Outcome).index(Outcome.REJECTED)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(upstreams=["primary", "spare"], listeners=[], task_types=[])


def sent(metrics: Metrics, outcome: Outcome, times: int = 1, upstream: str = "primary") -> None:
    for _ in range(times):
        metrics.upstreams[upstream].finished((outcome, 1, 0.01, 0, 0, 0, 0))


def test_each_minute_has_what_was_counted_in_it(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON + 30)
    sent(metrics, Outcome.ACCEPTED, 2)
    history.look(NOON + 59)
    sent(metrics, Outcome.ACCEPTED, 1, "spare")
    history.look(NOON + 60.4)
    sent(metrics, Outcome.REJECTED, 4)
    history.look(NOON + 120.2)
    sent(metrics, Outcome.ACCEPTED, 8, "none")
    minutes = history.minutes(NOON + 125)
    assert len(minutes) == MINUTES
    assert [minute.begin for minute in minutes[-3:]] == [NOON, NOON + 60, NOON + 120]
    counted = [minute.outcomes for minute in minutes[-3:]]
    assert [(each[ACCEPTED], each[REJECTED]) for each in counted if each] == [(3, 0), (0, 4), (8, 0)]
    assert {minute.outcomes for minute in minutes[:-3]} == {None}, "the relay did not run"


def test_what_an_hour_has_seen_is_bounded_and_the_oldest_goes(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON)
    for second in range(0, 3 * 3600 + 1, 1):
        if second % 60 == 30:
            sent(metrics, Outcome.ACCEPTED, second // 60 + 1)
        history.look(NOON + second)
    minutes = history.minutes(NOON + 3 * 3600)
    assert [minute.outcomes[ACCEPTED] for minute in minutes if minute.outcomes] == [*range(122, 181), 0]
    assert len(history._minutes) == MINUTES + 1
    assert len(history._steps) == 13


def test_a_quiet_hour_takes_no_memory(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON)
    for second in range(4000):
        history.look(NOON + second)
    kept = {id(counts) for _, marks in (*history._minutes, *history._steps) for counts in marks.values()}
    assert len(kept) == len(metrics.counts())
    assert sys.getsizeof(history._minutes) < 2048


def test_minutes_in_which_nobody_looked_are_not_known(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON)
    sent(metrics, Outcome.ACCEPTED)
    history.look(NOON + 300)
    sent(metrics, Outcome.ACCEPTED)
    known = [minute for minute in history.minutes(NOON + 301) if minute.outcomes is not None]
    assert [minute.begin for minute in known] == [NOON, NOON + 300]


def test_the_last_minute_is_the_last_one(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON)
    for second in range(600):
        history.look(NOON + second)
        sent(metrics, Outcome.ACCEPTED, 3)
    stretch = history.last_minute(NOON + 600)
    assert 60 <= stretch.seconds <= 66
    assert stretch.counts["primary"].outcomes[ACCEPTED] == 3 * stretch.seconds
    five = history.last_minutes(5, NOON + 600)
    assert 300 <= five.seconds <= 360
    assert five.counts["primary"].outcomes[ACCEPTED] == 3 * five.seconds


def test_a_relay_that_has_just_started_knows_what_it_has_seen(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON)
    sent(metrics, Outcome.ACCEPTED, 7)
    assert history.last_minute(NOON + 2).seconds == 2
    assert history.last_minutes(5, NOON + 2).counts["primary"].outcomes[ACCEPTED] == 7


def test_a_clock_that_is_set_back_begins_anew(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON)
    sent(metrics, Outcome.ACCEPTED, 7)
    history.look(NOON - 3600)
    sent(metrics, Outcome.ACCEPTED, 1)
    known = [minute for minute in history.minutes(NOON - 3590) if minute.outcomes is not None]
    assert [minute.outcomes[ACCEPTED] for minute in known if minute.outcomes] == [1]


def test_an_upstream_that_came_later_is_counted(metrics: Metrics) -> None:
    history = History(metrics.counts, NOON)
    metrics.add_upstream("late")
    sent(metrics, Outcome.ACCEPTED, 5, "late")
    assert history.last_minute(NOON + 10).counts["late"].outcomes[ACCEPTED] == 5
    assert history.minutes(NOON + 10)[-1].outcomes == (5, 0, 0, 0, 0, 0, 0)


def test_quantiles_are_as_fine_as_their_bounds(metrics: Metrics) -> None:
    for seconds in (0.003,) * 50 + (0.04,) * 45 + (400.0,) * 5:
        metrics.upstreams["primary"].replied["end_of_data"](seconds)
    answers = metrics.counts()["primary"].answers
    assert quantile(answers, 0.5) == 0.005
    assert 0.025 < (quantile(answers, 0.9) or 0) <= 0.05
    assert quantile(answers, 0.99) == DURATIONS[-1]
    assert quantile((0,) * (len(DURATIONS) + 1), 0.5) is None
