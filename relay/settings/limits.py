"""The keys of `[[limits]]`, rate limits counted from the records. No I/O.

Rules: a limit that could never count anything is refused, with what to write instead; so is one that would
have to count rows which retention has deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from relay.settings.kinds import Count, Duration, Size
from relay.settings.section import Section
from relay.settings.units import format_duration

__all__ = [
    "SHORTEST_S",
    "ExceptionSettings",
    "LimitSettings",
    "fits_no_pseudonym",
    "kept_too_short",
    "named_twice",
]

SHORTEST_S, LONGEST_S = 60.0, 90 * 86_400.0


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


_PATTERN = {"type": "string", "maxLength": 320}
Texts = Annotated[
    tuple[Annotated[str, Field(max_length=320)], ...],
    BeforeValidator(_several),
    WithJsonSchema({"anyOf": [_PATTERN, {"type": "array", "items": _PATTERN}]}),
]
"""One pattern or several: `*` stands for anything, `?` for one character, case does not matter."""


def _texts(value: Sequence[str] | None) -> None:
    if value is None:
        return
    if not value:
        raise ValueError("is empty: nothing would fit (leave the key out for all)")
    for text in value:
        if not text or not text.isprintable() or text != text.strip():
            raise ValueError("holds a pattern that is empty, not printable or has space at its ends")


def _addresses(value: Sequence[str] | None) -> None:
    for text in value or ():
        if "@" not in text and "*" not in text and text not in ("<>", "postmaster"):
            raise ValueError(f'"{text}" is no address: write "*@{text}" for all of a domain')


class ExceptionSettings(Section):
    """What a limit neither holds nor counts. Each key is a pattern or a list; one that fits is enough."""

    sender: Texts | None = None
    """Reverse-paths; the null reverse-path is written <>."""
    recipient: Texts | None = None
    """Recipients; a message to others as well counts for those."""
    client: Texts | None = None
    """Users, and addresses that clients connect from."""
    task_type: Texts | None = None
    """Task types; they are known once the header has been seen."""

    @field_validator("sender", "recipient", "client", "task_type")
    @classmethod
    def _patterns(cls, value: Texts | None) -> Texts | None:
        _texts(value)
        return value

    @field_validator("sender", "recipient")
    @classmethod
    def _paths(cls, value: Texts | None) -> Texts | None:
        _addresses(value)
        return value

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return any(value is not None for _, value in self)


class LimitSettings(Section):
    """A rate limit: what is counted, how much of it may be in a window that slides, and what happens then."""

    scope: Literal["sender", "recipient", "client", "sender_domain", "recipient_domain", "all"]
    """What has a count of its own: each sender, each recipient, ... all: one count for everything."""
    task_type: Texts | None = None
    """Only messages of these task types count. A pattern or a list; decided once the header is seen."""
    sender: Texts | None = None
    """Only these reverse-paths count, a pattern or a list; the null reverse-path is written <>."""
    recipient_domain: Texts | None = None
    """Only recipients in these domains count, a pattern or a list."""
    max: Count | None = None
    """Messages in the window, at most. One of max, max_recipients and max_bytes must be given."""
    max_recipients: Count | None = None
    """Recipients in the window, at most."""
    max_bytes: Size | None = None
    """Octets of messages in the window, at most."""
    per: Duration
    """The window, from 1m to 90d; it ends now. No longer than the rows that it counts are kept."""
    action: Literal["defer", "reject", "observe"] = "defer"
    """defer: 451, and when it will pass. reject: 550. observe: it passes, is counted and logged."""
    on_error: Literal["allow", "defer"] = "allow"
    """While the store cannot be asked: the limit goes by what the relay knows itself, or says 451."""
    exceptions: ExceptionSettings | None = None
    """What is neither held nor counted."""
    name: str = ""
    """Its name in replies, metrics and log. Default: made from scope and window, such as sender-1d."""

    @field_validator("task_type", "sender", "recipient_domain")
    @classmethod
    def _patterns(cls, value: Texts | None) -> Texts | None:
        _texts(value)
        return value

    @field_validator("sender")
    @classmethod
    def _paths(cls, value: Texts | None) -> Texts | None:
        _addresses(value)
        return value

    @field_validator("recipient_domain")
    @classmethod
    def _domains(cls, value: Texts | None) -> Texts | None:
        for text in value or ():
            if "@" in text or text == "<>":
                raise ValueError(f'"{text}" is no domain: write what stands behind the @')
        return value

    @field_validator("max_bytes")
    @classmethod
    def _one_maximum(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0:
            raise ValueError("must be at least one octet")
        if not {"max", "max_recipients"} <= info.data.keys():
            return value
        given = [key for key in ("max", "max_recipients") if info.data[key] is not None]
        if value is not None:
            given.append("max_bytes")
        if not given:
            raise ValueError("missing: one of max, max_recipients and max_bytes must say how much may pass")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given together: make it several limits")
        return value

    @field_validator("per")
    @classmethod
    def _window(cls, value: float) -> float:
        if not SHORTEST_S <= value <= LONGEST_S:
            raise ValueError(f"{format_duration(value)} is no window: from 1m to 90d")
        return value

    @field_validator("exceptions")
    @classmethod
    def _something(cls, value: ExceptionSettings | None) -> ExceptionSettings | None:
        if value is not None and not value.given:
            raise ValueError("is empty: leave it out, or name what is excepted")
        return value

    @field_validator("name")
    @classmethod
    def _named(cls, value: str, info: ValidationInfo) -> str:
        if not value:
            scope, per = info.data.get("scope"), info.data.get("per")
            return f"{scope}-{format_duration(per)}" if scope and per else ""
        if not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", value):
            raise ValueError("must be 1 to 64 letters, digits, dots, hyphens, underscores or colons")
        return value


def named_twice(limits: Iterable[LimitSettings]) -> list[str]:
    """Say which names are not those of one limit."""
    names = [limit.name for limit in limits]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    return [f'two limits are named "{name}": give one another name' for name in twice]


def fits_no_pseudonym(limits: Iterable[LimitSettings]) -> list[str]:
    """Say which patterns ask for a part of a local part, where recipients are counted by pseudonyms.

    Whole addresses are looked for under their pseudonyms, and domains stay.
    """
    reasons = []
    for index, limit in enumerate(limits):
        for text in (limit.exceptions.recipient if limit.exceptions else None) or ():
            local = text.rpartition("@")[0] if "@" in text else text.partition("*")[0]
            whole = "*" not in text and "?" not in text
            if not whole and local.strip("*?") and not local.startswith("hmac-"):
                reasons.append(
                    f'limits.{index}.exceptions.recipient: "{text}" fits no recipient under '
                    'records.recipients = "hashed": name whole addresses or a domain ("*@example.com")'
                )
    return reasons


def kept_too_short(
    limits: Sequence[LimitSettings], default: float | None, by_type: dict[str, float | None]
) -> list[str]:
    """Say which limits would have to count rows that are deleted before they leave the window."""
    reasons = []
    for limit in limits:
        for key, lifetime in _lifetimes(limit, default, by_type):
            if lifetime is not None and lifetime < limit.per:
                reasons.append(
                    f"{limit.name} counts what was sent within {format_duration(limit.per)}, and {key} keeps "
                    f"it for {format_duration(lifetime)}: make per shorter or {key} longer"
                )
    return reasons


def _lifetimes(
    limit: LimitSettings, default: float | None, by_type: dict[str, float | None]
) -> Iterable[tuple[str, float | None]]:
    """How long the rows live that a limit counts, with the key that says so."""
    wanted = limit.task_type
    plain = wanted is not None and not any("*" in text or "?" in text for text in wanted)
    if wanted is None or not plain or any(text not in by_type for text in wanted):
        yield "retention.default", default
    folded = {text.lower() for text in wanted or ()}
    for task_type, lifetime in by_type.items():
        if not plain or task_type.lower() in folded:
            yield f"retention.by_type.{task_type}", lifetime
