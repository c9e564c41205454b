"""The breaker, held against a plain model of what the documents say of it."""

from __future__ import annotations

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.upstream.breaker import LONGEST_PAUSE, SHORTEST_PAUSE, THRESHOLD, Breaker


class BreakerMachine(RuleBasedStateMachine):
    """The model counts failures in a row of either kind, and doubles the pause."""

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.breaker = Breaker(Random(seed))
        self.now = 1000.0
        self.refused = self.lost = self.pauses = 0
        self.open = self.trying = False
        self.longest = 0.0

    def pause(self) -> None:
        self.longest = min(LONGEST_PAUSE, 2 * SHORTEST_PAUSE * 2**self.pauses)
        self.pauses += 1
        self.open, self.trying = True, False
        retry_at = self.breaker.retry_at
        assert retry_at is not None
        assert SHORTEST_PAUSE <= self.longest / 2 <= retry_at - self.now <= self.longest <= LONGEST_PAUSE

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 4.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def an_attempt_fails(self) -> None:
        self.refused += 1
        opens = not self.open and max(self.refused, self.lost) >= THRESHOLD
        assert self.breaker.refused(self.now) is opens
        if opens:
            self.pause()

    @rule()
    def a_connection_is_lost_before_mail(self) -> None:
        self.lost += 1
        opens = not self.open and max(self.refused, self.lost) >= THRESHOLD
        assert self.breaker.lost(self.now) is opens
        if opens:
            self.pause()

    @rule()
    def mail_is_answered(self) -> None:
        self.breaker.answered()
        self.lost = 0
        if not self.open:
            self.pauses = 0

    @rule()
    def an_attempt_that_was_under_way_succeeds(self) -> None:
        assert self.breaker.connected() is self.open
        self.refused = 0
        if self.open:
            self.lost = 0
        self.open = self.trying = False

    @precondition(lambda self: self.open and not self.trying)
    @rule()
    def the_pool_looks(self) -> None:
        retry_at = self.breaker.retry_at
        assert retry_at is not None
        if self.breaker.due(self.now):
            assert self.now >= retry_at
            self.breaker.try_begins()
            self.trying = True
        else:
            assert self.now < retry_at

    @precondition(lambda self: self.trying)
    @rule()
    def the_attempt_that_decides_fails(self) -> None:
        assert self.breaker.refused(self.now, decisive=True) is False
        self.refused += 1
        self.pause()

    @precondition(lambda self: self.trying)
    @rule()
    def the_attempt_that_decides_cannot_be_made(self) -> None:
        self.breaker.not_tried(self.now)
        self.pauses -= 1
        self.pause()

    @invariant()
    def both_say_the_same(self) -> None:
        if hasattr(self, "breaker"):
            assert self.breaker.open is self.open
            assert not (self.trying and self.breaker.due(self.now + 3600)), "one attempt at a time"
            assert repr(self.breaker).startswith(
                "<Breaker half-open" if self.trying else "<Breaker open" if self.open else "<Breaker closed"
            )


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def test_two_failures_are_none() -> None:
    breaker = Breaker(Random(1))
    for _ in range(10):
        for _ in range(THRESHOLD - 1):
            assert not breaker.refused(0.0)
        assert not breaker.connected()
    assert not breaker.open


def test_connections_that_stand_do_not_hide_that_they_are_dropped() -> None:
    breaker = Breaker(Random(1))
    for _ in range(THRESHOLD - 1):
        breaker.connected()
        assert not breaker.lost(0.0)
    breaker.connected()
    assert breaker.lost(0.0)
    assert breaker.open


def test_pauses_double_up_to_the_longest() -> None:
    breaker = Breaker(Random(1))
    now, pauses = 0.0, []
    for _ in range(THRESHOLD):
        breaker.refused(now)
    for _ in range(12):
        assert breaker.retry_at is not None
        pauses.append(breaker.retry_at - now)
        now = breaker.retry_at
        assert breaker.due(now)
        breaker.try_begins()
        breaker.refused(now, decisive=True)
    for number, pause in enumerate(pauses):
        nominal = min(LONGEST_PAUSE, 2 * SHORTEST_PAUSE * 2**number)
        assert nominal / 2 <= pause <= nominal
    assert len(set(pauses)) == len(pauses), "drawn by lot"
