"""What a client sent and what it was told, laid side by side, by nobody who knows how the relay works.

Rules: a pure function of the octets that went each way. The n-th reply answers the n-th command, strictly
(RFC 5321 4.1.1); a command is a line that CRLF ends; behind a 354 stands content to the first CRLF.CRLF,
which the next reply answers. One reply may come for no command: the last, with which the relay closes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .receivers import strict

__all__ = ["Account", "Sent", "account", "split_replies"]

_REPLY = re.compile(rb"(?:([2-5]\d\d)-[\t\x20-\x7e]*\r\n(?=\1))*[2-5]\d\d [\t\x20-\x7e]*\r\n")
CLOSING = b"closing"
"""Stands in every reply with which the relay ends a session by itself."""


@dataclass
class Sent:
    """One message as the client sent it: `mail` and `rcpts` are arguments, those that got a 2yz."""

    mail: bytes
    rcpts: list[bytes] = field(default_factory=list)
    content: bytes = b""
    verdict: bytes = b""
    """The whole reply to its end of data."""


@dataclass
class Account:
    """A session: the greeting, then each reply with what it answers."""

    greeting: bytes = b""
    answered: list[tuple[bytes, bytes]] = field(default_factory=list)
    """(verb, reply); the verb is b"" for content, and for a last word that answers nothing."""
    messages: list[Sent] = field(default_factory=list)
    """What was sent to an end of data, whatever the verdict."""


def split_replies(octets: bytes) -> list[bytes]:
    """Cut what the relay has said into replies; ValueError where it is not well formed."""
    replies = []
    at = 0
    while at < len(octets):
        match = _REPLY.match(octets, at)
        if match is None:
            raise ValueError(f"not a reply: {octets[at : at + 200]!r}")
        replies.append(match[0])
        at = match.end()
    return replies


def account(sent: bytes, said: bytes) -> Account:
    """Lay both sides of a session side by side; ValueError where there are more replies than commands."""
    replies = split_replies(said)
    if not replies:
        return Account()
    result = Account(greeting=replies[0])
    at = 0
    message: Sent | None = None
    in_content = False
    for number, reply in enumerate(replies[1:], 2):
        is_last = number == len(replies)
        if in_content:
            end = strict(sent[at:])
            in_content = False
            if end is not None and message is not None:
                message.content, message.verdict = sent[at : at + end - 3], reply
                at += end
                result.messages.append(message)
                message = None
                result.answered.append((b"", reply))
                continue
        else:
            end = sent.find(b"\r\n", at)
            if end >= 0:
                verb, _, argument = sent[at:end].partition(b" ")
                verb = verb.upper()
                at = end + 2
                in_content = reply.startswith(b"354")
                message = _followed(message, verb, argument, reply)
                result.answered.append((verb, reply))
                if CLOSING in reply and not is_last:
                    raise ValueError(f"more was said after {reply!r}")
                continue
        if not is_last or CLOSING not in reply:
            raise ValueError(f"a reply to nothing: {reply!r}")
        result.answered.append((b"", reply))
    return result


def _followed(message: Sent | None, verb: bytes, argument: bytes, reply: bytes) -> Sent | None:
    """Return the transaction that is open after a command and its reply."""
    if not reply.startswith(b"2"):
        return message
    if verb == b"MAIL":
        return Sent(argument)
    if verb == b"RCPT" and message is not None:
        message.rcpts.append(argument)
    elif verb in (b"RSET", b"EHLO", b"HELO", b"QUIT"):
        return None
    return message
