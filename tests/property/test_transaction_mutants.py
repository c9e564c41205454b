"""The state machine's tests can fail: each of these transactions is broken on purpose, and found out.

A mutant lives in the test tree alone, laid over one method. The walk has to name the promise that it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from relay import maillog
from relay.outcome import Outcome
from relay.records.model import Record
from relay.reply import Reply
from relay.settlement import Settlement
from relay.transaction import Transaction
from relay.upstream.connection import Connection, Failure
from relay.upstream.pool import Pool
from tests.support.stage import Event, Stage
from tests.support.walk import DATA, END, MAIL, OPEN, OPEN_IDLE, RECIPIENT, TEXT, BrokenPromiseError, walk

Original = Callable[..., Any]
ENDED = [*OPEN, *RECIPIENT, *DATA, *TEXT, *END]


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    yield
    maillog.configure("json", "info")


def answers_before_it_records(self: Settlement, verdict: Reply, *, original: Original) -> Any:
    self._tell(verdict)
    return original(self, verdict)


def records_what_was_refused(self: Settlement, reply: Reply, *, original: Original) -> None:
    original(self, reply)
    if not reply.positive:
        self._services.recorder.record(self._account.record(self._found, reply, doubted=False))


def records_twice(self: Settlement, verdict: Reply, *, original: Original) -> Any:
    record: Record = self._account.record(self._found, verdict, doubted=False)
    self._services.recorder.record(record)
    return original(self, verdict)


def tells_again(self: Settlement, reply: Reply, *, original: Original) -> None:
    del original
    self._account.client_heard = reply
    self._answer(reply)


def counts_an_overdue_verdict(self: Settlement, now: float, *, original: Original) -> None:
    original(self, now)
    if now > self._ended_at + self._lease.pool.end_of_data_timeout:
        self._account.close(self._services.metrics, Outcome.IN_DOUBT, "overdue")


def never_tells_that_it_is_overdue(self: Settlement, now: float, *, original: Original) -> None:
    """Leave the client waiting."""


def does_not_give_up(self: Settlement, *, original: Original) -> None:
    """Wait for a verdict that cannot come."""


def swallows_a_failure(self: Transaction, failure: Failure, *, original: Original) -> None:
    if self._settlement is None:
        original(self, failure)


def gives_back_what_is_unfinished(self: Transaction, *, original: Original) -> None:
    if self._lease.connection is None:
        original(self)
    else:
        self._lease.release(reset=False)


def closes_what_is_unfinished(self: Connection, reason: str, *, original: Original) -> None:
    self.quit()
    self._close()


def goes_on_with_refused_content(self: Transaction, reply: Reply, *, original: Original) -> None:
    """Take no notice of the fault."""
    if self._account.found is None:
        self._classify(b"")


def begins_anew_after_mail(
    self: Transaction, connection: Connection | None, reply: Reply, *, original: Original
) -> None:
    if connection is not None and self._sent:
        self._take_back()
        self._connect(fresh=True)
    else:
        original(self, connection, reply)


def passes_421_on(self: Reply, code: int, *, original: Original) -> Reply:
    return self if self.code == 421 else original(self, code)


def resets_nothing(
    self: Pool, connection: Connection, *, reset: bool, ahead: bool = False, original: Original
) -> None:
    original(self, connection, reset=False)


def believes_what_answers_nothing(self: Connection, data: bytes, *, original: Original) -> None:
    for reply in self._parser.feed(data):
        if self._awaited:
            self._answer(reply)


def ends_as_accepted(self: Settlement, outcome: Outcome, said: object, *, original: Original) -> None:
    original(self, Outcome.ACCEPTED if outcome is Outcome.IN_DOUBT else outcome, said)


MUTANTS: dict[str, tuple[type, str, Original, list[Event], str]] = {
    "answers before it records": (
        Settlement,
        "_record",
        answers_before_it_records,
        ENDED,
        "no row is durable",
    ),
    "records what was refused": (Settlement, "_tell", records_what_was_refused, ENDED, "a row after"),
    "records twice": (Settlement, "_record", records_twice, ENDED, "two rows"),
    "tells again": (Settlement, "_tell", tells_again, ENDED, "to nobody"),
    "counts an overdue verdict": (Settlement, "check", counts_an_overdue_verdict, ENDED, "concluded"),
    "never tells that it is overdue": (
        Settlement,
        "check",
        never_tells_that_it_is_overdue,
        ENDED,
        "overdue",
    ),
    "does not give up": (Settlement, "give_up", does_not_give_up, ENDED, "still not concluded"),
    "swallows a failure": (Transaction, "connection_failed", swallows_a_failure, ENDED, "never concluded"),
    "gives back what is unfinished": (
        Transaction,
        "_drop_lease",
        gives_back_what_is_unfinished,
        MAIL,
        "given back unclean",
    ),
    "closes what is unfinished": (
        Connection,
        "abort",
        closes_what_is_unfinished,
        [*OPEN, *RECIPIENT, *DATA],
        "closed, not aborted",
    ),
    "goes on with refused content": (
        Transaction,
        "_refuse",
        goes_on_with_refused_content,
        [*OPEN, *RECIPIENT, *DATA],
        "went up whole",
    ),
    "begins anew after MAIL": (
        Transaction,
        "_go_on_without",
        begins_anew_after_mail,
        OPEN_IDLE,
        "begun anew",
    ),
    "passes 421 on": (Reply, "recoded", passes_421_on, MAIL, "421"),
    "resets nothing": (Pool, "release", resets_nothing, OPEN, "given back unclean"),
    "believes what answers nothing": (
        Connection,
        "data_received",
        believes_what_answers_nothing,
        OPEN,
        "trusted although",
    ),
    "ends as accepted": (Settlement, "_end", ends_as_accepted, ENDED, "accepted"),
}


@pytest.mark.parametrize(("owner", "name", "mutant", "opening", "promise"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_transaction_is_found_out(
    owner: type,
    name: str,
    mutant: Original,
    opening: list[Event],
    promise: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(owner, name)

    def broken(self: Any, *arguments: Any, **named: Any) -> Any:
        return mutant(self, *arguments, **named, original=original)

    monkeypatch.setattr(owner, name, broken)
    stage = partial(Stage, idle=opening is OPEN_IDLE)
    with pytest.raises(BrokenPromiseError, match=promise) as found:
        walk(stage, opening, 3)
    print(found.value)
