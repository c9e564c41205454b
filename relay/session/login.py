"""The AUTH exchange of one session (RFC 4954): challenges, responses, and what the verdict allows. No I/O.

Rules: AUTH is offered, and taken, with TLS alone, or from this machine when the operator says so. Who has
logged in stays who it is; who failed too often ends.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, cast

from relay.auth.guard import FAILURES_PER_SESSION
from relay.policy import may_send
from relay.reply import Reply
from relay.session import answers
from relay.session.sasl import Exchange, SaslError

if TYPE_CHECKING:
    from relay.auth.verdict import Verdict
    from relay.credentials import Credentials
    from relay.session.doorkeeper import Doorkeeper

__all__ = ["Login"]


class Login:
    """Who a session has logged in as, or the way there."""

    __slots__ = ("_doorkeeper", "_exchange", "_failed", "_verdict")

    def __init__(self, doorkeeper: Doorkeeper) -> None:
        self._doorkeeper = doorkeeper
        self._exchange: Exchange | None = None
        self._failed = 0
        self._verdict: Verdict | None = None

    @property
    def done(self) -> bool:
        """Whether somebody is logged in."""
        return self._verdict is not None

    @property
    def stands(self) -> bool:
        """Whether the login is still good: users come and go while sessions last."""
        return self._verdict is not None and self._doorkeeper.stands(self._verdict)

    @property
    def possible(self) -> bool:
        """Whether AUTH would help a client that may not relay."""
        return self._doorkeeper.open and not self.done

    @property
    def exhausted(self) -> bool:
        """Whether there were too many failures for another attempt."""
        return self._failed >= FAILURES_PER_SESSION

    def offered(self, *, private: bool) -> tuple[str, ...]:
        """The mechanisms for EHLO; `private`: whether credentials may be said in this session."""
        if self.done or not private:
            return ()
        return self._doorkeeper.mechanisms

    def begin(self, argument: bytes, *, private: bool) -> Reply | Credentials:
        """Take what stood behind "AUTH "; return a challenge (334), a refusal, or what is to be decided."""
        name, _, initial = argument.partition(b" ")
        mechanism = name.decode("ascii", "replace").upper()
        if not self._doorkeeper.open:
            return answers.NOT_HERE
        if self.done:
            return answers.AUTH_ALREADY
        if not private:
            return answers.TLS_FOR_AUTH
        if mechanism not in self._doorkeeper.mechanisms:
            return answers.MECHANISM
        self._exchange = Exchange(mechanism)
        return self.respond(initial or None)

    def respond(self, line: bytes | None) -> Reply | Credentials:
        """Take the client's answer to a challenge; return as `begin` does."""
        exchange = cast("Exchange", self._exchange)
        try:
            step = exchange.step(line)
        except SaslError as error:
            self._doorkeeper.aborted()
            return error.reply
        if isinstance(step, bytes):
            return Reply.plain(334, b64encode(step).decode())
        return step

    def decided(self, verdict: Verdict) -> None:
        """Take the verdict."""
        if verdict.outcome == "ok":
            self._verdict = verdict
        elif verdict.outcome == "failed":
            self._failed += 1

    def forget(self) -> None:
        """Go on with nobody logged in; what has failed counts on."""
        self._verdict = None

    def may_use(self, reverse_path: bytes) -> bool:
        """Whether the user may send from this address; anybody may who relays without AUTH."""
        return self._verdict is None or may_send(self._verdict.senders, reverse_path)
