"""The content of a session's messages as it comes in: text after DATA, chunks after BDAT, and its pace.

Rules: content goes to the transaction as it comes, never collected. A chunk that can belong to no message is
read and thrown away, since its octets are content whatever the answer will be (RFC 3030 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from relay.answers import NO_RECIPIENTS
from relay.chunks import Chunks
from relay.session import answers

if TYPE_CHECKING:
    from relay.metrics import Metrics
    from relay.reply import Reply
    from relay.session.lines import Lines
    from relay.transaction import Transaction

__all__ = ["Content"]

DATA_RATE_GRACE = 30.0
"""Seconds before the minimum data rate of the content counts."""
CONTESTED_GRACE: Final = 5.0
"""Seconds before the content of a client that holds more than its share, while others wait, must come at
CONTESTED_RATE times the minimum data rate."""
CONTESTED_RATE: Final = 10


class Content:
    """What comes in as content in one session, message after message."""

    __slots__ = ("_began", "_chunks", "_fault_counted", "_metrics", "refusal")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = 0.0
        self._chunks: Chunks
        self._fault_counted = False
        self.refusal: Reply | None = None
        """Why the chunk that comes in can belong to no message; None: it belongs to one."""

    def begin_message(self) -> None:
        """A new message begins."""
        self._fault_counted = False

    # After DATA

    def begin_text(self, now: float) -> None:
        """The upstream has said 354: text may come."""
        self._began = now

    def take_text(self, waiting: Lines, transaction: Transaction) -> bool:
        """Give the text that waits to the transaction; True once its end has come.

        What stands behind the end of data stays in the input.
        """
        rest = transaction.feed(waiting.take())
        if rest is None:
            return False
        if transaction.body is not None and transaction.body.fault is not None:
            self._metrics.rejected(transaction.body.fault.value)
        waiting.feed(rest)
        return True

    # After BDAT

    def begin_chunk(
        self, transaction: Transaction | None, size: int, now: float, *, last: bool, max_size: int
    ) -> None:
        """A chunk of `size` octets comes; `transaction` is the one that is open, if any."""
        self.refusal = _refusal_of_chunk(transaction)
        if transaction is None or self.refusal is not None:
            self._chunks = Chunks(max_size=max_size, binary=True)
            self._chunks.begin(size, last=last)
        else:
            self._chunks = transaction.begin_chunk(size, last=last)
        if not self._chunks.received:
            self._began = now

    def take_chunk(self, waiting: Lines, transaction: Transaction | None) -> bool:
        """Give of what waits as much as belongs to the chunk to the transaction; True once it is whole."""
        octets = waiting.take(self._chunks.left)
        if self.refusal is None:
            cast("Transaction", transaction).feed_chunk(octets)
        else:
            self._chunks.feed(octets)
        return not self._chunks.left

    def chunk_ended(self) -> bool:
        """Take note that the chunk is whole; return whether it was the message's last one."""
        fault = self._chunks.fault
        if fault is not None and not self._fault_counted:
            self._fault_counted = True
            self._metrics.rejected(fault.value)
        return self._chunks.ended

    @property
    def hopeless(self) -> bool:
        """Whether so much of a chunk was announced beyond the size limit that reading it is not worth it."""
        return self._chunks.hopeless

    # Its pace

    def paused(self, elapsed: float) -> None:
        """For `elapsed` seconds the client could not send: the upstream took its time."""
        self._began += elapsed

    def too_slow(self, transaction: Transaction | None, now: float, rate: int, *, contested: bool) -> bool:
        """Whether less than `rate` octets have come for each second; sooner when `contested`."""
        took = now - self._began
        body = self._chunks if transaction is None else transaction.body
        received = body.received if body is not None else 0
        if contested and took > CONTESTED_GRACE:
            return received < took * rate * CONTESTED_RATE
        return took > DATA_RATE_GRACE and received < took * rate


def _refusal_of_chunk(transaction: Transaction | None) -> Reply | None:
    if transaction is None:
        return answers.NO_TRANSACTION
    if not transaction.envelope.recipients:
        return answers.NO_RCPT
    if transaction.data_tried:
        return answers.MIXED
    return NO_RECIPIENTS if transaction.course.nobody_accepted else None
