"""Opening one upstream connection: connect, greeting, EHLO, TLS, AUTH. The only module that uses aiosmtplib.

Rules: every failure ends here as a DialError that says at which stage it happened and what the client may be
told. Credentials go out once, with one mechanism, and never in clear (settings see to it). After the
handshake the socket belongs to our own Connection; octets that the library still holds then answer nothing
that was asked, and end the attempt.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any, cast

import aiosmtplib

from relay.reply import Reply
from relay.upstream.capabilities import Capabilities

if TYPE_CHECKING:
    from relay.settings import UpstreamSettings

__all__ = ["DialError", "Dialer"]

UNREACHABLE = Reply.own(451, "4.1", "The upstream server cannot be reached now, try again later")
NOT_SECURED = Reply.own(451, "7.0", "The upstream server cannot be reached securely now, try again later")
LOOP = Reply.own(554, "4.6", "Mail loop: the upstream server is this relay")


class DialError(Exception):
    """The upstream could not be reached, secured or logged in to.

    `stage` is one of the fixed connect outcomes of the metrics; `reply` is what the client hears; the
    text is for the operator.
    """

    def __init__(self, stage: str, text: str, reply: Reply) -> None:
        super().__init__(text)
        self.stage = stage
        self.reply = reply


class Dialer:
    """Opens connections to one upstream."""

    def __init__(self, upstream: UpstreamSettings, *, hostname: str, own_token: str) -> None:
        """`hostname` is said in EHLO; a greeting that holds `own_token` is our own: a loop."""
        self._upstream = upstream
        self._hostname = hostname
        self._own_token = own_token
        self._context = _tls_context(upstream)

    async def dial(self) -> tuple[asyncio.Transport, Capabilities]:
        """Return an open transport with the handshake done, reading paused, and what the upstream can do.

        Each step takes at most `connect_timeout`. Raises DialError.
        """
        upstream = self._upstream
        client = aiosmtplib.SMTP(
            hostname=upstream.host,
            port=upstream.port,
            local_hostname=self._hostname,
            use_tls=upstream.tls == "implicit",
            start_tls=False,
            tls_context=self._context,
            timeout=upstream.connect_timeout,
        )
        stage = "unreachable"
        try:
            greeting = await client.connect()
            if self._own_token in greeting.message:
                raise DialError("protocol", "mail loop: the upstream is this relay itself", LOOP)
            stage = "protocol"
            await _greet(client)
            if upstream.tls == "starttls" or (
                upstream.tls == "opportunistic" and client.supports_extension("starttls")
            ):
                stage = "tls"
                await client.starttls(tls_context=self._context, server_hostname=upstream.host)
                stage = "protocol"
                await client.ehlo()
            if upstream.username is not None and upstream.password is not None:
                stage = "auth"
                await _login(client, upstream.username, upstream.password.get_secret_value())
            return _take_over(client), Capabilities.of(client.esmtp_extensions)
        except DialError:
            _discard(client)
            raise
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            _discard(client)
            raise _classified(stage, error) from error
        except BaseException:
            _discard(client)
            raise


async def _greet(client: aiosmtplib.SMTP) -> None:
    """Say EHLO; to a server that does not know the command, HELO (RFC 5321 3.2)."""
    try:
        await client.ehlo()
    except aiosmtplib.SMTPHeloError as error:
        if error.code not in (500, 502):
            raise
        await client.helo()


async def _login(client: aiosmtplib.SMTP, username: str, password: str) -> None:
    """Log in with the best mechanism that both sides know; a refusal is final (no lock-outs).

    Under TLS that is PLAIN, which every password store can check; in clear it is CRAM-MD5.
    """
    attempts = {
        "plain": client.auth_plain,
        "login": client.auth_login,
        "cram-md5": client.auth_crammd5,
    }
    secured = client.get_transport_info("sslcontext") is not None
    offered = {mechanism.lower() for mechanism in client.supported_auth_methods}
    for mechanism in attempts if secured else reversed(attempts):
        if mechanism in offered:
            await attempts[mechanism](username, password)
            return
    raise aiosmtplib.SMTPException("the upstream offers no AUTH mechanism that the relay knows")


def _take_over(client: aiosmtplib.SMTP) -> asyncio.Transport:
    """Detach the open transport from the library."""
    transport = cast("asyncio.Transport | None", client.transport)
    protocol: Any = client.protocol
    if transport is None or transport.is_closing() or protocol is None:
        raise aiosmtplib.SMTPServerDisconnected("the upstream closed during the handshake")
    transport.pause_reading()
    if protocol._buffer:  # noqa: SLF001  no public way to see octets behind the last reply
        raise aiosmtplib.SMTPServerDisconnected("out of step: octets behind the last reply of the handshake")
    client.transport = None
    client.protocol = None
    return transport


def _discard(client: aiosmtplib.SMTP) -> None:
    transport = cast("asyncio.Transport | None", client.transport)
    if transport is not None:
        transport.abort()
    client.close()


def _classified(stage: str, error: Exception) -> DialError:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        stage = "tls"
    if stage == "unreachable":
        if isinstance(error, aiosmtplib.SMTPTimeoutError):
            stage = "timeout"
        elif isinstance(error, aiosmtplib.SMTPResponseException):
            stage = "greeting"
    reply = NOT_SECURED if stage in ("tls", "auth") else UNREACHABLE
    return DialError(stage, text, reply)


def _tls_context(upstream: UpstreamSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=upstream.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not upstream.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
