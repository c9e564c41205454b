"""What came of a login, as a value: the reply, the count, and what the session may do from then on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from relay.credentials import Credentials
    from relay.reply import Reply

__all__ = ["Verdict"]


class Verdict(NamedTuple):
    """The answer of an authenticator to one set of credentials."""

    reply: Reply
    """What the client hears: 235, 535, 454, or what the upstream said."""
    outcome: str
    """One of `metrics.AUTH_OUTCOMES`."""
    user: str = ""
    """The client's name in the record; set when the outcome is "ok"."""
    senders: tuple[str, ...] | None = None
    """Patterns of the reverse-paths that this user may use, see `policy.may_send`; None: any."""
    credentials: Credentials | None = None
    """What to log in with upstream; None: the relay's own account there."""
    entry: object = None
    """What the login was held against; the authenticator tells by it whether the login still stands."""
