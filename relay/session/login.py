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

    __slots__ = ("_doorkeeper", "_exchange", "_failed", "_local", "_senders", "done")

    def __init__(self, doorkeeper: Doorkeeper | None, *, local: bool) -> None:
        """`doorkeeper`: None where nobody can log in; `local`: TLS is not asked for."""
        self._doorkeeper = doorkeeper
        self._local = local
        self._exchange: Exchange | None = None
        self._failed = 0
        self._senders: tuple[str, ...] | None = None
        self.done = False
        """Whether somebody is logged in."""

    @property
    def possible(self) -> bool:
        """Whether AUTH would help a client that may not relay."""
        return self._doorkeeper is not None and not self.done

    @property
    def exhausted(self) -> bool:
        """Whether there were too many failures for another attempt."""
        return self._failed >= FAILURES_PER_SESSION

    def offered(self, *, secured: bool) -> tuple[str, ...]:
        """The mechanisms for EHLO."""
        if self._doorkeeper is None or self.done or not (secured or self._local):
            return ()
        return self._doorkeeper.mechanisms

    def begin(self, argument: bytes, *, secured: bool) -> Reply | Credentials:
        """Take what stood behind "AUTH "; return a challenge (334), a refusal, or what is to be decided."""
        name, _, initial = argument.partition(b" ")
        mechanism = name.decode("ascii", "replace").upper()
        if self._doorkeeper is None:
            return answers.NOT_HERE
        if self.done:
            return answers.AUTH_ALREADY
        if not (secured or self._local):
            return answers.TLS_FOR_AUTH
        if mechanism not in self._doorkeeper.mechanisms:
            return answers.MECHANISM
        self._exchange = Exchange(mechanism)
        return self.respond(initial or None)

    def respond(self, line: bytes | None) -> Reply | Credentials:
        """Take the client's answer to a challenge; return as `begin` does."""
        exchange, doorkeeper = cast("Exchange", self._exchange), cast("Doorkeeper", self._doorkeeper)
        try:
            step = exchange.step(line)
        except SaslError as error:
            doorkeeper.aborted()
            return error.reply
        if isinstance(step, bytes):
            return Reply.plain(334, b64encode(step).decode())
        return step

    def decided(self, verdict: Verdict) -> None:
        """Take the verdict."""
        if verdict.outcome == "ok":
            self.done = True
            self._senders = verdict.senders
        elif verdict.outcome == "failed":
            self._failed += 1

    def may_use(self, reverse_path: bytes) -> bool:
        """Whether the user may send from this address; anybody may who relays without AUTH."""
        return may_send(self._senders, reverse_path)
