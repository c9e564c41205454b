"""A transaction that asks the limits; where there are none, nobody makes one of these.

Rules: MAIL and RCPT go up only once they are decided, in the order in which they came. Where the header
section decides, the relay gives the 354 once every reply before it is known, holds the content until the
header section has passed (at most 64 KiB and what came with it), and then sends DATA up, or nothing: the
upstream connection is good for the next message. What is refused is read to its true end before the client
hears so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from relay.answers import NO_MAIL, NO_RECIPIENTS
from relay.body import Body
from relay.envelope import text
from relay.limits.claim import Claim
from relay.outcome import Outcome
from relay.reply import Reply
from relay.transaction import Command, Transaction

if TYPE_CHECKING:
    from relay.account import Sender
    from relay.envelope import Recipient
    from relay.limits.limits import Limits
    from relay.services import Services
    from relay.transaction import LineFor
    from relay.upstream import xforward
    from relay.upstream.upstreams import Route

__all__ = ["LimitedTransaction"]

GO_AHEAD: Final = Reply.plain(354, "End data with <CR><LF>.<CR><LF>")

Answer = Callable[[Reply], None]


class LimitedTransaction(Transaction):
    """One mail transaction under limits."""

    def __init__(
        self,
        services: Services,
        route: Route,
        sender: Sender,
        reverse_path: bytes,
        client: xforward.Client | None = None,
        *,
        limits: Limits,
        size: int | None = None,
    ) -> None:
        """Begin with nothing sent; `size` is what MAIL said, in octets."""
        super().__init__(services, route, sender, reverse_path, client)
        self._claim = Claim(limits, self.task_id, text(reverse_path), sender.client, size or 0)
        self._refused_here = False  # at MAIL
        self._deciding = False
        self._asked_about: Command | None = None  # a recipient that is being decided about
        self._gate: deque[tuple[Callable[[], None], Answer]] = deque()  # what came meanwhile
        self._waits_for_header = self._claim.waits_for_header
        self._to_go_ahead: Answer | None = None  # DATA came, and replies before it are owed
        self._held = False  # between our 354 and the upstream's
        self._data_is_up = False
        self._finish_later: Answer | None = None

    # One decision at a time

    def _decide(
        self, ask: Callable[[Callable[[Reply | None], None]], None], then: Callable[[Reply | None], None]
    ) -> None:
        self._deciding = True

        def decided(refusal: Reply | None) -> None:
            self._deciding = False
            then(refusal)
            while self._gate and not self._deciding:
                self._gate.popleft()[0]()

        ask(decided)

    def _in_turn(self, act: Callable[[], None], answer: Answer) -> None:
        if self._deciding or self._gate:
            self._gate.append((act, answer))
        else:
            act()

    # Commands

    def mail(self, line: bytes, answer: Answer, *, line_for: LineFor | None = None) -> None:
        """Decide about the sender, then begin."""
        go_on = partial(super().mail, line, answer, line_for=line_for)

        def then(refusal: Reply | None) -> None:
            if refusal is None:
                go_on()
            else:
                self._refuse_mail(refusal, answer)

        self._decide(self._claim.at_mail, then)

    def _refuse_mail(self, refusal: Reply, answer: Answer) -> None:
        self._services.metrics.rejected("limit")
        self._refused_here = self.over = True
        self.course.broken, self.course.broken_as = refusal, Outcome.REFUSED
        self._account.client_heard = refusal
        waiting, self._gate = self._gate, deque()
        for each in self.envelope.recipients:
            each.reply, each.refused_here = refusal, True
        for _, owed in waiting:
            owed(NO_MAIL)
        answer(refusal)

    @property
    def refused(self) -> bool:
        """Whether the client has heard MAIL refused: there is no transaction to go on with."""
        return self._refused_here or super().refused

    def _give_recipient(self, command: Command) -> None:
        """Decide about the recipient, then send RCPT."""
        self._in_turn(partial(self._ask_about, command, super()._give_recipient), command.answer)

    def _ask_about(self, command: Command, go_on: Callable[[Command], None]) -> None:
        recipient, answer = command.recipient, command.answer
        if recipient is None or self.course.broken is not None:
            go_on(command)
            return
        name = self._counted_as(recipient)

        def heard(reply: Reply) -> None:
            if not reply.positive:
                self._claim.not_taken(name)
            answer(reply)

        def then(refusal: Reply | None) -> None:
            self._asked_about = None
            if refusal is None:
                command.answer = heard
                go_on(command)
            else:
                self._services.metrics.rejected("limit")
                recipient.reply = refusal
                recipient.refused_here = True
                answer(refusal)

        self._asked_about = command
        self._decide(partial(self._claim.at_rcpt, name), then)

    def _counted_as(self, recipient: Recipient) -> str:
        """Return a recipient as the records have it, which is what limits are counted from."""
        address, names = text(recipient.path), self._services.names
        return address if names is None else names.address(address)

    def data(self, answer: Answer) -> None:
        """Send DATA; where the header section decides, say 354 ourselves."""
        self._in_turn(partial(self._data, answer, super().data), answer)

    def _data(self, answer: Answer, go_on: Callable[[Answer], None]) -> None:
        if self._waits_for_header and self.course.broken is None and self._chosen:
            self._to_go_ahead = answer
            self._go_ahead()
        else:
            go_on(answer)

    def _go_ahead(self) -> None:
        """Answer DATA as soon as every reply before it is known."""
        answer = self._to_go_ahead
        if answer is None or (self.course.broken is None and (self._sent or self._queued)):
            return
        self._to_go_ahead = None
        if self.course.broken is not None:
            answer(self.course.broken)
        elif not self.envelope.anybody:
            self.course.data_reply = NO_RECIPIENTS
            answer(NO_RECIPIENTS)
        else:
            self._held = True
            self.body = Body(max_size=self._max_size(), normalize=self._services.normalize)
            self.on_flow(False)  # commands may not be taken yet, though they are answered; no content is up
            answer(GO_AHEAD)

    def _mail_answered(self, reply: Reply) -> None:
        super()._mail_answered(reply)
        if not reply.positive and self._to_go_ahead is not None:
            answer, self._to_go_ahead = self._to_go_ahead, None
            answer(NO_MAIL if self.course.broken is None else self.course.broken)

    def _answered(self, reply: Reply) -> None:
        super()._answered(reply)
        self._go_ahead()

    def _break(self, reply: Reply, outcome: Outcome) -> None:
        self._held = False
        super()._break(reply, outcome)
        self._go_ahead()
        self._finish_now()

    @property
    def _takes_chunks(self) -> bool:
        """Not where the header section decides, though CHUNKING was offered before there was such a limit."""
        return not self._waits_for_header and super()._takes_chunks

    def takes_ahead(self, octets: bytes) -> bool:
        """Return False: what is decided counts the recipients that the upstream took."""
        del octets
        return False

    # Content that is held

    def _classify(self, header: bytes) -> None:
        super()._classify(header)
        found = self._account.found
        if found is None or self.course.broken is not None:
            return
        self._claim.at_header(found.task_type, self._header_decided)
        if self._held:
            self.on_flow(True)

    def _header_decided(self, refusal: Reply | None) -> None:
        if not self._held:  # nothing is held for a limit that refuses nothing
            return
        if refusal is not None:
            self._services.metrics.rejected("limit")
            self._refuse(refusal)
            return
        self._data_is_up = True
        self._queued.append(Command("data", b"DATA\r\n", _heard))
        self._pump()

    def _data_answered(self, reply: Reply) -> Reply:
        if not self._held:
            return super()._data_answered(reply)
        self.course.data_reply = reply
        if reply.code >= 400:  # the client, which has had its 354, hears it at the end
            self._lease.release(reset=True)
            self._break(reply, Outcome.DEFERRED if reply.transient else Outcome.REJECTED)
            return reply
        self._held = False
        self.on_flow(False)  # first: what is written next may be more than the upstream takes
        self.pass_on()
        self._finish_now()
        return reply

    def _write_content(self, *end: bytes) -> None:
        if not self._held:
            super()._write_content(*end)

    def _refuse(self, reply: Reply) -> None:
        """Give the message up; as long as nothing of its content is up, the connection stays good."""
        if not self._held or self._data_is_up:
            super()._refuse(reply)
            return
        self._lease.release(reset=True)
        self._unwritten, self._unwritten_size = [], 0
        self._break(reply, Outcome.REFUSED)

    def _drop_lease(self) -> None:
        if self._held and not self._data_is_up:
            self._lease.release(reset=True)
        else:
            super()._drop_lease()

    def resume_content(self) -> None:
        """The upstream can take more; not of what is held."""
        if not self._held:
            super().resume_content()

    # The end

    def abandon(self) -> None:
        """End; what waits for a decision, when MAIL turns out not to be accepted, has its answer by that."""
        asked_about, self._asked_about = self._asked_about, None
        waiting, self._gate = self._gate, deque()
        super().abandon()
        answers = [] if asked_about is None else [asked_about.answer]
        for answer in (*answers, *(owed for _, owed in waiting)):
            answer(self.course.broken or NO_MAIL)

    def finish(self, answer: Answer) -> None:
        """Decide about the message as it is, then send the end of data up."""
        self._finish_later = answer
        if not self._held:
            self._finish_now()

    def _finish_now(self) -> None:
        answer, self._finish_later = self._finish_later, None
        if answer is None:
            return
        self.on_flow(False)  # what was held may be more than the upstream takes, and nothing comes behind it
        go_on = partial(super().finish, answer)
        if self.course.broken is not None or self._lease.connection is None or self.body is None:
            go_on()
            return

        def then(refusal: Reply | None) -> None:
            if refusal is not None and self.course.broken is None:
                self._services.metrics.rejected("limit")
                self._refuse(refusal)
            go_on()

        recipients = [self._counted_as(each) for each in self.envelope.accepted]
        self._claim.at_end(recipients, self.body.size, then)

    def _conclude(self, outcome: Outcome, said: object) -> None:
        super()._conclude(outcome, said)
        self._claim.end(sent=outcome in (Outcome.ACCEPTED, Outcome.IN_DOUBT))


def _heard(_: Reply) -> None:
    """The client has had its answer."""
