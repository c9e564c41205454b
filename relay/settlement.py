"""One message from its end of data to its outcome.

A message's way on, top to bottom: `begin` has a place kept for its row, and the message in the journal,
before its end of data goes up; where that cannot be, it does not. `_settle` acts on the verdict: behind a 2yz
`_record` has the row made durable, and behind that `_accepted` answers the client. Without a verdict the
message is in doubt, and an entry says so. `_end` hands on the outcome. Each step is a callback of the one
before, and there is nothing by which that could be cancelled: a client that goes, a timer (`check`) and a
shutdown (`give_up`) only change what the client hears.

Rules: only `_settle` has a row made, only after a 2yz. Nothing here sends anything to an upstream, so what
went up once is never sent again. The client is told once (`_tell`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, cast

from relay import maillog
from relay.account import negative_outcome
from relay.answers import NO_RECIPIENTS, in_doubt
from relay.outcome import Outcome
from relay.records.journal import ROOM, line_of
from relay.records.model import Settled
from relay.reply import Reply
from relay.upstream.connection import Failure

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from relay.account import Account
    from relay.classify import Classification
    from relay.course import Course
    from relay.lease import Lease
    from relay.services import Services

__all__ = ["Settlement"]

_ACCEPTED: Final = Outcome.ACCEPTED  # CPython 3.11 finds a member of an enumeration by way of an exception


class Settlement:
    """One message between its end of data and its outcome."""

    __slots__ = (
        "_account",
        "_answer",
        "_chunked",
        "_conclude",
        "_course",
        "_doubted",
        "_ended_at",
        "_found",
        "_lease",
        "_overdue",
        "_promised",
        "_services",
        "_settled_at",
        "_slot",
        "_verdict",
    )

    def __init__(
        self,
        services: Services,
        account: Account,
        lease: Lease,
        course: Course,
        *,
        chunked: bool,
        answer: Callable[[Reply], None],
        conclude: Callable[[Outcome, object], None],
    ) -> None:
        """Make ready for the verdict on a message that is whole.

        `chunked`: it goes up by BDAT. `answer` gets the reply to the end of data, `conclude` the outcome and
        the upstream's last word.
        """
        self._services = services
        self._account = account
        self._lease = lease
        self._course = course
        self._chunked = chunked
        self._answer = answer
        self._conclude = conclude
        self._found = cast("Classification", account.found)  # there is one once the end of data has come
        self._promised: int  # octets that the spool keeps for the row
        self._slot: int | None  # of the journal
        self._ended_at: float  # the end of data went up
        self._settled_at: float  # the verdict was acted on
        self._verdict: Reply | Failure | None = None
        self._overdue = False
        self._doubted: asyncio.Future[None] | None = None  # the entry in task_in_doubt; done: it is durable

    def begin(self) -> bool:
        """Have a place kept for the row, and the message in the journal, before its end of data goes up.

        False: there is none, and it must not go up. Else it has to, and `verdict_came` hears what follows.
        """
        account, services = self._account, self._services
        line = account.line(self._found)
        self._promised = octets = account.place(line)
        if services.recorder.promise(octets):
            if len(line) > ROOM:
                line = line_of(account.doubt(self._found, ""))
            self._slot = services.journal.enter(line)
            if self._slot is not None:
                services.settling.add(self)
                self._ended_at = services.loop.time()
                return True
            services.recorder.release(octets)
        services.metrics.rejected("records")
        return False

    def _leave_journal(self) -> None:
        if self._slot is not None:
            self._services.journal.free(self._slot)
            self._slot = None

    # The verdict

    def verdict_came(self, verdict: Reply | Failure) -> None:
        """Settle with the first verdict, behind whatever else the same octets of the upstream hold."""
        if self._verdict is None:
            self._verdict = verdict
            self._services.loop.call_soon(self._settle, verdict)

    def _settle(self, verdict: Reply | Failure) -> None:
        """Record an acceptance, answer the client, and say what became of the message.

        In callbacks, each behind what it has to await: a task for it takes 4 us a message.
        """
        self._settled_at = now = self._services.loop.time()
        self._account.upstream_s = now - self._ended_at
        if self._chunked and (self._course.broken is not None or self._course.nobody_accepted):
            self._went_nowhere(verdict)
            return
        if isinstance(verdict, Failure):
            self._tell(in_doubt(self._account.task_id))
            self._doubt(verdict.reason)
            _behind(self._doubted, partial(self._end, Outcome.IN_DOUBT, verdict.reason))
            return
        # Accepted, the transaction is over (RFC 5321 4.1.1.4). Refused, that is not certain after a chunk
        # (RFC 3030 2), nor where it is Postfix's smtpd_end_of_data_restrictions that say no.
        self._lease.release(reset=not verdict.positive, ahead=not self._chunked)
        if verdict.positive:
            self._record(verdict)
            return
        if self._doubted is None:
            self._leave_journal()
        self._tell(verdict.recoded(451) if verdict.code == 421 else verdict)
        # A chunk that was refused before the last one decided it; this only follows from that.
        decisive = (self._course.data_reply if self._chunked else None) or verdict
        ended = None if self._doubted is None else self._end_doubt()
        _behind(ended, partial(self._end, negative_outcome(decisive), decisive))

    def _went_nowhere(self, verdict: Reply | Failure) -> None:
        """End a message that went up with its recipients, none of whom was accepted: nobody can have it.

        So there is neither a row nor a doubt, whatever the upstream says to its end; one that accepts it all
        the same is not trusted with another.
        """
        lease, course = self._lease, self._course
        said = course.broken or NO_RECIPIENTS
        if isinstance(verdict, Reply):
            if verdict.positive and lease.connection is not None:
                lease.connection.usable = False
            lease.release(reset=True)
            if not verdict.positive:
                said = verdict.recoded(451) if verdict.code == 421 else verdict
        if self._doubted is None:
            self._leave_journal()
        self._tell(said)
        ended = None if self._doubted is None else self._end_doubt()
        _behind(ended, partial(self._end, course.outcome(), course.last_reply))

    # Accepted

    def _record(self, verdict: Reply) -> None:
        """Have the row made durable; accepted means accepted, so no failure here may say otherwise."""
        account = self._account
        account.total_s = self._settled_at - account.began
        try:
            record = account.record(self._found, verdict, doubted=self._doubted is not None)
            kept = self._services.recorder.record(record)
        except Exception as error:
            # It stays in the journal: the next start shows that this message needs a look.
            self._not_kept("record", error)
            self._accepted(verdict)
        else:
            kept.add_done_callback(partial(self._recorded, verdict))

    def _recorded(self, verdict: Reply, kept: asyncio.Future[None]) -> None:
        error = kept.exception()
        if error is None:
            self._leave_journal()
        else:
            self._not_kept("record", error)
        self._accepted(verdict)

    def _accepted(self, verdict: Reply) -> None:
        """Only now may the client hear it."""
        self._account.commit_s = self._services.loop.time() - self._settled_at
        self._tell(verdict)
        self._end(_ACCEPTED, verdict)

    def _not_kept(self, what: str, error: BaseException) -> None:
        self._services.metrics.record_error()
        maillog.unforeseen(what, self._account.task_id, error)

    # In doubt

    def check(self, now: float) -> None:
        """Tell the client 451 if the verdict is overdue; it is still awaited, and recorded when it comes."""
        limit = self._lease.pool.end_of_data_timeout
        if self._overdue or now - self._ended_at <= limit or self._verdict is not None:
            return
        reason = f"no answer to the end of data within {limit:g} s"
        if self._chunked and self._course.nobody_accepted:  # there is nothing to be in doubt about
            self._tell(NO_RECIPIENTS)
            self.verdict_came(Failure(reason))
            self._lease.cut(reason)
            return
        self._overdue = True
        self._account.upstream_s = now - self._ended_at
        self._tell(in_doubt(self._account.task_id))
        self._doubt(reason)
        self._account.overdue(reason)

    def give_up(self) -> None:
        """Stop awaiting the verdict: the relay ends. The message is in doubt."""
        self.verdict_came(Failure("the relay stopped before the upstream answered"))
        self._lease.cut("the relay stops")

    def _doubt(self, reason: str) -> None:
        """Have an entry made in task_in_doubt, once; nothing here may change what the client hears.

        Its slot in the journal guards the message until the entry is durable.
        """
        if self._doubted is not None:
            return
        account = self._account
        account.total_s = self._services.loop.time() - account.began
        try:
            self._doubted = self._services.recorder.record(account.doubt(self._found, reason))
        except Exception as error:
            self._not_kept("doubt", error)
        else:
            self._doubted.add_done_callback(self._doubt_kept)

    def _doubt_kept(self, kept: asyncio.Future[None]) -> None:
        if kept.cancelled():
            return
        error = kept.exception()
        if error is None:
            self._leave_journal()
        else:
            self._not_kept("doubt", error)

    def _end_doubt(self) -> asyncio.Future[None] | None:
        """Take the entry back: the upstream has refused the message after all."""
        try:
            ended = self._services.recorder.record(Settled(self._account.task_id))
        except Exception as error:
            self._not_kept("doubt", error)
            return None
        ended.add_done_callback(self._doubt_ended)
        return ended

    def _doubt_ended(self, ended: asyncio.Future[None]) -> None:
        error = None if ended.cancelled() else ended.exception()
        if error is not None:
            self._not_kept("doubt", error)

    # The end

    def _tell(self, reply: Reply) -> None:
        """Answer the client, once; a later verdict than the one it was told goes to the record alone."""
        account = self._account
        if account.client_heard is None and not account.client_gone:
            account.client_heard = reply
            self._answer(reply)

    def _end(self, outcome: Outcome, said: object) -> None:
        services = self._services
        services.settling.discard(self)
        if not services.settling:
            services.settled.set()
        services.recorder.release(self._promised)
        self._conclude(outcome, said)


def _behind(kept: asyncio.Future[None] | None, do: Callable[[], None]) -> None:
    """Do something as soon as an entry is durable; None: at once."""
    if kept is None:
        do()
    else:
        kept.add_done_callback(lambda _: do())
