"""Messages sent one after the other, and the codes that a client hears to each of its commands."""

from __future__ import annotations

from tests.support.client import Client

__all__ = ["OTHER", "send", "send_on"]

OTHER = b"From: a@example.com\r\n\r\ntext\r\n"
"""A message that says nothing of its task type."""


async def send(port: int, sender: str, recipients: list[str], content: bytes = OTHER) -> list[int]:
    """Send one message in a session of its own; return the codes up to the first command that ends it."""
    async with Client(port) as client:
        await client.greeting()
        await client.ehlo()
        return await send_on(client, sender, recipients, content)


async def send_on(client: Client, sender: str, recipients: list[str], content: bytes = OTHER) -> list[int]:
    """Send one message in a session that has begun."""
    codes = [(await client.command(f"MAIL FROM:<{sender}>")).code]
    if codes == [250]:
        codes += [(await client.command(f"RCPT TO:<{recipient}>")).code for recipient in recipients]
        codes.append((await client.command("DATA")).code)
        if codes[-1] == 354:
            await client.send(content + b".\r\n")
            codes.append((await client.reply()).code)
        else:
            await client.command("RSET", 250)
    return codes
