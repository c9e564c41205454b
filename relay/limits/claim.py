"""What one message holds of the counts, from MAIL to its outcome.

Rules:
- What is known decides as early as it can: sender, client and the whole at MAIL, recipients at RCPT, the task
  type once the header section has been seen, octets at the latest before the end of data goes up.
- Before that more may be held than the message will count for, never less than it is known to.
- Only what was accepted counts, and what may have been: a message in doubt. Everything else is given back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from relay.limits.limits import Want
from relay.limits.rule import Message, Rule

if TYPE_CHECKING:
    from relay.limits.limits import Decided, Limits
    from relay.limits.tally import Tally
    from relay.reply import Reply

__all__ = ["Claim"]


class Claim:
    """The claim of one message on the limits that concern it."""

    __slots__ = (
        "_ended",
        "_limits",
        "_message",
        "_observed",
        "_recipients",
        "_rules",
        "_tallies",
        "_task_id",
    )

    def __init__(self, limits: Limits, task_id: UUID, sender: str, client: str, size: int) -> None:
        """Begin with nothing held; `size` is what MAIL said, 0 if it did not."""
        self._limits = limits
        self._task_id = task_id
        self._message = Message(sender, client, size=size)
        self._rules = tuple(rule for rule in limits.rules if rule.concerns(self._message))
        self._recipients: list[str] = []
        self._tallies: dict[Tally, None] = {}
        self._observed: set[Tally] = set()
        self._ended = False

    @property
    def waits_for_header(self) -> bool:
        """Whether the message may have to be refused for what its header section says."""
        return any(rule.needs_header and rule.action != "observe" for rule in self._rules)

    def at_mail(self, decided: Decided) -> None:
        """Decide what the sender, the client and the whole of the relay's mail tell."""
        wants = []
        for rule in self._rules:
            if not rule.needs_header and not rule.by_recipient:
                tally = self._limits.tally(rule, rule.key_of(self._message))
                hold = {"messages": 1, "recipients": 0, "octets": self._message.size}[rule.unit]
                wants.append(Want(tally, hold, max(hold, 1)))
        self._ask(wants, decided)

    def at_rcpt(self, recipient: str, decided: Decided) -> None:
        """Decide about one more recipient."""
        message = replace(self._message, recipients=(*self._recipients, recipient))
        wants = []
        for rule in self._rules:
            looks = rule.by_recipient or rule.unit == "recipients"
            if looks and not rule.needs_header and rule.counted(recipient):
                key = rule.key_of_recipient(message, recipient)
                amount = rule.demand(message)[key]
                wants.append(Want(self._limits.tally(rule, key), amount, max(amount, 1)))

        def heard(refusal: Reply | None) -> None:
            if refusal is None:
                self._recipients.append(recipient)
            decided(refusal)

        self._ask(wants, heard)

    def not_taken(self, recipient: str) -> None:
        """The upstream, or another rule, refused a recipient that had passed here."""
        if not self._ended and recipient in self._recipients:
            self._recipients.remove(recipient)
            message = replace(self._message, recipients=self._recipients)
            for rule in self._rules:
                looks = rule.by_recipient or rule.unit == "recipients"
                if looks and not rule.needs_header and rule.counted(recipient):
                    key = rule.key_of_recipient(message, recipient)
                    self._reduce(self._limits.tally(rule, key), rule.demand(message).get(key, 0))

    def at_header(self, task_type: str, decided: Decided) -> None:
        """Decide what the task type tells; all recipients are known."""
        self._message = replace(self._message, task_type=task_type, recipients=tuple(self._recipients))
        self._rules = tuple(rule for rule in self._rules if rule.concerns(self._message))
        wants = [want for rule in self._rules if rule.needs_header for want in self._wants(rule)]
        self._ask(wants, decided)

    def at_end(self, recipients: Sequence[str], size: int, decided: Decided) -> None:
        """Decide about the message as it is: all that will be in its row, but for the verdict."""
        self._message = replace(self._message, recipients=tuple(recipients), size=size)
        wants = [want for rule in self._rules for want in self._wants(rule)]
        wanted = {want.tally for want in wants}
        for tally in tuple(self._tallies):
            if tally not in wanted:
                tally.release(self._task_id)
                del self._tallies[tally]
        growing = [want for want in wants if want.hold > (want.tally.holds(self._task_id) or 0)]
        for want in wants:
            if want not in growing:
                want.tally.hold(self._task_id, want.hold)
        self._ask(growing, decided)

    def end(self, *, sent: bool) -> None:
        """The outcome is known: the message counts from now on, or not at all."""
        if self._ended:
            return
        self._ended = True
        now = self._limits.clock()
        for tally in self._tallies:
            if sent:
                self._limits.sent(tally, self._task_id, now)
            else:
                tally.release(self._task_id)

    def _wants(self, rule: Rule) -> Iterator[Want]:
        for key, amount in rule.demand(self._message).items():
            yield Want(self._limits.tally(rule, key), amount, max(amount, 1))

    def _reduce(self, tally: Tally, amount: int) -> None:
        if (tally.holds(self._task_id) or 0) > amount:
            tally.hold(self._task_id, amount)

    def _ask(self, wants: Sequence[Want], decided: Decided) -> None:
        if not wants:
            decided(None)
            return

        def heard(refusal: Reply | None) -> None:
            if refusal is None:
                for want in wants:
                    if self._ended:  # it was given up while the store was asked
                        want.tally.release(self._task_id)
                    else:
                        self._tallies[want.tally] = None
            if not self._ended:
                decided(refusal)

        self._limits.ask(self._task_id, wants, heard, self._observed)
