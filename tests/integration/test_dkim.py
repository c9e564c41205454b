"""A signed message verifies at the upstream: DKIM (RFC 6376, RFC 8463) survives the relay."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import smtplib
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any

import dkim  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from tests.support.upstream import ScriptedUpstream

DOMAIN = b"example.test"
SELECTOR = b"mail"
HEADERS = [b"from", b"to", b"subject", b"message-id", b"mime-version", b"content-type"]


@dataclass(frozen=True)
class Key:
    """A private key as dkimpy takes it, and its TXT record."""

    algorithm: bytes
    private: bytes
    record: bytes

    def sign(self, message: bytes, canonicalization: bytes) -> bytes:
        """Return the message with its signature in front."""
        header, body = canonicalization.split(b"/")
        signature: bytes = dkim.sign(
            message,
            SELECTOR,
            DOMAIN,
            self.private,
            canonicalize=(header, body),
            signature_algorithm=self.algorithm,
            include_headers=HEADERS,
        )
        return signature + message

    def verifies(self, message: bytes) -> bool:
        """Whether a receiver that looks this key up finds the signature good."""

        def dns(name: bytes, timeout: int = 5) -> bytes:
            assert name.rstrip(b".") == SELECTOR + b"._domainkey." + DOMAIN
            return self.record

        return bool(dkim.verify(message, dnsfunc=dns))


@pytest.fixture(scope="module")
def rsa_key() -> Key:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Key(b"rsa-sha256", pem, b"v=DKIM1; k=rsa; p=" + base64.b64encode(public))


@pytest.fixture(scope="module")
def ed25519_key() -> Key:
    private = ed25519.Ed25519PrivateKey.generate()
    return Key(
        b"ed25519-sha256",
        base64.b64encode(private.private_bytes_raw()),
        b"v=DKIM1; k=ed25519; p=" + base64.b64encode(private.public_key().public_bytes_raw()),
    )


@pytest.fixture(
    params=[
        "rsa_key",
        pytest.param(
            "ed25519_key",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("nacl") is None, reason="dkimpy needs PyNaCl for ed25519"
            ),
        ),
    ]
)
def key(request: pytest.FixtureRequest) -> Key:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def with_attachment() -> bytes:
    """What Python's e-mail package makes of text, HTML and a file."""
    message = _headed("Quarterly report")
    message.set_content("See below.\n.\n..two dots\nFrom the start of a line\n")
    message.add_alternative("<p>See below.</p>\n", subtype="html")
    message.add_attachment(bytes(range(256)) * 200, maintype="application", subtype="octet-stream")
    return message.as_bytes()


def non_ascii() -> bytes:
    """8-bit text, encoded-words in the header section."""
    message = _headed("Grüße aus Zürich, 東京")
    message.set_content("Grüße, 東京, \u2028 and \x85 are no line ends\n", cte="8bit")
    return message.as_bytes()


def long_lines() -> bytes:
    """Lines beyond RFC 5321's 1,000 octets; a folded field."""
    head = _raw_head() + b"X-Folded: one\r\n\ttwo\r\n  three\r\n"
    return head + b"\r\n" + b"x" * 5000 + b"\r\n" + b". " * 1000 + b"\r\n"


def blanks() -> bytes:
    """Trailing blanks, tabs, empty lines at the end: what a relay that tidies would take away."""
    return _raw_head() + b"\r\ntrailing   \r\n\t \r\n  two  blanks\t\r\n\r\n\r\n \r\n\r\n"


def dots() -> bytes:
    """Every kind of line that transparency touches (RFC 5321 4.5.2)."""
    return _raw_head() + b"\r\n.\r\n..\r\n...\r\n.text\r\n..text\r\n. \r\ntext.\r\n.\r\n"


def _headed(subject: str) -> EmailMessage:
    message = EmailMessage(policy=SMTP)
    message["From"] = "a@example.test"
    message["To"] = "b@example.test"
    message["Subject"] = subject
    message["Message-ID"] = "<1@example.test>"
    return message


def _raw_head() -> bytes:
    return (
        b"From:  A <a@example.test> \r\nTo: b@example.test\r\nSUBJECT: odd   spacing \r\n"
        b"Message-ID: <1@example.test>\r\n"
    )


MESSAGES = [with_attachment, non_ascii, long_lines, blanks, dots]


@pytest.mark.parametrize("canonicalization", [b"relaxed/relaxed", b"simple/simple"], ids=bytes.decode)
@pytest.mark.parametrize("make", MESSAGES, ids=lambda make: make.__name__)
async def test_a_signature_verifies_at_the_upstream(
    start: Any, upstream: ScriptedUpstream, key: Key, make: Callable[[], bytes], canonicalization: bytes
) -> None:
    signed = key.sign(make(), canonicalization)
    assert key.verifies(signed)

    async with start(upstream.port) as running:
        await asyncio.to_thread(send, running.port, signed)

    (message,) = upstream.accepted
    assert key.verifies(message.content)
    assert message.content == signed


@pytest.mark.parametrize("canonicalization", [b"relaxed/relaxed", b"simple/simple"], ids=bytes.decode)
@pytest.mark.parametrize("make", MESSAGES, ids=lambda make: make.__name__)
def test_one_changed_octet_is_noticed(key: Key, make: Callable[[], bytes], canonicalization: bytes) -> None:
    signed = key.sign(make(), canonicalization)
    body = signed.index(b"\r\n\r\n") + 4
    at = next(index for index in range(body, len(signed)) if signed[index : index + 1].strip())

    changed = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]

    assert not key.verifies(changed)


def send(port: int, message: bytes) -> None:
    """Send as an application does, with the standard library."""
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as client:
        assert client.sendmail("a@example.test", ["b@example.test"], message, ["BODY=8BITMIME"]) == {}
