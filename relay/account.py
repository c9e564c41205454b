"""The account of a transaction: its row, its count, its line in the log, all from the same facts.

Rules: `Account` fills while the transaction goes and decides nothing. One outcome drives the metric's label,
the log's event and whether there is a row, so that they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from uuid import UUID

from relay import maillog
from relay.envelope import Envelope, Recipient, text
from relay.metrics import NO_UPSTREAM
from relay.outcome import Outcome
from relay.records.bound import MAX_REASON, MAX_VERDICT, lines_bound
from relay.records.line import whole_line
from relay.records.model import Doubt, Json, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.classify import Classification
    from relay.credentials import Credentials
    from relay.metrics import Metrics
    from relay.pseudonyms import Pseudonyms
    from relay.reply import Reply

__all__ = ["Account", "Sender", "negative_outcome"]

# Once: CPython 3.11 finds a member of an enumeration by way of an exception.
_ACCEPTED: Final = Outcome.ACCEPTED
_REFUSED: Final = Outcome.REFUSED


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends, and the listener it came by."""

    client: str
    """Its name in the record: the user that it logged in as, else its address."""
    listener: str
    address: str = ""
    """Where it connects from, if that is not its name already."""
    credentials: Credentials | None = None
    """What the upstream knows it by, where the upstream is to decide; None: the relay's own account."""
    port: int | None = None
    """The TCP port that it connects from; None: there is none, or it is not known."""


class _Kept:
    """What is kept of a message whose envelope is complete, as records may have it."""

    __slots__ = ("data", "recipients", "sender")

    def __init__(self, sender: str, recipients: tuple[str, ...], data: dict[str, Json]) -> None:
        """`recipients`: those that the upstream accepted, or may have; `data`: what has no other place."""
        self.sender = sender
        self.recipients = recipients
        self.data = data


class Account:
    """What is known of one transaction. Times ending in `_s` are in seconds, sizes in octets."""

    __slots__ = (
        "_kept",
        "began",
        "client_gone",
        "client_heard",
        "commit_s",
        "envelope",
        "found",
        "names",
        "received",
        "replies_s",
        "sender",
        "size",
        "task_id",
        "total_s",
        "unknown",
        "upstream",
        "upstream_s",
        "waited_s",
    )

    def __init__(
        self, task_id: UUID, sender: Sender, envelope: Envelope, began: float, names: Pseudonyms | None = None
    ) -> None:
        """Begin when MAIL comes: `began`, in the loop's time.

        `names` gives what recipients are called in records and log; None: by their addresses.
        """
        self.task_id = task_id
        self.sender = sender
        self.envelope = envelope
        self.began = began
        self.names = names
        self.upstream: str | None = None
        self.waited_s = 0.0
        """For a connection to an upstream."""
        self.replies_s = 0.0
        """For the upstream before the end of data: its replies, and content taken slower than it came."""
        self.upstream_s = 0.0
        """From the end of data to the upstream's verdict."""
        self.commit_s = 0.0
        """Until the row was durable."""
        self.total_s = 0.0
        """From MAIL to now."""
        self.received = 0
        """Octets of content that the client sent."""
        self.size = 0
        """Octets of the message as RFC 1870 counts them."""
        self.found: Classification | None = None
        """What the header section said; None if none came."""
        self.client_heard: Reply | None = None
        """The reply to the end of data that the client was given."""
        self.client_gone = False
        """Whether the client left before it could be given one."""
        self.unknown = 0
        """Recipients whose replies were not known when the end of data went up."""
        self._kept: _Kept | None = None

    def line(self, found: Classification) -> bytes:
        """Return the message as the journal has it, whole.

        From now on the envelope is complete, but for replies that are `unknown`.
        """
        kept = self._keep(found)
        return whole_line(
            self.task_id,
            found.task_type,
            kept.sender,
            self.sender.client,
            datetime.now(UTC),
            self.upstream or "",
            self.size,
            int(self.total_s * 1000 + 0.5),
            found.client_task_id,
            found.message_id,
            kept.recipients,
            self._data(kept),
        )

    def place(self, line: bytes) -> int:
        """Return how many octets the lines of this message take in the spool at most, whatever the verdict.

        `line` is what `line` returns.
        """
        # What is said of recipients may become longer by their pseudonyms.
        named = 0 if self.names is None else 2 * MAX_VERDICT
        return lines_bound(line) + named + self.unknown * 2 * (2 * MAX_VERDICT + _REFUSAL)

    def doubt(self, found: Classification, reason: str) -> Doubt:
        """Return the entry of a message that is in doubt from now on; `reason`: why there is no verdict."""
        kept = self._kept or self._keep(found)
        return Doubt(
            task_id=self.task_id,
            client_task_id=found.client_task_id,
            task_type=found.task_type,
            sender=kept.sender,
            client=self.sender.client,
            since=datetime.now(UTC),
            upstream=self.upstream or "",
            reason=self._told(reason)[:MAX_REASON],
            message_id=found.message_id,
            size=self.size,
            duration_ms=round(self.total_s * 1000),
            recipients=kept.recipients,
            data=self._data(kept),
        )

    def record(self, found: Classification, verdict: Reply, *, doubted: bool) -> Record:
        """Return the row of a message that the upstream has just accepted with `verdict`.

        `doubted`: it was in doubt before.
        """
        kept = self._kept or self._keep(found)
        return Record(  # by position: fourteen names would cost as much again
            self.task_id,
            found.task_type,
            kept.sender,
            self.sender.client,
            datetime.now(UTC),
            self.upstream or "",
            _cut(self._told(str(verdict))),
            self.size,
            int(self.total_s * 1000 + 0.5),  # as `round`, for less
            kept.recipients,
            found.client_task_id,
            found.message_id,
            self._data(kept),
            doubted,
        )

    def _keep(self, found: Classification) -> _Kept:
        """Gather what journal, row and line have in common, each text decoded once."""
        envelope, names = self.envelope, self.names
        refused = envelope.refused
        accepted = envelope.possible if refused else envelope.recipients
        data: dict[str, Json] = {}
        if found.headers:
            data["headers"] = found.headers if names is None else _each(found.headers, self._told)
        if found.tags:
            data["tags"] = list(found.tags)
        if refused:
            data["refused"] = [
                {"recipient": self._named(each), "reply": _cut(self._told(str(each.reply)))}
                for each in refused
            ]
        if self.sender.address:
            data["client_address"] = self.sender.address
        sender = text(envelope.reverse_path)
        recipients = [text(each.path) for each in accepted]
        if names is not None:
            sender = self._told_path(names, sender)
            recipients = [names.address(each) for each in recipients]
        kept = _Kept(sender, tuple(recipients), data)
        if not self.unknown:
            self._kept = kept
        return kept

    def _data(self, kept: _Kept) -> dict[str, Json]:
        """Everything that has no column of its own."""
        if self.client_heard is None and not self.client_gone:
            return kept.data
        data = dict(kept.data)
        # Heard before the verdict: it was late.
        data["client_reply"] = None if self.client_heard is None else self._told(str(self.client_heard))
        return data

    def close(self, metrics: Metrics, outcome: Outcome, said: str | None) -> None:
        """Count the transaction and write its line; `said`: the upstream's last word, or why it said none."""
        upstream = metrics.upstreams[
            NO_UPSTREAM if outcome is _REFUSED or self.upstream is None else self.upstream
        ]
        refused = self.envelope.refused
        for each in refused:
            upstream.recipient(_recipient_outcome(each, outcome))
        upstream.finished(
            (
                outcome,
                len(self.envelope.recipients) - len(refused),
                self.total_s,
                self.waited_s,
                self.replies_s + self.upstream_s,
                self.commit_s,
                self.received,
            )
        )
        if outcome is _ACCEPTED:
            metrics.accepted(self.size)
        if said is not None and self.names is not None:
            said = self._told(said)
        maillog.transaction(outcome, self._facts(outcome, said, refused))

    def overdue(self, reason: str) -> None:
        """Write the line of a message that is in doubt while its verdict is still awaited."""
        maillog.in_doubt(self._told(reason), self._facts(None, None, self.envelope.refused))

    def _named(self, recipient: Recipient) -> str:
        address = text(recipient.path)
        return address if self.names is None else self.names.address(address)

    def _told(self, words: str) -> str:
        """Return text as records and log may have it."""
        if self.names is None:
            return words
        return self.names.text(words, [text(each.path) for each in self.envelope.recipients])

    def _told_path(self, names: Pseudonyms, sender: str) -> str:
        """Return the reverse-path as records and log may have it."""
        return names.path(sender, [text(each.path) for each in self.envelope.recipients])

    def _facts(self, outcome: Outcome | None, reply: str | None, refused: list[Recipient]) -> maillog.Facts:
        """What a line in the log says of the message, whatever became of it."""
        found, envelope = self.found, self.envelope
        others = envelope.recipients
        if refused:
            others = [each for each in others if not each.negative]
        facts: maillog.Facts = {
            "outcome": outcome,
            "task_id": self.task_id,
            "client": self.sender.client,
            "listener": self.sender.listener,
            "sender": envelope.reverse_path,
            "recipients": [each.path for each in others],
            "recipient_count": len(others),
        }
        if refused:
            facts["refused"] = [{"recipient": each.path, "reply": str(each.reply)} for each in refused]
            facts["refused_count"] = len(refused)
        if found is not None:
            facts["task_type"] = found.task_type
            if found.message_id is not None:
                facts["message_id"] = found.message_id
        facts["size"] = self.size
        if self.upstream is not None:
            facts["upstream"] = self.upstream
        if reply is not None:
            facts["reply"] = reply
        if self.client_heard is not None:
            facts["client_reply"] = str(self.client_heard)
        facts["wait_s"] = self.waited_s
        facts["upstream_s"] = self.upstream_s
        facts["commit_s"] = self.commit_s
        facts["total_s"] = self.total_s
        if self.client_gone:
            facts["client_gone"] = True
        if self.names is not None:
            self._tell_by_pseudonyms(self.names, facts, others, refused)
        return facts

    def _tell_by_pseudonyms(
        self, names: Pseudonyms, facts: maillog.Facts, others: list[Recipient], refused: list[Recipient]
    ) -> None:
        told, named = self._told, self._named
        facts["sender"] = self._told_path(names, text(self.envelope.reverse_path))
        facts["recipients"] = [named(each) for each in others]
        if refused:
            facts["refused"] = [
                {"recipient": named(each), "reply": told(str(each.reply))} for each in refused
            ]
        if self.client_heard is not None:
            facts["client_reply"] = told(str(self.client_heard))


_REFUSAL: Final = 64
"""Octets around a recipient and its reply in the list of refusals."""


def _each(value: dict[str, Json], told: Callable[[str], str]) -> dict[str, Json]:
    """Return kept headers with each text in them told."""
    return {
        name: [told(str(item)) for item in found] if isinstance(found, list) else told(str(found))
        for name, found in value.items()
    }


def _cut(verdict: str) -> str:
    """Return a reply as a row holds it: of one that is longer than any server's the beginning."""
    return verdict if len(verdict) <= MAX_VERDICT else f"{verdict[: MAX_VERDICT - 4]} ..."


def negative_outcome(reply: Reply) -> Outcome:
    """Return what a negative reply of the upstream makes of that which it answers."""
    return Outcome.DEFERRED if reply.transient else Outcome.REJECTED


def _recipient_outcome(recipient: Recipient, outcome: Outcome) -> Outcome:
    """A recipient shares the message's outcome, unless the upstream or a limit refused it on its own."""
    if recipient.refused_here:
        return _REFUSED
    if recipient.reply is None or recipient.reply.positive or outcome is Outcome.UNAVAILABLE:
        return outcome
    return negative_outcome(recipient.reply)
