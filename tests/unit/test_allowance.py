from __future__ import annotations

from relay.upstream.allowance import PAUSE, Allowance


def test_as_many_as_the_settings_say_until_one_is_turned_away() -> None:
    allowance = Allowance(4)
    for used in range(4):
        assert allowance.room(used)
    assert not allowance.room(4)
    allowance.sweep(1e9)
    assert not allowance.room(4)
    assert not allowance.reduced


def test_then_as_many_as_stood() -> None:
    allowance = Allowance(4)
    allowance.turned_away(2, 100.0)
    assert allowance.reduced
    assert allowance.limit == 2
    assert allowance.room(1)
    assert not allowance.room(2)
    allowance.sweep(100.0 + PAUSE - 0.1)
    assert not allowance.room(2)


def test_after_the_pause_one_more_is_tried_and_one_more_only() -> None:
    allowance = Allowance(4)
    allowance.turned_away(2, 100.0)
    allowance.sweep(100.0 + PAUSE)
    assert allowance.room(2)
    assert not allowance.room(3)
    allowance.turned_away(2, 111.0)
    allowance.sweep(112.0)
    assert not allowance.room(2)


def test_one_that_stands_is_followed_by_another_up_to_what_the_settings_say() -> None:
    allowance = Allowance(4)
    allowance.turned_away(1, 100.0)
    allowance.sweep(100.0 + PAUSE)
    for standing in (2, 3):
        allowance.opened(standing)
        assert allowance.room(standing)
        assert not allowance.room(standing + 1)
    allowance.opened(4)
    assert not allowance.reduced
    assert not allowance.room(4)


def test_one_that_is_opened_within_what_is_known_tells_nothing() -> None:
    allowance = Allowance(4)
    allowance.turned_away(2, 100.0)
    allowance.opened(2)
    assert allowance.limit == 2
    assert not allowance.room(2)
    allowance.turned_away(1, 101.0)
    assert allowance.limit == 1


def test_that_there_may_be_fewer_is_news_once() -> None:
    allowance = Allowance(4)
    assert not allowance.sweep(99.0)
    allowance.turned_away(3, 100.0)
    allowance.turned_away(2, 100.1)
    assert allowance.sweep(101.0)
    assert not allowance.sweep(100.0 + PAUSE + 1)
    allowance.turned_away(2, 112.0)
    assert not allowance.sweep(113.0), "as few as before"
    allowance.sweep(112.0 + PAUSE)
    allowance.opened(3)
    assert not allowance.sweep(123.0), "more is no news"
    allowance.turned_away(2, 124.0)
    assert allowance.sweep(125.0)
