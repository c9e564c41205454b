"""The transaction under long, random orders of events; the promises are those of `tests/support/stage.py`.

What `test_transaction_walk.py` goes through in full up to a depth, this goes beyond: whole messages, with
every sort of content, and with whatever goes wrong where it goes wrong. Each event is drawn with whether the
event loop has its turn before the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from relay import maillog
from tests.support.stage import Event, Stage

GOES_ON = frozenset(("rcpt", "data", "text", "much text", "end", "chunk", "half chunk", "rest", "last chunk"))
"""What a client does that wants its message to be sent."""
REFUSALS = ("4yz", "5yz", "421")
FAILURES = ("two at once", "garbage", "fin", "rst")

Turn = st.booleans()


class TransactionMachine(RuleBasedStateMachine):
    stage: Stage

    @initialize(
        pipelining=st.booleans(), idle=st.booleans(), busy=st.booleans(), chunking=st.booleans(), turn=Turn
    )
    def begin(self, pipelining: bool, idle: bool, busy: bool, chunking: bool, turn: bool) -> None:
        self.stage = Stage(pipelining=pipelining, idle=idle, busy=busy and not idle, chunking=chunking)
        self.stage.do(("client", "mail"), quiet=turn)

    def can(self, who: str, which: Sequence[str] | frozenset[str] | None = None) -> list[Event]:
        """The events of `who` that can come now, of those in `which`."""
        return [each for each in self.stage.enabled() if each[0] == who and (not which or each[1] in which)]

    def draw(self, data: st.DataObject, events: list[Event], *, turn: bool) -> None:
        self.stage.do(data.draw(st.sampled_from(events)), quiet=turn)

    @precondition(lambda self: self.can("client", GOES_ON))
    @rule(data=st.data(), turn=Turn)
    def the_client_goes_on(self, data: st.DataObject, turn: bool) -> None:
        self.draw(data, self.can("client", GOES_ON), turn=turn)

    @precondition(lambda self: self.can("client"))
    @rule(data=st.data(), turn=Turn)
    def the_client_does_anything(self, data: st.DataObject, turn: bool) -> None:
        self.draw(data, self.can("client"), turn=turn)

    @precondition(lambda self: self.stage.line is not None and self.stage.line.asked)
    @rule(turn=Turn)
    def the_upstream_agrees(self, turn: bool) -> None:
        data = ("upstream", "354")
        self.stage.do(data if data in self.stage.enabled() else ("upstream", "2yz"), quiet=turn)

    @precondition(lambda self: self.stage.line is not None and self.stage.line.asked)
    @rule(code=st.sampled_from(REFUSALS), turn=Turn)
    def the_upstream_refuses(self, code: str, turn: bool) -> None:
        self.stage.do(("upstream", code), quiet=turn)

    @precondition(lambda self: self.stage.line is not None)
    @rule(what=st.sampled_from(FAILURES), turn=Turn)
    def the_upstream_fails(self, what: str, turn: bool) -> None:
        self.stage.do(("upstream", what), quiet=turn)

    @precondition(lambda self: self.can("upstream"))
    @rule(data=st.data(), turn=Turn)
    def the_upstream_does_anything(self, data: st.DataObject, turn: bool) -> None:
        self.draw(data, self.can("upstream"), turn=turn)

    @precondition(lambda self: self.stage.dialer.pending)
    @rule(turn=Turn)
    def a_connection_stands(self, turn: bool) -> None:
        self.stage.do(("upstream", "dialed"), quiet=turn)

    @precondition(lambda self: self.stage.keeper.waiting)
    @rule(what=st.sampled_from(["commits", "commits", "breaks"]), turn=Turn)
    def the_store_answers(self, what: str, turn: bool) -> None:
        self.stage.do(("store", what), quiet=turn)

    @precondition(lambda self: self.stage.time_matters)
    @rule(turn=Turn)
    def time_passes(self, turn: bool) -> None:
        self.stage.do(("time", "passes"), quiet=turn)

    @precondition(lambda self: self.can("relay"))
    @rule(turn=Turn)
    def the_relay_gives_up(self, turn: bool) -> None:
        self.stage.do(("relay", "gives up"), quiet=turn)

    @precondition(lambda self: not self.stage.enabled())
    @rule(idle=st.booleans(), turn=Turn)
    def all_has_been_said(self, idle: bool, turn: bool) -> None:
        self.stage.quiet()
        self.stage.finale()
        self.begin(pipelining=True, idle=idle, busy=False, chunking=True, turn=turn)

    def teardown(self) -> None:
        if not hasattr(self, "stage"):
            return
        try:
            self.stage.quiet()
            self.stage.finale()
        finally:
            self.stage.discard()
            maillog.configure("json", "info")


TestTransaction = TransactionMachine.TestCase
TestTransaction.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
