"""The SMTP dialogue of one session: commands and content in, replies out, in order. No sockets.

Where it stands is `State`; who moves it on stands with each.

Rules: a command is acted on only when whatever it depends on is known; until then it stays in the input, and
what is in the input is bounded by not reading more. A client that is out of step (input where it must
wait, something that is not SMTP, line ends that are not CRLF) is out: what it meant as text must never
run as commands. Nothing that was said before TLS counts within it (RFC 3207 4.2). An error of ours is 451
with the transaction's id; its cause is for the log alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, cast

from relay import maillog
from relay.records.identity import uuid7
from relay.reply import Reply
from relay.session import answers
from relay.session.commands import (
    DEFAULT_LINE_LIMIT,
    LINE_LIMITS,
    CommandError,
    is_text,
    mail_for,
    parse_bdat,
    parse_mail,
    parse_rcpt,
)
from relay.session.content import Content
from relay.session.lines import USUAL, EndlessLineError, Lines, NotCrlfError
from relay.session.login import Login
from relay.session.replies import Replies
from relay.transaction import refused_at_mail
from relay.upstream.xforward import Client

if TYPE_CHECKING:
    import asyncio

    from relay.account import Sender
    from relay.auth.verdict import Verdict
    from relay.credentials import Credentials
    from relay.session.reception import Reception
    from relay.settings import ListenerSettings
    from relay.transaction import Transaction
    from relay.upstream.capabilities import Capabilities

__all__ = ["Dialogue", "Wire"]

MAX_INPUT: Final = 64 * 1024
"""Octets of input that may wait before reading stops."""
MAX_OWED: Final = 100
"""Replies that may be outstanding before the next command is looked at."""
ERRORS_SLOW: Final = 10
"""Errors after which each further one costs the client a wait."""
ERRORS_END: Final = 20
"""Errors that end the session."""
ERROR_WAIT = 0.25
"""Seconds of that wait."""
MAX_IDLE_COMMANDS: Final = 100
"""Commands other than a transaction's in a row; a session is for sending mail."""
CONTESTED_SILENCE: Final = 2.0
"""Seconds of silence that end the lease of a client which holds more than its share while others wait."""

_FOREIGN_VERBS: Final = frozenset(
    (b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE", b"PATCH", b"PROXY")
)
"""First words of HTTP, and of the PROXY header: behind one, the peer's address is not the client's."""

_BARRIERS: Final = frozenset((b"EHLO", b"HELO", b"RSET", b"QUIT", b"STARTTLS", b"AUTH"))
"""Commands that end a transaction or cannot be within one: they wait until all replies have been given."""

_TALKING: Final = frozenset(("out_of_step", "too_large", "too_many_errors"))
"""Why a session is ended in the midst of what the client sends."""

_BEFORE_TLS: Final = frozenset((b"EHLO", b"NOOP", b"STARTTLS", b"QUIT"))
"""What may be said before TLS where TLS is required (RFC 3207 section 4)."""


class State(Enum):
    """What the session does with input."""

    COMMANDS = "commands"
    """Acts on lines, one command after the other (`_take_command`)."""
    SECURING = "securing"
    """Keeps it: TLS is being made, since `_starttls` or from the first octet on; `secured` ends it."""
    CHALLENGED = "challenged"
    """Takes the next line for the answer to a challenge of AUTH (`_take_response`)."""
    DECIDING = "deciding"
    """Keeps it: the doorkeeper has the credentials; `_decided` ends it."""
    AWAITS_354 = "awaits_354"
    """Ends the session: the client has said DATA and must wait. The reply to that ends it (`_moved`)."""
    CONTENT = "content"
    """Gives it to the transaction as text, up to the end of data (`_take_content`)."""
    CHUNK = "chunk"
    """Gives as much of it as BDAT has announced to the transaction (`_take_chunk`)."""
    SETTLING = "settling"
    """Keeps it: the message is whole (`_finish`), and the reply to its end ends it (`_settled`)."""
    ENDING = "ending"
    """Drops it: the last word is said (`_end`), and waits for replies that are owed before it (`_moved`)."""
    CLOSED = "closed"
    """Drops it: the wire is closed, or was lost."""


# By name, since looking a member up at its class costs ten times as much, forty times a message.
COMMANDS: Final = State.COMMANDS
SECURING: Final = State.SECURING
CHALLENGED: Final = State.CHALLENGED
DECIDING: Final = State.DECIDING
AWAITS_354: Final = State.AWAITS_354
CONTENT: Final = State.CONTENT
CHUNK: Final = State.CHUNK
SETTLING: Final = State.SETTLING
ENDING: Final = State.ENDING
CLOSED: Final = State.CLOSED


class Wire(Protocol):
    """The connection that a dialogue is held over."""

    choked: bool
    """Whether the client does not read what has been written."""

    def write(self, octets: bytes) -> None:
        """Send to the client."""

    def hold(self, pause: bool) -> None:
        """Stop reading from the client, or go on."""

    def close(self) -> None:
        """Close after what has been written."""

    def linger(self) -> None:
        """Close after what has been written, and behind what the client is still sending."""

    def secure(self) -> None:
        """Begin TLS; `Dialogue.secured` is called when it stands."""


class Dialogue:
    """One SMTP dialogue, from the greeting to the last word."""

    __slots__ = (
        "_advancing",
        "_answer_data",
        "_chunking_offered",
        "_content",
        "_eof",
        "_errors",
        "_esmtp",
        "_flow_paused",
        "_greeted",
        "_helo_name",
        "_holding",
        "_idle_commands",
        "_input",
        "_last_moved",
        "_listener",
        "_local",
        "_login",
        "_loop",
        "_reception",
        "_replies",
        "_secured",
        "_sender",
        "_slowed",
        "_smtputf8",
        "_state",
        "_stranger",
        "_talking",
        "_tls_first",
        "_transaction",
        "_wire",
        "may_relay",
    )

    def __init__(
        self,
        wire: Wire,
        reception: Reception,
        listener: ListenerSettings,
        sender: Sender,
        *,
        may_relay: bool,
        local: bool,
    ) -> None:
        """Begin; `sender` is who is at the other end.

        `may_relay`: whether the policy lets it relay without AUTH; it may be set anew at any time. `local`:
        whether it is on this machine.
        """
        self._wire = wire
        self._reception = reception
        self._listener = listener
        self._sender = self._stranger = sender
        self.may_relay = may_relay
        self._local = local
        self._login = Login(reception.doorkeeper)
        self._secured = False
        self._tls_first = listener.tls == "required"
        self._loop: asyncio.AbstractEventLoop = reception.loop
        self._state = SECURING if listener.tls == "implicit" else COMMANDS
        self._replies = Replies(wire.write, self._moved)
        self._input = Lines()
        self._advancing = False
        self._greeted = False
        self._helo_name = b""
        self._esmtp = False
        self._chunking_offered = False
        self._answer_data: Callable[[Reply], None] = self._replies.say
        self._smtputf8 = False
        self._content = Content(reception.metrics)
        self._transaction: Transaction | None = None
        self._errors = 0
        self._idle_commands = 0
        self._slowed = False
        self._last_moved = self._loop.time()
        self._flow_paused = False
        self._holding = False
        self._eof = False
        self._talking = False

    # What happens on the wire

    def begin(self, refusal: Reply | None) -> None:
        """Greet the client, or turn it away."""
        if refusal is None:
            self._wire.write(self._reception.greeting.wire)
        else:
            self._wire.write(refusal.wire)
            self._close()

    def secured(self) -> None:
        """Go on within TLS: as a new session after STARTTLS (RFC 3207 4.2), as one that begins otherwise."""
        self._secured = True
        self._tls_first = False
        self._last_moved = self._loop.time()
        self._state = COMMANDS
        self._greeted = self._chunking_offered = False
        self._login.forget()
        self._sender = self._stranger
        if self._listener.tls == "implicit":
            self.begin(None)
        self.advance()

    def take(self, octets: bytes) -> None:
        """Take input: commands or content, as the state says."""
        state = self._state
        if state is COMMANDS:
            if not self._take_alone(octets):
                self._input.feed(octets)
                self.advance()
        elif state is SECURING:
            self._input.feed(octets)
        elif state is AWAITS_354:
            self._out_of_step()
        elif not self.over:
            self._input.feed(octets)
            self.advance()

    def _take_alone(self, octets: bytes) -> bool:
        """Act on a command that comes alone, with nothing before it to wait for; False if it does not.

        So it is with clients that do not pipeline. `advance` would do the same, and takes twice as long.
        """
        if self._input.size or self._replies.owed or self._tls_first or self._slowed or self._wire.choked:
            return False
        if self._holding or self._eof or self._reception.draining:
            return False
        line = USUAL.fullmatch(octets)
        act = _VERBS.get(line[1].upper()) if line is not None else None
        if line is None or act is None:
            return False
        self._last_moved = self._loop.time()
        try:
            act(self, line[2] or b"")
        except Exception as error:
            self._unforeseen(error)
        return True

    def end_of_input(self) -> None:
        """The client will send no more; what is under way is still answered."""
        self._eof = True
        if self._state is CONTENT or self._state is CHUNK:
            self._close()
        else:
            self.advance()

    def client_gone(self) -> None:
        """The connection is gone: an end of data that went up is still settled, all else ends."""
        self._state = CLOSED
        self._let_go()

    @property
    def over(self) -> bool:
        """Whether the last word has been said, or is about to be."""
        return self._state in (ENDING, CLOSED)

    @property
    def unfinished(self) -> bool:
        """Whether neither a verdict is awaited nor the last word said."""
        return self._state is not SETTLING and not self.over

    # Input

    def advance(self) -> None:
        """Act on the input as far as can be done now."""
        if self._advancing:
            return
        waiting = self._input
        if waiting.size:
            self._advancing = True
            try:
                while waiting.size and self._step():
                    pass
            except Exception as error:
                self._unforeseen(error)
            finally:
                self._advancing = False
                if self._transaction is not None and self._transaction.gathering:
                    self._transaction.flush()
        if self._eof or self._reception.draining:
            self._end_if_idle()
        if (self._flow_paused or waiting.size > MAX_INPUT) is not self._holding:
            self._regulate()

    def _end_if_idle(self) -> None:
        """No more is to come, from the client or at all: end where nothing is under way that can be ended."""
        if self._state is COMMANDS and not self._replies.owed:
            if self._eof:
                self._close()
            elif self._transaction is None:
                self._end(answers.DRAINING, "draining")
        elif self._eof and self._state in (CONTENT, CHUNK, CHALLENGED):
            self._close()  # FIN came before the 354, or while BDAT waited; or no answer to a challenge comes

    def _step(self) -> bool:
        """Take one command line or block of content; False when nothing can be taken now."""
        state = self._state
        if state is COMMANDS:
            if self._wire.choked or self._slowed or len(self._replies.owed) >= MAX_OWED:
                return False
            return self._take_command()
        if state is CONTENT:
            return self._take_content()
        if state is CHALLENGED:
            return self._take_response()
        return state is CHUNK and self._take_chunk()

    def _take_command(self) -> bool:
        """Act on the next command line; False if it is not complete, or must wait for replies before it."""
        usual = None if self._tls_first else self._input.usual()
        if usual is not None:
            line, verb, argument = None, usual[1].upper(), usual[2] or b""
        else:
            line = self._next_line()
            if line is None:
                return False
            verb, _, argument = line.partition(b" ")
            verb = verb.upper()
        if self._replies.owed and self._must_wait(verb, argument):
            self._input.back()
            return False
        act = _VERBS.get(verb)
        if act is None:
            self._not_known(verb)
            return True
        self._last_moved = self._loop.time()
        if self._transaction is not None:
            if self._input.size:
                self._transaction.gathering = True
        elif self._reception.draining:
            self._end(answers.DRAINING, "draining")
            return True
        if line is not None and (wrong := self._wrong_line(verb, line)) is not None:
            self._error(wrong)
        else:
            act(self, argument)
        return True

    def _next_line(self, *, exchange: bool = False) -> bytes | None:
        """Return the next line, None as long as it is not complete; what is none ends the session."""
        try:
            return self._input.next(exchange=exchange)
        except NotCrlfError:
            self._end(answers.NOT_CRLF, "out_of_step")
        except EndlessLineError:
            self._end(answers.AUTH_LINE_TOO_LONG if exchange else answers.ENDLESS_LINE, "out_of_step")
        return None

    def _wrong_line(self, verb: bytes, line: bytes) -> Reply | None:
        """Why a line of a known verb is not acted on, whatever it says."""
        if verb == b"BDAT":  # strict about every octet itself: behind a line not understood are no commands
            return None
        if len(line) + 2 > LINE_LIMITS.get(verb, DEFAULT_LINE_LIMIT):
            return answers.LINE_TOO_LONG
        if not is_text(line):
            return answers.CONTROLS
        if self._tls_first and verb not in _BEFORE_TLS:
            return answers.TLS_FIRST
        return None

    def _must_wait(self, verb: bytes, argument: bytes) -> bool:
        """Whether the command changes what the replies still owed are about."""
        if verb == b"BDAT":
            return self._chunk_must_wait(argument)
        return verb in _BARRIERS or (verb == b"MAIL" and self._transaction is not None)

    def _chunk_must_wait(self, argument: bytes) -> bool:
        """Whether a chunk waits: the first one counts on a recipient, unless the whole message is here."""
        transaction = self._transaction
        if transaction is None:
            return True
        if transaction.chunking:
            return not transaction.chunk_may_follow
        command = parse_bdat(argument)
        if command is None or not command.last or command.size > self._input.size:
            return True
        return not transaction.takes_ahead(self._input.peek(command.size))

    def _not_known(self, verb: bytes) -> None:
        if verb == b"*":  # Go's net/smtp cancels an AUTH exchange (RFC 4954 4) that has ended with a refusal
            self._error(answers.UNKNOWN)
        elif verb in _FOREIGN_VERBS or (verb and not (verb.isalpha() and verb.isascii() and len(verb) <= 16)):
            self._end(answers.NOT_SMTP, "out_of_step")
        else:
            self._error(answers.UNKNOWN)

    # Commands

    def _ehlo(self, argument: bytes) -> None:
        if self._hello(argument):
            self._esmtp = True
            carried = self._carried
            self._chunking_offered = "CHUNKING" in carried
            mechanisms = self._login.offered(private=self._private)
            starttls = self._starttls_offered
            self._replies.say(self._reception.ehlo(carried, starttls=starttls, mechanisms=mechanisms))

    @property
    def _carried(self) -> Capabilities:
        """What every upstream can do that this client's messages may go to."""
        login = self._login
        return self._reception.carried(
            self._sender, may_relay=self.may_relay or login.done, may_log_in=login.possible
        )

    def _helo(self, argument: bytes) -> None:
        if self._hello(argument):
            self._esmtp = self._chunking_offered = False
            self._replies.say(self._reception.helo)

    def _hello(self, argument: bytes) -> bool:
        """RFC 5321 4.1.4: a new EHLO ends the open transaction, as RSET does."""
        if not argument.strip():
            self._error(answers.NEEDS_NAME)
            return False
        self._reset()
        self._greeted = True
        self._helo_name = argument
        return self._not_idle()

    def _mail(self, argument: bytes) -> None:
        if not self._greeted:
            self._error(answers.START)
            return
        if self._transaction is not None:
            self._error(answers.NESTED)
            return
        try:
            mail = parse_mail(argument)
        except CommandError as error:
            self._error(error.reply)
            return
        refusal = self._refusal(mail.reverse_path, mail.size)
        if refusal is not None:
            reply, reason = refusal
            self._reception.metrics.rejected(reason)
            refused_at_mail(self._reception.metrics, self._sender, mail.reverse_path, reply)
            self._replies.say(reply)
            return
        self._idle_commands = 0
        self._smtputf8 = mail.smtputf8
        transaction = self._reception.transaction(
            self._sender,
            mail.reverse_path,
            mail.size,
            self._client() if self._reception.upstreams.xforward else None,
        )
        self._transaction = transaction
        transaction.on_flow = self._on_flow
        transaction.on_burst = self._replies.burst
        transaction.gathering = self._input.size > 0
        transaction.binary = mail.binary
        self._content.begin_message()
        line_for = partial(mail_for, argument, mail) if mail.own else None
        transaction.mail(b"MAIL " + argument + b"\r\n", self._replies.owe(), line_for=line_for)

    def _client(self) -> Client:
        """Who sends, for an upstream that is to be told."""
        sender = self._sender
        return Client(sender.address or sender.client, sender.port, self._helo_name, self._esmtp)

    def _refusal(self, reverse_path: bytes, size: int | None) -> tuple[Reply, str] | None:
        """The relay's own policy at MAIL: who may relay, how large, and whether a row could be kept."""
        if self._login.done:
            if not self._login.stands:
                return answers.LOG_IN_AGAIN, "not_allowed"
        elif not self.may_relay:
            return answers.AUTH_FIRST if self._login.possible else answers.NOT_ALLOWED, "not_allowed"
        if not self._login.may_use(reverse_path):
            return answers.NOT_YOUR_SENDER, "not_allowed"
        limit = self._reception.max_message_size
        if size is not None and limit and size > limit:
            return answers.TOO_LARGE, "too_large"
        if self._reception.services.refusal() is not None:
            return answers.NO_RECORDS, "records"
        return None

    def _rcpt(self, argument: bytes) -> None:
        transaction = self._open_transaction()
        if transaction is None:
            self._error(answers.NO_TRANSACTION)
            return
        try:
            path = parse_rcpt(argument, smtputf8=self._smtputf8)
        except CommandError as error:
            self._error(error.reply)
            return
        if len(transaction.envelope.recipients) >= self._reception.max_recipients:
            self._reception.metrics.rejected("too_many_recipients")
            self._replies.say(answers.TOO_MANY_RECIPIENTS)
            return
        transaction.rcpt(b"RCPT " + argument + b"\r\n", path, self._replies.owe())

    def _data(self, argument: bytes) -> None:
        transaction = self._open_transaction()
        if self._input.size:
            # What follows DATA in the same breath is meant as text: it must not run as commands, and the
            # client has not waited for the 354 that it needs (RFC 2920 3.1).
            self._out_of_step()
        elif argument:
            self._refuse_data(answers.NO_ARGUMENT)
        elif transaction is None:
            self._refuse_data(answers.NO_TRANSACTION)
        elif not transaction.envelope.recipients:
            self._refuse_data(answers.NO_RCPT)
        elif transaction.chunking or transaction.binary:
            self._refuse_data(answers.MIXED)
        else:
            self._state = AWAITS_354
            self._answer_data = self._replies.owe()
            transaction.data(self._answer_data)

    def _refuse_data(self, reply: Reply) -> None:
        """Answer DATA instead of the upstream; what comes before that is given was not meant as commands."""
        self._error(reply)
        if self._replies.owed and not self.over:
            self._state = AWAITS_354

    def _data_answered(self) -> None:
        """The reply to DATA is given, which may have been known for longer than those before it."""
        transaction = self._transaction
        if transaction is None or transaction.body is None or transaction.chunking:
            self._state = COMMANDS
        else:
            self._state = CONTENT
            self._content.begin_text(self._loop.time())

    def _bdat(self, argument: bytes) -> None:
        """RFC 3030 2: the chunk comes with the command, and is content whatever the answer will be."""
        transaction = self._open_transaction()
        command = parse_bdat(argument)
        if not self._chunking_offered:  # what was stands, whatever an upstream has said since
            self._end(answers.NO_CHUNKING, "out_of_step")
        elif command is None:
            self._end(answers.BAD_CHUNK, "out_of_step")
        elif command.size or command.last or self._not_idle():
            self._begin_chunk(transaction, command.size, last=command.last)

    def _begin_chunk(self, transaction: Transaction | None, size: int, *, last: bool) -> None:
        limit = self._reception.max_message_size
        self._content.begin_chunk(transaction, size, self._loop.time(), last=last, max_size=limit)
        self._state = CHUNK
        if self._content.hopeless:
            self._end(answers.TOO_LARGE, "too_large")
        elif not size:
            self._end_chunk()

    def _rset(self, argument: bytes) -> None:
        if argument:
            self._error(answers.NO_ARGUMENT)
            return
        self._reset()
        if self._not_idle():
            self._replies.say(answers.OK)

    def _noop(self, argument: bytes) -> None:
        del argument
        if self._not_idle():
            self._replies.say(answers.OK)

    def _vrfy(self, argument: bytes) -> None:
        del argument
        if self._not_idle():
            self._replies.say(answers.VRFY)

    def _help(self, argument: bytes) -> None:
        del argument
        if self._not_idle():
            self._replies.say(answers.HELP)

    # TLS

    @property
    def _starttls_offered(self) -> bool:
        return not self._secured and self._listener.tls in ("starttls", "required")

    def _starttls(self, argument: bytes) -> None:
        if argument:
            self._error(answers.NO_ARGUMENT)
        elif self._secured:
            self._error(answers.TLS_ALREADY)
        elif not self._starttls_offered:
            self._error(answers.NOT_HERE)
        elif self._transaction is not None:
            self._error(answers.NESTED)
        elif self._input.size:
            # Whoever put this behind STARTTLS wants it to be taken for what TLS protects (RFC 3207 4.2).
            self._out_of_step()
        else:
            self._state = SECURING
            self._replies.say(answers.START_TLS)
            self._wire.secure()

    # AUTH (RFC 4954)

    @property
    def _private(self) -> bool:
        """Whether credentials may be said here: within TLS, or where the operator says so on this machine."""
        return self._secured or (self._local and self._reception.auth_without_tls)

    def _auth(self, argument: bytes) -> None:
        if self._login.exhausted:
            self._end(answers.TOO_MANY_LOGINS, "too_many_logins")
        elif self._transaction is not None:
            self._error(answers.AUTH_IN_TRANSACTION)
        elif not self._greeted:
            self._error(answers.START)
        else:
            self._go_on_with_login(self._login.begin(argument, private=self._private))

    def _go_on_with_login(self, step: Reply | Credentials) -> None:
        """Give the challenge or the refusal to the client, or have the credentials decided about."""
        if not isinstance(step, Reply):
            self._state = DECIDING
            self._reception.doorkeeper.decide(step, self._sender, self._decided)
        elif step.code != 334:
            self._error(step)
        elif self._input.size:  # the answer came before the challenge
            self._out_of_step()
        else:
            self._state = CHALLENGED
            self._replies.say(step)

    def _take_response(self) -> bool:
        """Take the client's next line in the exchange; False if it is not complete."""
        line = self._next_line(exchange=True)
        if line is None:
            return False
        self._last_moved = self._loop.time()
        self._state = COMMANDS
        self._go_on_with_login(self._login.respond(line))
        return True

    def _decided(self, verdict: Verdict) -> None:
        """Hear whether the login is good; the client may have gone in the meantime."""
        if self._state is not DECIDING:
            return
        self._state = COMMANDS
        self._last_moved = self._loop.time()
        if verdict.outcome == "throttled":
            self._end(verdict.reply, "too_many_logins")
            return
        self._login.decided(verdict)
        if self._login.done:
            self._sender = replace(
                self._sender,
                client=verdict.user or self._sender.client,
                address=self._sender.client,
                credentials=verdict.credentials,
            )
        self._replies.say(verdict.reply)
        self.advance()

    def _not_available(self, argument: bytes) -> None:
        del argument
        self._error(answers.NOT_HERE)

    def _quit(self, argument: bytes) -> None:
        del argument
        self._reset()
        self._replies.say(answers.BYE)
        self._close()

    def _open_transaction(self) -> Transaction | None:
        """The transaction that RCPT and DATA belong to: open, or about to be (MAIL not answered yet)."""
        transaction = self._transaction
        return None if transaction is None or transaction.refused else transaction

    def _reset(self) -> None:
        transaction, self._transaction = self._transaction, None
        self._flow_paused = False
        if transaction is not None:
            transaction.abandon()

    def _not_idle(self) -> bool:
        """Count a command that brings no message nearer; False when there were too many."""
        self._idle_commands += 1
        if self._idle_commands <= MAX_IDLE_COMMANDS:
            return True
        self._end(answers.IDLE_COMMANDS, "too_many_errors")
        return False

    # Content

    def _take_content(self) -> bool:
        transaction = cast("Transaction", self._transaction)
        self._last_moved = self._loop.time()
        if self._content.take_text(self._input, transaction):
            self._finish(transaction)
            return True
        if transaction.body is not None and transaction.body.hopeless:
            self._end(answers.TOO_LARGE, "too_large")
        return False

    def _take_chunk(self) -> bool:
        self._last_moved = self._loop.time()
        if self._content.take_chunk(self._input, self._transaction):
            self._end_chunk()
        return True

    def _end_chunk(self) -> None:
        self._state = COMMANDS
        if self._content.refusal is not None:
            self._error(self._content.refusal)
            return
        transaction = cast("Transaction", self._transaction)
        if self._content.chunk_ended():
            self._finish(transaction)
        else:
            transaction.end_chunk(self._replies.owe())

    def _finish(self, transaction: Transaction) -> None:
        """The message is whole: have it sent, and wait for the verdict."""
        self._state = SETTLING
        self._flow_paused = False
        transaction.finish(self._settled)

    def _settled(self, reply: Reply) -> None:
        """Give the verdict to the client; what it sent behind the end of data is next."""
        self._transaction = None
        self._flow_paused = False  # by its end, on a connection that is not its own any more
        if self._state is SETTLING:
            self._state = COMMANDS
        self._replies.say(reply)
        self._moved()

    def _on_flow(self, pause: bool) -> None:
        self._flow_paused = pause
        self._regulate()

    def _regulate(self) -> None:
        """Read on, or not: content waits for the upstream, and waiting input is bounded."""
        hold = self._flow_paused or self._input.size > MAX_INPUT
        if hold is not self._holding:
            self._holding = hold
            self._wire.hold(hold)

    # Replies

    def _moved(self) -> None:
        """A reply has been given: the client's turn begins, and what waited for the reply may go on."""
        self._last_moved = self._loop.time()
        if self._state is AWAITS_354 and not self._replies.owed:
            self._data_answered()
        transaction = self._transaction
        if transaction is not None and transaction.over:
            self._reset()
        if self._state is ENDING:
            if not self._replies.owed:
                self._close()
            return
        # Most replies are given while no input waits; then there is nothing to act on but an end.
        if self._input.size or self._holding or self._eof or self._reception.draining:
            self.advance()

    # Errors and ends

    def _error(self, reply: Reply) -> None:
        """Answer a command that is wrong; errors slow a session, and in the end finish it."""
        self._errors += 1
        if self._errors >= ERRORS_END:
            self._end(answers.TOO_MANY_ERRORS, "too_many_errors")
            return
        self._replies.say(reply)
        if self._errors >= ERRORS_SLOW:
            self._slowed = True
            self._loop.call_later(ERROR_WAIT, self._resume)

    def _resume(self) -> None:
        self._slowed = False
        self.advance()

    def _out_of_step(self) -> None:
        self._end(answers.OUT_OF_STEP, "out_of_step")

    def _unforeseen(self, error: Exception) -> None:
        identity = self._transaction.task_id if self._transaction is not None else uuid7()
        maillog.unforeseen("session", identity, error)
        self._end(answers.internal(identity), "internal")

    def _end(self, reply: Reply, reason: str) -> None:
        """Finish from our side: `reply` is the last word, after those that are still owed."""
        if self.over:
            return
        self._reception.metrics.rejected(reason)
        maillog.session_refused(self._sender.client, self._sender.listener, reason)
        unanswered = self._state is AWAITS_354 and not self._replies.last_known
        answer = self._answer_data if unanswered else self._replies.say
        self._state = ENDING
        self._talking = reason in _TALKING
        self._input.clear()
        answer(reply)
        if not self._replies.owed:
            self._close()

    def _close(self) -> None:
        """Close after what has been written; the transaction goes on only if its end of data went up."""
        if self._state is not CLOSED:
            self._state = CLOSED
            self._let_go()
            if not self._talking or self._eof:
                self._wire.close()
                return
            if self._holding:
                self._holding = False
                self._wire.hold(False)
            self._wire.linger()

    def _let_go(self) -> None:
        self._input.clear()
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction.client_gone()

    # Time

    def check(self, now: float, elapsed: float) -> None:
        """Look at what the client is waited for (RFC 5321 4.5.3.2); called every `elapsed` seconds."""
        transaction = self._transaction
        between_chunks = self._state is COMMANDS and transaction is not None and transaction.chunking
        if self._state is CONTENT or self._state is CHUNK or between_chunks:
            self._check_content(now, elapsed)
        elif self._state in (COMMANDS, CHALLENGED) and not self._replies.owed and not self._slowed:
            self._check_silence(now)

    def _check_content(self, now: float, elapsed: float) -> None:
        if self._flow_paused or (self._state is COMMANDS and self._replies.owed):
            # It is the upstream that takes its time.
            self._content.paused(elapsed)
            self._last_moved = now
            return
        transaction, chunk = self._transaction, self._state is CHUNK
        if transaction is not None:
            transaction.pass_on()
        contested = transaction is not None and transaction.contested
        content_of = None if chunk else transaction
        if self._content.too_slow(content_of, now, self._reception.min_data_rate, contested=contested):
            self._end(answers.TOO_SLOW, "slow")
        else:
            self._check_silence(now)

    def _check_silence(self, now: float) -> None:
        silence = now - self._last_moved
        if silence > self._reception.idle_timeout:
            self._end(answers.TIMEOUT, "timeout")
        elif self._transaction is not None and (
            silence > self._reception.lease_idle_timeout
            or (silence > CONTESTED_SILENCE and self._transaction.contested)
        ):
            self._transaction.silent()

    def make_room(self) -> None:
        """Say 421 to a client that is idle, since others find no place."""
        if self.idle_since is not None:
            self._end(answers.CROWDED, "crowded")

    @property
    def idle_since(self) -> float | None:
        """Since when nothing is under way, in the loop's time; None while something is."""
        if self._state is COMMANDS and self._transaction is None and not self._replies.owed:
            return self._last_moved
        return None

    def drain(self) -> None:
        """Say 421 if nothing is under way; what is under way is finished first."""
        if self._state is COMMANDS and self._transaction is None and not self._replies.owed:
            self._end(answers.DRAINING, "draining")

    @staticmethod
    def _acts() -> dict[bytes, Callable[[Dialogue, bytes], None]]:
        """Return what is done for each verb."""
        return {
            b"EHLO": Dialogue._ehlo,
            b"HELO": Dialogue._helo,
            b"MAIL": Dialogue._mail,
            b"RCPT": Dialogue._rcpt,
            b"DATA": Dialogue._data,
            b"BDAT": Dialogue._bdat,
            b"RSET": Dialogue._rset,
            b"NOOP": Dialogue._noop,
            b"VRFY": Dialogue._vrfy,
            b"HELP": Dialogue._help,
            b"QUIT": Dialogue._quit,
            b"EXPN": Dialogue._not_available,
            b"TURN": Dialogue._not_available,
            b"ETRN": Dialogue._not_available,
            b"AUTH": Dialogue._auth,
            b"STARTTLS": Dialogue._starttls,
        }


_VERBS: Final = Dialogue._acts()  # noqa: SLF001
