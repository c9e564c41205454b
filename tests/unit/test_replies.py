"""Replies go out in the order of their commands."""

from __future__ import annotations

from relay.reply import Reply
from relay.session.replies import Replies

ONE, TWO, THREE = (Reply.own(250, "0.0", word) for word in ("one", "two", "three"))


def test_a_reply_that_is_known_early_waits_for_those_before_it() -> None:
    written: list[bytes] = []
    replies = Replies(written.append, lambda: None)
    first, second = replies.owe(), replies.owe()
    replies.say(THREE)
    second(TWO)
    assert written == []
    assert len(replies.owed) == 3
    first(ONE)
    assert written == [ONE.wire + TWO.wire + THREE.wire]
    assert len(replies.owed) == 0


def test_a_place_is_filled_once() -> None:
    written: list[bytes] = []
    replies = Replies(written.append, lambda: None)
    answer = replies.owe()
    answer(ONE)
    answer(TWO)
    replies.say(THREE)
    assert written == [ONE.wire, THREE.wire]


def test_a_burst_of_replies_is_one_write() -> None:
    written: list[bytes] = []
    moved: list[int] = []
    replies = Replies(written.append, lambda: moved.append(len(replies.owed)))
    first, second, third = replies.owe(), replies.owe(), replies.owe()
    replies.burst(True)
    first(ONE)
    second(TWO)
    assert written == []
    replies.burst(False)
    assert written == [ONE.wire + TWO.wire]
    assert moved[-1] == 1
    third(THREE)
    assert written[1:] == [THREE.wire]


def test_what_is_said_in_a_burst_keeps_its_place() -> None:
    written: list[bytes] = []
    replies = Replies(written.append, lambda: None)
    first = replies.owe()
    replies.burst(True)
    first(ONE)
    replies.say(TWO)
    replies.burst(False)
    replies.burst(True)
    replies.say(THREE)
    replies.burst(False)
    assert written == [ONE.wire + TWO.wire, THREE.wire]
