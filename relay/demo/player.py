"""Applications that send: over SMTP, each message on a connection of its own, as most of them do."""

from __future__ import annotations

import asyncio
import smtplib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import make_msgid
from typing import Final

from relay.demo.hour import BREAKS, MINUTES, Mail

__all__ = ["Player", "send"]

APPLICATIONS: Final = 8
"""Clients that send at the same time."""
RETRY_MINUTES: Final = 4
"""After how long an application tries again what was deferred."""
ATTEMPTS: Final = 3


@dataclass
class Player:
    """Applications that send `mails`, an hour of them, within so many seconds, and say how it goes."""

    seconds: float
    mails: list[Mail]
    tell: Callable[[str], None]
    heard: Counter[str] = field(default_factory=Counter)
    """How many attempts ended with which class of reply: `2`, `4`, `5`."""
    begun: float | None = None
    host: str = ""
    port: int = 0

    def minute(self) -> float:
        """Return where in the hour we are."""
        if self.begun is None:
            return 0.0
        return (asyncio.get_running_loop().time() - self.begun) / self.seconds * MINUTES

    async def play(self, host: str, port: int) -> None:
        """Send everything to the relay there, each message at its time."""
        self.host, self.port = host, port
        self.begun = asyncio.get_running_loop().time()
        self.tell(f"An hour of mail, {len(self.mails)} messages, within {self.seconds:.0f} seconds:")
        hands = asyncio.Semaphore(APPLICATIONS)
        told = 0
        async with asyncio.TaskGroup() as group:
            for mail in self.mails:
                await self._until(mail.minute)
                if int(mail.minute) // 10 > told:
                    told = int(mail.minute) // 10
                    self.tell(f"  minute {told * 10}  {self.summary()}")
                await hands.acquire()
                group.create_task(self._send(mail, hands))
        self.tell(f"  minute {MINUTES}  {self.summary()}")

    async def _until(self, minute: float) -> None:
        await asyncio.sleep(max(0.0, (minute - self.minute()) / MINUTES * self.seconds))

    async def _send(self, mail: Mail, hands: asyncio.Semaphore) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            if attempt > 1:
                await self._until(mail.minute + (attempt - 1) * RETRY_MINUTES)
                await hands.acquire()
            try:
                heard = await asyncio.to_thread(send, self.host, self.port, mail)
            finally:
                hands.release()
            self.heard[heard] += 1
            if heard != "4" or BREAKS in mail.recipients:
                return

    def summary(self) -> str:
        """Say what the applications have heard so far."""
        heard = self.heard
        return f"{heard['2']} accepted, {heard['5']} refused for good, {heard['4']} told to come again"


def send(host: str, port: int, mail: Mail) -> str:
    """Send one message as an application does; return the class of what it heard."""
    message = EmailMessage()
    message["From"], message["To"] = mail.sender, ", ".join(mail.recipients)
    message["Subject"], message["Message-ID"] = mail.subject, make_msgid(domain="acorn.example")
    if mail.task_type is not None:
        message["X-Task-Type"] = mail.task_type
    message.set_content("\n".join("acorn " * 10 for _ in range(mail.words // 10 + 1)))
    # A machine that has one address on loopback alone sends from that.
    source = (mail.source, 0) if sys.platform == "linux" and host.startswith("127.") else None
    try:
        with smtplib.SMTP(host, port, timeout=30, source_address=source) as smtp:
            smtp.send_message(message)
    except smtplib.SMTPRecipientsRefused as error:
        return str(min(code for code, _ in error.recipients.values()))[:1]
    except smtplib.SMTPResponseException as error:
        return str(error.smtp_code)[:1]
    except (smtplib.SMTPException, OSError):
        return "4"
    return "2"
