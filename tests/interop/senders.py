"""Applications' mail clients behind one call: here are mails, there is a port; what does the client report?

Rules: each client composes, talks and reports as it does in an application; nothing is patched. Every
sender sends the mails it is given one after the other, over one connection where its client can.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import smtplib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any

import django.conf
import django.core.mail
import pytest

from tests.interop.peers import NODEMAILER, command, needs, run

__all__ = ["CLIENTS", "Client", "Mail", "Report"]

SUBJECT = "Grüße aus Köln, 你好"
BODY = "Guten Tag,\r\n.\r\n.ein Punkt am Anfang\r\n..zwei\r\nGruß: äöü 你好\r\n"
_HERE = Path(__file__).parent
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Mail:
    """One mail as an application means it."""

    sender: str = "app@example.test"
    recipients: tuple[str, ...] = ("first@example.test",)
    subject: str = SUBJECT
    body: str = BODY
    attachment: bytes = b""
    task_type: str = "mention"

    def message(self) -> EmailMessage:
        """Return it as Python's e-mail package composes it."""
        message = EmailMessage(SMTP.clone(utf8=not self.ascii))
        message["From"] = self.sender
        message["To"] = ", ".join(self.recipients)
        message["Subject"] = self.subject
        message["X-Task-Type"] = self.task_type
        message.set_content(self.body, cte="quoted-printable")
        if self.attachment:
            message.add_attachment(
                self.attachment, maintype="application", subtype="octet-stream", filename="report.bin"
            )
        return message

    @property
    def ascii(self) -> bool:
        """Whether the envelope needs no SMTPUTF8."""
        return all(address.isascii() for address in (self.sender, *self.recipients))


@dataclass(frozen=True)
class Report:
    """What a client told its application."""

    ok: bool
    """The client says that the mail is on its way."""
    text: str
    """What it says about it, replies included where it shows them."""
    refused: tuple[str, ...] = ()
    """The recipients that it reports as refused although the mail went to others."""


Send = Callable[[int, Sequence[Mail]], Awaitable[list[Report]]]


@dataclass(frozen=True)
class Client:
    """A client, and what it can."""

    name: str
    send: Send
    marks: tuple[pytest.MarkDecorator, ...] = ()
    partial: str = "reports"
    """A recipient refused, others accepted: `reports` the one and sends to the others; `ignores` it;
    `gives up` the whole mail."""
    keeps_connection: bool = False
    keeps_after_failure: bool = True
    smtputf8: bool = False

    @property
    def param(self) -> Any:
        """Return it as a parameter of a test."""
        return pytest.param(self, id=self.name, marks=self.marks)


# Python


async def _smtplib(port: int, mails: Sequence[Mail]) -> list[Report]:
    return await asyncio.to_thread(_smtplib_blocking, port, mails)


def _smtplib_blocking(port: int, mails: Sequence[Mail]) -> list[Report]:
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.test", timeout=_TIMEOUT_S) as server:
        return [_smtplib_send(server, mail) for mail in mails]


def _smtplib_send(server: smtplib.SMTP, mail: Mail) -> Report:
    try:
        refused = server.send_message(mail.message(), mail.sender, mail.recipients)
    except smtplib.SMTPRecipientsRefused as error:
        return Report(ok=False, text=_shown(error.recipients))
    except smtplib.SMTPResponseException as error:
        return Report(ok=False, text=f"{error.smtp_code} {error.smtp_error.decode()}")  # type: ignore[union-attr]
    except smtplib.SMTPNotSupportedError as error:
        return Report(ok=False, text=str(error))
    return Report(ok=True, text=_shown(refused), refused=tuple(refused))


def _shown(refused: dict[str, tuple[int, bytes]]) -> str:
    return "\n".join(f"{who}: {code} {text.decode()}" for who, (code, text) in refused.items())


async def _django(port: int, mails: Sequence[Mail]) -> list[Report]:
    return await asyncio.to_thread(_django_blocking, port, mails)


def _django_blocking(port: int, mails: Sequence[Mail]) -> list[Report]:
    if not django.conf.settings.configured:
        django.conf.settings.configure()
    connection = django.core.mail.get_connection(
        "django.core.mail.backends.smtp.EmailBackend", host="127.0.0.1", port=port, timeout=_TIMEOUT_S
    )
    with connection:
        return [_django_send(connection, mail) for mail in mails]


def _django_send(connection: Any, mail: Mail) -> Report:
    message = django.core.mail.EmailMessage(
        mail.subject,
        mail.body,
        mail.sender,
        list(mail.recipients),
        headers={"X-Task-Type": mail.task_type},
        connection=connection,
    )
    if mail.attachment:
        message.attach("report.bin", mail.attachment, "application/octet-stream")
    try:
        sent = message.send()
    except smtplib.SMTPRecipientsRefused as error:
        return Report(ok=False, text=_shown(error.recipients))
    except smtplib.SMTPResponseException as error:
        return Report(ok=False, text=f"{error.smtp_code} {error.smtp_error.decode()}")  # type: ignore[union-attr]
    return Report(ok=sent == 1, text=f"{sent} sent")


# JavaScript


async def _nodemailer(port: int, mails: Sequence[Mail]) -> list[Report]:
    return await _nodemailer_with(port, mails)


async def _nodemailer_pooled(port: int, mails: Sequence[Mail]) -> list[Report]:
    return await _nodemailer_with(port, mails, pool=True, maxConnections=1)


async def _nodemailer_with(port: int, mails: Sequence[Mail], **options: Any) -> list[Report]:
    task = {
        "options": {"host": "127.0.0.1", "port": port, "name": "client.test", "ignoreTLS": True, **options},
        "mails": [_for_nodemailer(mail) for mail in mails],
    }
    ended = await run(
        [command("node"), str(_HERE / "nodemailer_send.cjs")], json.dumps(task, ensure_ascii=False).encode()
    )
    assert ended.status == 0, ended.said
    return [
        Report(ok=each["ok"], text=each["text"], refused=tuple(each["refused"]) if each["ok"] else ())
        for each in json.loads(ended.out)
    ]


def _for_nodemailer(mail: Mail) -> dict[str, Any]:
    found: dict[str, Any] = {
        "from": mail.sender,
        "to": list(mail.recipients),
        "subject": mail.subject,
        "text": mail.body,
        "headers": {"X-Task-Type": mail.task_type},
    }
    if mail.attachment:
        content = base64.b64encode(mail.attachment).decode()
        found["attachments"] = [{"filename": "report.bin", "content": content, "encoding": "base64"}]
    return found


# Command lines


async def _swaks(port: int, mails: Sequence[Mail]) -> list[Report]:
    return [await _swaks_send(port, mail) for mail in mails]


async def _swaks_pipelining(port: int, mails: Sequence[Mail]) -> list[Report]:
    return [await _swaks_send(port, mail, "--pipeline") for mail in mails]


async def _swaks_send(port: int, mail: Mail, *options: str) -> Report:
    arguments = [command("swaks"), "--server", "127.0.0.1", "--port", str(port), "--helo", "client.test"]
    arguments += ["--from", mail.sender, "--to", ",".join(mail.recipients), "--timeout", f"{_TIMEOUT_S}s"]
    arguments += ["--header", f"Subject: {mail.subject}", "--header", f"X-Task-Type: {mail.task_type}"]
    arguments += ["--suppress-data", "--body", mail.body, *options]
    stdin = b""
    if mail.attachment:
        arguments += ["--attach-name", "report.bin", "--attach", "-"]
        stdin = mail.attachment
    ended = await run(arguments, stdin)
    refused = tuple(_swaks_refused(ended.said)) if ended.status == 0 else ()
    return Report(ok=ended.status == 0, text=f"exit status {ended.status}\n{ended.said}", refused=refused)


def _swaks_refused(said: str) -> list[str]:
    """Pair the RCPT lines with the replies of swaks' transcript, which come in the same order."""
    asked = [line.partition("<")[2].rstrip(">") for line in said.splitlines() if " -> RCPT TO:<" in line]
    lines = [line for line in said.splitlines() if line.startswith("<")]
    after_mail = next(index for index, line in enumerate(lines) if "2.1.0" in line) + 1
    answers = lines[after_mail : after_mail + len(asked)]
    return [who for who, answer in zip(asked, answers, strict=True) if answer.startswith("<**")]


async def _msmtp(port: int, mails: Sequence[Mail]) -> list[Report]:
    return [await _msmtp_send(port, mail) for mail in mails]


async def _msmtp_send(port: int, mail: Mail) -> Report:
    arguments = [command("msmtp"), "--host=127.0.0.1", f"--port={port}", "--domain=client.test"]
    arguments += [f"--from={mail.sender}", f"--timeout={_TIMEOUT_S}", "--", *mail.recipients]
    message = mail.message()
    # As an application hands a message to a sendmail command: the lines end as text files' do.
    ended = await run(arguments, message.as_bytes(policy=message.policy.clone(linesep="\n")))
    return Report(ok=ended.status == os.EX_OK, text=f"exit status {ended.status}\n{ended.said}")


_NODE = (
    *needs("node", "nodejs"),
    pytest.mark.skipif(not NODEMAILER.is_dir(), reason="nodemailer: npm install in tests/interop"),
)
_SWAKS = tuple(needs("swaks", "swaks"))

CLIENTS = (
    Client("smtplib", _smtplib, keeps_connection=True, smtputf8=True),
    # Django drops what smtplib says about single recipients.
    Client("django", _django, partial="ignores", keeps_connection=True),
    Client("nodemailer", _nodemailer, _NODE, smtputf8=True),
    Client(
        "nodemailer-pool",
        _nodemailer_pooled,
        _NODE,
        keeps_connection=True,
        keeps_after_failure=False,
        smtputf8=True,
    ),
    Client("swaks", _swaks, _SWAKS),
    Client("swaks-pipeline", _swaks_pipelining, _SWAKS),
    Client("msmtp", _msmtp, tuple(needs("msmtp", "msmtp")), partial="gives up"),
)
