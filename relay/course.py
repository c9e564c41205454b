"""What has been decided of a transaction before its end of data, and the outcome that this makes of it.

Rules: no I/O. The first thing that decides is the outcome; what only follows from it decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from relay.account import negative_outcome
from relay.outcome import Outcome

if TYPE_CHECKING:
    from relay.envelope import Envelope
    from relay.reply import Reply

__all__ = ["Course"]


_UNAVAILABLE: Final = Outcome.UNAVAILABLE


class Course:
    """What the upstream has said so far, and the relay instead of it."""

    __slots__ = ("broken", "broken_as", "data_reply", "envelope", "mail_refused", "mail_reply")

    def __init__(self, envelope: Envelope) -> None:
        """Begin with nothing said; `envelope` has the replies to the recipients."""
        self.envelope = envelope
        self.mail_reply: Reply | None = None
        self.mail_refused = False
        self.data_reply: Reply | None = None
        """To DATA, or the first one by which a chunk was refused."""
        self.broken: Reply | None = None
        """The answer to whatever still comes, since nothing goes up any more; None: it does."""
        self.broken_as = _UNAVAILABLE
        """The outcome that this makes."""

    @property
    def nobody_accepted(self) -> bool:
        """Whether there is nobody to send to: the upstream refused MAIL, or every recipient."""
        return self.broken is None and (self.mail_refused or not self.envelope.possible)

    @property
    def last_reply(self) -> Reply | None:
        """The reply that the outcome is explained by."""
        refused = self.envelope.refused
        return self.broken or self.data_reply or (refused[-1].reply if refused else self.mail_reply)

    def outcome(self, *, chosen: bool = True) -> Outcome:
        """Why it ends before an end of data: the first negative reply that decided it, or the client.

        `chosen`: whether there was an upstream that it might go to.
        """
        if self.broken is not None:
            return self.broken_as
        recipients = self.envelope.recipients
        if recipients and all(each.refused_here for each in recipients):
            return Outcome.REFUSED
        if not chosen and recipients:
            return Outcome.UNAVAILABLE
        if self.mail_reply is not None and self.mail_refused:
            return negative_outcome(self.mail_reply)
        refused = self.envelope.refused
        if refused and len(refused) == len(recipients):
            # Whether DATA was sent all the same, and its 554 "no valid recipients" heard, decides nothing.
            transient = any(each.reply is not None and each.reply.transient for each in refused)
            return Outcome.DEFERRED if transient else Outcome.REJECTED
        if self.data_reply is not None and self.data_reply.code >= 400:
            return negative_outcome(self.data_reply)
        return Outcome.ABORTED
