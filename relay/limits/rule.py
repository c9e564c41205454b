"""What one limit counts: pure functions of values, the same for a message under way and for a row.

Rules: addresses, clients and task types match without regard to the case of ASCII letters, as in the store's
indexes (`lower()` of SQLite knows no other); a domain is what the record has for it. A pattern is plain text
in which `*` stands for anything and `?` for one character.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple
from uuid import UUID

from relay.envelope import domain_of

__all__ = [
    "Action",
    "Aliases",
    "Event",
    "Message",
    "OnError",
    "Patterns",
    "Rule",
    "Scope",
    "Unit",
    "fold",
    "in_words",
]

Scope = Literal["sender", "recipient", "client", "sender_domain", "recipient_domain", "all"]
Unit = Literal["messages", "recipients", "octets"]
Action = Literal["defer", "reject", "observe"]
OnError = Literal["allow", "defer"]
Aliases = Callable[[str], tuple[str, ...]]
"""What gives the names, beside its own, under which an address may be recorded."""

_FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def fold(text: str) -> str:
    """Return text with its ASCII letters in lower case."""
    return text.lower() if text.isascii() else text.translate(_FOLD)


class Patterns:
    """Patterns of which one must fit."""

    __slots__ = ("_expression", "texts")

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple("" if text == "<>" else fold(text) for text in texts)
        """As they are compared: folded, the null reverse-path empty."""
        self._expression = re.compile("|".join(map(_expression, self.texts)), re.DOTALL)

    def fit(self, text: str) -> bool:
        """Whether one of them fits."""
        return self._expression.fullmatch(fold(text)) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and other.texts == self.texts

    def __hash__(self) -> int:
        return hash(self.texts)


def _expression(text: str) -> str:
    # Atomic groups: each literal is taken at its first place, so that no address makes the match slow.
    first, *middle = (_literal(part) for part in text.split("*"))
    if not middle:
        return first
    last = middle.pop()
    return f"{first}{''.join(f'(?>.*?{part})' for part in middle)}.*{last}"


def _literal(part: str) -> str:
    return "".join("." if character == "?" else re.escape(character) for character in part)


class Event(NamedTuple):
    """Something that was sent: when (Unix time), how much, and its task id unless it is several."""

    at: float
    amount: int
    task_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """What a limit looks at, of a message under way or of a row. Text as it is recorded."""

    sender: str
    client: str
    task_type: str | None = None
    """None: not known yet."""
    recipients: Sequence[str] = ()
    size: int = 0
    """Octets."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit: at most `maximum` of `unit` within `window` seconds, for each key of `scope`."""

    name: str
    scope: Scope
    unit: Unit
    maximum: int
    window: float
    action: Action = "defer"
    on_error: OnError = "allow"
    task_type: Patterns | None = None
    sender: Patterns | None = None
    recipient_domain: Patterns | None = None
    not_task_type: Patterns | None = None
    not_sender: Patterns | None = None
    not_client: Patterns | None = None
    not_recipient: Patterns | None = None
    needs_header: bool = field(init=False)
    """Whether it takes the header section to know if a message counts."""
    by_recipient: bool = field(init=False)
    """Whether it takes the recipients to know what a message counts for."""

    of_address: bool = field(init=False)
    """Whether each address has a count of its own."""

    _hash: int = field(init=False, compare=False, repr=False)

    def __hash__(self) -> int:
        """Return what was found once: a message looks its counts up by this, and 14 fields take a while."""
        return self._hash

    def __post_init__(self) -> None:
        """Say what it takes to decide."""
        compared = (getattr(self, each.name) for each in fields(self) if each.init)
        object.__setattr__(self, "_hash", hash(tuple(compared)))
        of_recipients = self.scope in ("recipient", "recipient_domain")
        filtered = self.recipient_domain is not None or self.not_recipient is not None
        object.__setattr__(self, "needs_header", self.task_type is not None or self.not_task_type is not None)
        object.__setattr__(self, "by_recipient", of_recipients or filtered)
        object.__setattr__(self, "of_address", self.scope in ("sender", "recipient"))

    def counts_like(self, other: Rule) -> bool:
        """Whether another limit, whatever its maximum, counts the same."""
        return self == replace(
            other, name=self.name, maximum=self.maximum, action=self.action, on_error=self.on_error
        )

    def __str__(self) -> str:
        """What it lets pass, as in "100 messages in 1d"."""
        return f"{self.maximum} {self.unit} in {in_words(self.window)}"

    def concerns(self, message: Message) -> bool:
        """Whether a message counts, as far as is known without its recipients."""
        if self.sender is not None and not self.sender.fit(message.sender):
            return False
        if self.not_sender is not None and self.not_sender.fit(message.sender):
            return False
        if self.not_client is not None and self.not_client.fit(message.client):
            return False
        task_type = message.task_type
        if task_type is None:
            return True
        if self.task_type is not None and not self.task_type.fit(task_type):
            return False
        return self.not_task_type is None or not self.not_task_type.fit(task_type)

    def counted(self, recipient: str) -> bool:
        """Whether a recipient counts."""
        if self.not_recipient is not None and self.not_recipient.fit(recipient):
            return False
        return self.recipient_domain is None or self.recipient_domain.fit(domain_of(recipient))

    def key_of(self, message: Message) -> str:
        """Return what has the count, where that is one for the whole message."""
        match self.scope:
            case "sender":
                return fold(message.sender)
            case "sender_domain":
                return domain_of(message.sender)
            case "client":
                return message.client
            case _:
                return ""

    def key_of_recipient(self, message: Message, recipient: str) -> str:
        """Return what has the count for one recipient."""
        if self.scope == "recipient":
            return fold(recipient)
        return domain_of(recipient) if self.scope == "recipient_domain" else self.key_of(message)

    def demand(self, message: Message) -> dict[str, int]:
        """Return what the whole message counts for, by key. The truth: everything else is an early look."""
        if not self.concerns(message):
            return {}
        if not self.by_recipient and self.unit != "recipients":
            return {self.key_of(message): 1 if self.unit == "messages" else message.size}
        demand: dict[str, int] = {}
        for recipient in message.recipients:
            if self.counted(recipient):
                key = self.key_of_recipient(message, recipient)
                if self.unit == "recipients":
                    demand[key] = demand.get(key, 0) + 1
                else:
                    demand[key] = 1 if self.unit == "messages" else message.size
        return demand


def in_words(seconds: float) -> str:
    """Return a time, rounded up: to seconds, above an hour to minutes."""
    whole = math.ceil(seconds)
    if whole > 3600:
        whole = -(-whole // 60) * 60
    parts = []
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        if whole >= length:
            parts.append(f"{whole // length}{unit}")
            whole %= length
    return "".join(parts) or "1s"
