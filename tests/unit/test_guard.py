"""Guessing passwords is slow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.auth import guard as guard_module
from relay.auth.guard import (
    DRAIN_S,
    FORGIVE_S,
    MAX_CLIENTS,
    MAX_COUNT,
    MAX_DELAY_S,
    MAX_FAILURES,
    MAX_SUCCESSES,
    MIN_DELAY_S,
    Guard,
)
from relay.credentials import Password, Token

GOOD, WRONG = Password("app", "sesame"), Password("app", "wrong")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(clock: Clock) -> Guard:
    return Guard(clock)


def fail(guard: Guard, client: str, times: int = MAX_FAILURES) -> None:
    for _ in range(times):
        guard.failed(client, WRONG)


def test_delays_grow_to_a_bound_and_then_nothing_is_tried(guard: Guard) -> None:
    delays = []
    while not guard.blocked("192.0.2.1", WRONG):
        delays.append(guard.failed("192.0.2.1", WRONG))

    assert delays == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]
    assert not guard.blocked("192.0.2.2", WRONG)


def test_no_more_are_tried_at_a_time_than_may_still_fail(guard: Guard) -> None:
    client = "192.0.2.1"
    fail(guard, client, MAX_FAILURES - 2)
    with guard.trying(client):
        assert not guard.crowded(client, WRONG)
        with guard.trying(client):
            assert guard.crowded(client, WRONG)
            assert not guard.crowded("192.0.2.2", WRONG)
            guard.succeeded(client, GOOD)
            fail(guard, client, MAX_FAILURES - 1)
            assert not guard.crowded(client, GOOD)
            assert guard.crowded(client, WRONG)
    assert not guard.crowded(client, WRONG)
    assert not guard.blocked(client, WRONG)


def test_a_client_that_waits_is_tried_again(guard: Guard, clock: Clock) -> None:
    fail(guard, "192.0.2.1")

    clock.now += DRAIN_S - 1
    assert guard.blocked("192.0.2.1", WRONG)
    clock.now += 1
    assert not guard.blocked("192.0.2.1", WRONG)
    guard.failed("192.0.2.1", WRONG)
    assert guard.blocked("192.0.2.1", WRONG)
    clock.now += DRAIN_S * MAX_FAILURES
    assert guard.failed("192.0.2.1", WRONG) == MIN_DELAY_S


def test_many_failures_at_once_block_for_an_hour_at_most(guard: Guard, clock: Clock) -> None:
    fail(guard, "192.0.2.1", 1000)
    clock.now += 3600
    assert not guard.blocked("192.0.2.1", WRONG)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:0:0:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("2001:db8::1", "2001:0db8:0:0:8000::", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("unix", "unix", True),
        ("unix", "unix:/run/relay.sock", False),
    ],
)
def test_who_is_one_client(guard: Guard, one: str, other: str, same: bool) -> None:
    fail(guard, one)
    assert guard.blocked(one, WRONG)
    assert guard.blocked(other, WRONG) is same


def test_a_neighbour_with_the_right_password_is_not_locked_out(guard: Guard) -> None:
    guard.succeeded("192.0.2.1", GOOD)
    fail(guard, "192.0.2.1")

    assert guard.blocked("192.0.2.1", WRONG)
    assert guard.blocked("192.0.2.1", Token("XOAUTH2", "app", b"sesame"))
    assert not guard.blocked("192.0.2.1", GOOD)


def test_a_guess_from_elsewhere_is_not_tried_though_it_were_right(guard: Guard) -> None:
    guard.succeeded("192.0.2.1", GOOD)
    fail(guard, "192.0.2.66")

    assert guard.blocked("192.0.2.66", GOOD)


def test_a_password_that_is_right_no_more_loses_its_right(guard: Guard) -> None:
    guard.succeeded("192.0.2.1", GOOD)
    fail(guard, "192.0.2.1")
    guard.failed("192.0.2.1", GOOD)

    assert guard.blocked("192.0.2.1", GOOD)


def test_a_success_clears_the_count_once_in_a_while(guard: Guard, clock: Clock) -> None:
    fail(guard, "192.0.2.1", MAX_FAILURES - 1)
    guard.succeeded("192.0.2.1", GOOD)
    assert guard.failed("192.0.2.1", WRONG) == MIN_DELAY_S

    fail(guard, "192.0.2.1", MAX_FAILURES - 1)
    guard.succeeded("192.0.2.1", GOOD)
    assert guard.blocked("192.0.2.1", WRONG)

    clock.now += FORGIVE_S
    fail(guard, "192.0.2.1")
    guard.succeeded("192.0.2.1", GOOD)
    assert not guard.blocked("192.0.2.1", WRONG)


def test_what_is_kept_is_bounded_and_the_oldest_goes(guard: Guard) -> None:
    fail(guard, "first")
    fail(guard, "second")
    guard.failed("first", WRONG)
    for number in range(MAX_CLIENTS - 1):
        guard.failed(f"client {number}", WRONG)

    assert guard.blocked("first", WRONG)
    assert not guard.blocked("second", WRONG)
    assert len(guard._failures) == MAX_CLIENTS


def test_successes_that_are_kept_are_bounded_and_the_oldest_goes(guard: Guard) -> None:
    guard.succeeded("192.0.2.1", GOOD)
    guard.succeeded("192.0.2.2", GOOD)
    guard.succeeded("192.0.2.1", GOOD)
    for number in range(MAX_SUCCESSES - 1):
        guard.succeeded(f"client {number}", GOOD)
    fail(guard, "192.0.2.1")
    fail(guard, "192.0.2.2")

    assert not guard.blocked("192.0.2.1", GOOD)
    assert guard.blocked("192.0.2.2", GOOD)
    assert len(guard._succeeded) == MAX_SUCCESSES


class Model:
    """The same, from the whole history: every event with its time, nothing forgotten."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str, str, Password]] = []

    def count(self, now: float, client: str) -> float:
        count, last, forgiven = 0.0, 0.0, -FORGIVE_S
        failed_ever = False
        for at, event, who, _ in self.events:
            if who != client:
                continue
            count = max(0.0, count - (at - last) / DRAIN_S)
            last = at
            if event == "failed":
                count = min(count + 1, MAX_COUNT)
                failed_ever = True
            elif failed_ever and at - forgiven >= FORGIVE_S:
                count, forgiven = 0.0, at
        return max(0.0, count - (now - last) / DRAIN_S)

    def blocked(self, now: float, client: str, credentials: Password) -> bool:
        ends = [
            event
            for _, event, who, what in self.events
            if who == client and repr_of(what) == repr_of(credentials)
        ]
        return self.count(now, client) > MAX_FAILURES - 1 and ends[-1:] != ["succeeded"]


def repr_of(credentials: Password) -> tuple[str, str]:
    return credentials.user, credentials.password


CLIENTS = ("192.0.2.1", "192.0.2.2")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["failed", "failed", "failed", "succeeded"]),
        st.sampled_from(CLIENTS),
        st.sampled_from([GOOD, WRONG]),
        # Multiples of what a float holds exactly: the two sums must not differ by rounding.
        st.sampled_from([0, 0, 0, 15, 60, 600, 3600]),
    ),
    max_size=80,
)


@given(STEPS)
def test_it_does_as_a_plain_model_does(steps: list[tuple[str, str, Password, int]]) -> None:
    clock, model = Clock(), Model()
    guard = Guard(clock)
    for event, client, credentials, wait in steps:
        clock.now += wait
        model.events.append((clock.now, event, client, credentials))
        if event == "failed":
            expected = min(max(model.count(clock.now, client), MIN_DELAY_S), MAX_DELAY_S)
            assert guard.failed(client, credentials) == pytest.approx(expected)
        else:
            guard.succeeded(client, credentials)
        for each in CLIENTS:
            for tried in (GOOD, WRONG):
                assert guard.blocked(each, tried) is model.blocked(clock.now, each, tried)


def test_the_clock_of_the_machine_is_the_usual_one() -> None:
    guard = guard_module.Guard()
    fail(guard, "192.0.2.1")
    assert guard.blocked("192.0.2.1", WRONG)
