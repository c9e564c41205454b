"""Replies in the order of their commands, whatever the order in which they become known (RFC 2920 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.reply import Reply

__all__ = ["Replies"]


class Replies:
    """The replies that a session still owes its client, in order."""

    __slots__ = ("bursting", "given", "owed", "write")

    def __init__(self, write: Callable[[bytes], None], given: Callable[[], None]) -> None:
        """`write` sends to the client; `given` is called when a reply that was owed has become known."""
        self.write = write
        self.bursting = False
        self.given = given
        self.owed: list[_Owed] = []
        """The places that are kept, those whose reply is known and waits for another among them."""

    @property
    def last_known(self) -> bool:
        """Whether the last command has its reply, though that may wait for those before it."""
        return not self.owed or self.owed[-1].reply is not None

    def say(self, reply: Reply) -> None:
        """Give a reply that is known at once; it still waits for those before it."""
        if self.owed or self.bursting:
            self.owe()(reply)
        else:
            self.write(reply.wire)

    def owe(self) -> Callable[[Reply], None]:
        """Keep the place of a reply that is not known yet; call the result with it."""
        owed = _Owed(self)
        self.owed.append(owed)
        return owed.give

    def burst(self, begins: bool) -> None:
        """Several become known one after the other: hold them while they do, then write them in one piece."""
        self.bursting = begins
        if not begins and self.owed:
            self.flush()
            self.given()

    def flush(self) -> None:
        """Write what is known from the front on, in one piece."""
        known = 0
        for owed in self.owed:
            if owed.reply is None:
                break
            known += 1
        if known:
            wire = b"".join(owed.reply.wire for owed in self.owed[:known] if owed.reply is not None)
            del self.owed[:known]
            self.write(wire)


class _Owed:
    __slots__ = ("_replies", "reply")

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self.reply: Reply | None = None

    def give(self, reply: Reply) -> None:
        if self.reply is not None:
            return
        self.reply = reply
        replies = self._replies
        if replies.bursting:  # its end sees to all of them
            return
        if len(replies.owed) == 1:  # of a client that does not pipeline each one
            replies.owed.clear()
            replies.write(reply.wire)
        else:
            replies.flush()
        replies.given()
