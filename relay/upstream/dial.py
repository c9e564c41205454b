"""Opening one upstream connection: connect, greeting, EHLO, TLS, AUTH. The only module that uses aiosmtplib.

Rules: every failure ends here as a DialError that says at which stage it happened and what the client may be
told. Credentials go out once, with one mechanism, and never in clear but to this machine itself. From the
greeting on, every reply is read by our own parser, and the library sees whole replies only, each after the
command that it answers: octets that answer nothing end the attempt, so that nothing that was said in clear,
glued to a reply, can count as said within TLS (RFC 3207 sections 4.2 and 6).
"""

from __future__ import annotations

import asyncio
import ssl
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import aiosmtplib

from relay.credentials import Password, without
from relay.reply import MalformedReplyError, Reply, ReplyParser
from relay.upstream import sasl
from relay.upstream.capabilities import Capabilities
from relay.upstream.tokens import TokenError, token_source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine

    from relay.credentials import Credentials
    from relay.settings import UpstreamSettings

__all__ = ["DialError", "Dialed", "Dialer"]

UNREACHABLE = Reply.own(451, "4.1", "The upstream server cannot be reached now, try again later")
NOT_SECURED = Reply.own(451, "7.0", "The upstream server cannot be reached securely now, try again later")
LOOP = Reply.own(554, "4.6", "Mail loop: the upstream server is this relay")


class DialError(Exception):
    """The upstream could not be reached, secured or logged in to.

    `stage` is one of the fixed connect outcomes of the metrics; `reply` is what the client hears; the
    text is for the operator. `verdict` is set when it is the upstream's own reply to the credentials of a
    client; `reply` is then the same. `turned_away`: the upstream said that it takes no session now, by a
    4yz reply in the handshake (421 usually: RFC 5321 3.8).
    """

    def __init__(
        self, stage: str, text: str, reply: Reply, *, verdict: bool = False, turned_away: bool = False
    ) -> None:
        super().__init__(text)
        self.stage = stage
        self.reply = reply
        self.verdict = reply if verdict else None
        self.turned_away = turned_away


class Dialed(NamedTuple):
    """A connection that is open, with the handshake done and reading paused."""

    transport: asyncio.Transport
    capabilities: Capabilities
    """What the upstream can do."""
    welcome: Reply | None = None
    """Its reply to the login, if there was one."""


class Dialer:
    """Opens connections to one upstream."""

    def __init__(self, upstream: UpstreamSettings, *, hostname: str, own_token: str) -> None:
        """`hostname` is said in EHLO; a greeting that holds `own_token` is our own: a loop."""
        self._upstream = upstream
        self._hostname = hostname
        self._own_token = own_token
        # To load the certificate authorities takes a while.
        self._context = None if upstream.tls == "none" else _tls_context(upstream)
        self._tokens = token_source(upstream.token) if upstream.token is not None else None

    async def dial(self, credentials: Credentials | None = None) -> Dialed:
        """Open a connection, logged in with a client's `credentials`, else with the relay's own account.

        Each step takes at most `connect_timeout`. Raises DialError.
        """
        login: sasl.Login | None = None
        token, user = "", self._upstream.username
        told: tuple[Credentials, ...] = ()
        if credentials is not None:
            login, told = sasl.of_client(credentials), (credentials,)
        elif user is not None and self._tokens is not None:
            try:
                token = await self._tokens.token()  # before there is a connection that would have to wait
            except TokenError as error:
                raise DialError("auth", str(error), NOT_SECURED) from error
            login = sasl.with_token(user, token, self._upstream.host, self._upstream.port)
            told = sasl.tokens(user, token, self._upstream.host, self._upstream.port)
        elif user is not None and self._upstream.password is not None:
            password = self._upstream.password.get_secret_value()
            login, told = sasl.with_password(user, password), (Password(user, password),)
        try:
            return await _obedient(self._open(login))
        except sasl.RefusedError as error:
            if self._tokens is not None and token and not error.reply.transient:
                self._tokens.refused(token)
            raise _refused(error, told, of_client=credentials is not None) from error

    async def _open(self, login: sasl.Login | None) -> Dialed:
        upstream = self._upstream
        client = _Client(
            hostname=upstream.host,
            port=upstream.port,
            local_hostname=self._hostname,
            use_tls=upstream.tls == "implicit",
            start_tls=False,
            tls_context=self._context,
            timeout=upstream.connect_timeout,
        )
        stage = "unreachable"
        watch: _Watch | None = None
        try:
            greeting = await client.connect()
            if self._own_token in greeting.message:
                raise DialError("protocol", "mail loop: the upstream is this relay itself", LOOP)
            stage = "protocol"
            watch = _Watch(client)
            await _greet(client, watch)
            optional = upstream.tls == "opportunistic"
            if upstream.tls == "starttls" or (optional and client.supports_extension("starttls")):
                stage = "tls"
                secured = await self._secured(client, watch, optional=optional)
                stage = "protocol"
                if secured:
                    watch = _Watch(client)
                    await watch.ask(client.ehlo())
            welcome = None
            if login is not None:
                stage = "auth"
                welcome = await _login(client, watch, login)
            capabilities = Capabilities.of(client.esmtp_extensions, client.server_auth_methods)
            return Dialed(_take_over(client), capabilities, welcome)
        except (DialError, sasl.RefusedError):
            client.close()
            raise
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            client.close()
            raise _classified(stage, error, watch) from error
        except BaseException:
            client.close()
            raise

    async def _secured(self, client: aiosmtplib.SMTP, watch: _Watch, *, optional: bool) -> bool:
        """Go over to TLS; False: the upstream refuses it, for now (RFC 3207 4), and it is optional."""
        try:
            await watch.ask(client.starttls(tls_context=self._context, server_hostname=self._upstream.host))
        except aiosmtplib.SMTPResponseException as error:
            if not optional or not 400 <= error.code < 600 or error.code == 421:
                raise
            return False
        return True


async def _obedient(opening: Coroutine[None, None, Dialed]) -> Dialed:
    """Open a connection, and end that at once when cancelled.

    The library waits by `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that comes with
    what it waits for (bpo-37658); the next step would then take all of its time.
    """
    task = asyncio.get_running_loop().create_task(opening)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        if not task.cancelled() and task.exception() is None:
            task.result()[0].abort()
        raise
    return task.result()


class _Client(aiosmtplib.SMTP):
    """The library's client, which cuts the connection where the library would close it: when it has failed.

    To close within TLS is to wait for half a minute that the upstream agrees, and to read what it says till
    then, when the attempt has long been told of as failed, and its permit may be another's.
    """

    def close(self) -> None:
        """Cut the connection."""
        transport = cast("asyncio.Transport | None", self.transport)
        if transport is not None:
            transport.abort()
        super().close()


class _Watch(asyncio.Protocol):
    """Stands between the transport and the library, from the greeting on (and anew within TLS).

    The library drops octets that come when it awaits nothing, and reads what is glued to a reply as the reply
    to its next command. Here either ends the connection.
    """

    def __init__(self, client: aiosmtplib.SMTP) -> None:
        transport = cast("asyncio.Transport | None", client.transport)
        protocol: Any = client.protocol
        if transport is None or transport.is_closing() or protocol is None:
            raise aiosmtplib.SMTPServerDisconnected("the upstream closed during the handshake")
        self._transport = transport
        self._library = protocol
        self._parser = ReplyParser()
        self._awaits = False
        self.fault: str | None = None
        """Why the connection was ended from our side."""
        self.reply: Reply | None = None
        """The last reply, as the upstream gave it."""
        if protocol._buffer:  # noqa: SLF001  no public way to see octets behind the greeting
            raise aiosmtplib.SMTPServerDisconnected("out of step: octets behind the greeting")
        transport.set_protocol(self)

    async def ask(self, exchange: Awaitable[object]) -> Reply:
        """Let the library send one command; return the reply."""
        self.reply = None
        self._awaits = True
        try:
            await exchange
        finally:
            self._awaits = False
        return cast("Reply", self.reply)

    def data_received(self, data: bytes) -> None:
        """Hand one whole reply to the library, if it awaits one."""
        if self.fault is not None:
            return
        try:
            replies = self._parser.feed(data)
        except MalformedReplyError as error:
            self._end(f"out of step: {error}")
            return
        if len(replies) > self._awaits or (self._parser.pending and (replies or not self._awaits)):
            self._end("out of step: octets that answer nothing")
        elif replies:
            self._awaits = False
            self.reply = replies[0]
            self._library.data_received(self.reply.wire)

    def _end(self, fault: str) -> None:
        self.fault = fault
        self._transport.abort()

    def eof_received(self) -> bool | None:
        """The upstream has closed."""
        return cast("bool | None", self._library.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        self._library.connection_lost(exc)

    def pause_writing(self) -> None:
        """The library sends one command at a time, and waits for its reply."""

    def resume_writing(self) -> None:
        """As `pause_writing`."""


async def _greet(client: aiosmtplib.SMTP, watch: _Watch) -> None:
    """Say EHLO; to a server that does not know the command, HELO (RFC 5321 3.2).

    Which of these codes it has for that depends on its age (RFC 5321 4.1.4 and 4.3.2, RFC 1869 4.5).
    """
    try:
        await watch.ask(client.ehlo())
    except aiosmtplib.SMTPHeloError as error:
        if not 500 <= error.code <= 504:
            raise
        await watch.ask(client.helo())


async def _login(client: aiosmtplib.SMTP, watch: _Watch, login: sasl.Login) -> Reply:
    """Run one AUTH exchange (RFC 4954 section 4); return the 235. Raises sasl.RefusedError."""
    secured = client.get_transport_info("sslcontext") is not None
    if not secured and not _is_this_machine(client.get_transport_info("peername")):
        raise aiosmtplib.SMTPException("credentials would go in clear: AUTH is for TLS and for loopback")
    offered = frozenset(mechanism.upper() for mechanism in client.server_auth_methods)
    exchange = login(offered, secured=secured)
    if exchange is None:
        raise aiosmtplib.SMTPException("the upstream offers no AUTH mechanism that the relay knows")
    line = next(exchange)
    while True:
        reply = await watch.ask(client.execute_command(line))
        if reply.code == 235:
            return reply
        if reply.code >= 400:
            raise sasl.RefusedError(reply)
        try:
            if reply.code != 334:
                raise StopIteration
            line = exchange.send(reply)
        except StopIteration:
            raise aiosmtplib.SMTPException(f"out of step: {reply.code} to AUTH") from None


def _is_this_machine(peername: Any) -> bool:
    try:
        return ip_address(peername[0]).is_loopback
    except (TypeError, ValueError, IndexError):
        return False


def _take_over(client: aiosmtplib.SMTP) -> asyncio.Transport:
    """Detach the open transport from the library."""
    transport = cast("asyncio.Transport | None", client.transport)
    if transport is None or transport.is_closing() or client.protocol is None:
        raise aiosmtplib.SMTPServerDisconnected("the upstream closed during the handshake")
    transport.pause_reading()
    client.transport = None
    client.protocol = None
    return transport


def _refused(error: sasl.RefusedError, told: tuple[Credentials, ...], *, of_client: bool) -> DialError:
    said = without((secret for each in told for secret in each.secrets), str(error.reply))
    text = f"the upstream refused the login: {said}"
    if of_client:
        return DialError("auth", text, error.reply, verdict=True)
    return DialError("auth", text, NOT_SECURED, turned_away=error.reply.transient)


def _classified(stage: str, error: Exception, watch: _Watch | None) -> DialError:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if watch is not None and watch.fault is not None:
        text = watch.fault
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        stage = "tls"
    if stage == "unreachable":
        if isinstance(error, aiosmtplib.SMTPTimeoutError):
            stage = "timeout"
        elif isinstance(error, aiosmtplib.SMTPResponseException):
            stage = "greeting"
    reply = NOT_SECURED if stage in ("tls", "auth") else UNREACHABLE
    turned_away = isinstance(error, aiosmtplib.SMTPResponseException) and 400 <= error.code < 500
    return DialError(stage, text, reply, turned_away=turned_away)


def _tls_context(upstream: UpstreamSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=upstream.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not upstream.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
