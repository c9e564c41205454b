"""What people ask the records for, as they write it: on the command line, in an address, in a form.

Rules. One meaning everywhere: a time is a time ago (`90m`, `7d`), `today`, `yesterday`, or ISO 8601, in the
zone that is asked for unless it has its own. Text is looked for as the store writes it, octets that are no
UTF-8 escaped. No I/O but the machine's zones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from relay.envelope import text
from relay.settings.units import parse_duration

if TYPE_CHECKING:
    from relay.records.sends import SendFilter

__all__ = ["MAX_VALUE", "AskedError", "filter_of", "moment", "zone_of"]

MAX_VALUE: Final = 1000
"""Characters of a value that is looked for."""
WHEN: Final = "a time ago such as 90m, 2h or 7d, or a date or time such as 2026-11-23T07:46"
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_SPACE_FOR_PLUS = re.compile(r" (?=[0-9]{2}:?[0-9]{2}\Z)")


class AskedError(ValueError):
    """A value has no meaning: `field` names it, `takes` says what would have one."""

    def __init__(self, field: str, takes: str) -> None:
        super().__init__(f"{field} takes {takes}")
        self.field = field
        self.takes = takes


def zone_of(name: str | None) -> tzinfo | None:
    """Return the zone of this name (`Europe/Berlin`, `UTC`), None for none: the machine's own."""
    if name is None:
        return None
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):  # no name at all, a directory of zones, no such zone
        raise AskedError("tz", "the name of a time zone such as Europe/Berlin, or UTC") from None


def moment(value: str, now: datetime, zone: tzinfo | None = None) -> datetime:
    """Return the time that `value` means, aware, UTC; without an offset of its own in `zone`.

    A time beyond what a date can be is the first or the last there is. Raises ValueError for anything else.
    """
    value = value.strip()
    days = {"today": 0, "yesterday": 1}.get(value)
    if days is not None:
        day = now.astimezone(zone).date() - timedelta(days=days)
        return _aware(datetime.combine(day, datetime.min.time()), zone)
    if re.fullmatch(r"[0-9].*[a-z]", value):
        try:
            return now - timedelta(seconds=parse_duration(value))
        except OverflowError:
            return _FIRST
    return _aware(datetime.fromisoformat(_SPACE_FOR_PLUS.sub("+", value) if "T" in value else value), zone)


def _aware(found: datetime, zone: tzinfo | None) -> datetime:
    if found.tzinfo is None and zone is not None:
        found = found.replace(tzinfo=zone)
    try:
        return found.astimezone(UTC)
    except (OverflowError, ValueError):
        return _FIRST if found.year <= 1 else _LAST


def filter_of(
    given: Mapping[str, str | None],
    now: datetime,
    zone: tzinfo | None = None,
    aliases: Callable[[str], tuple[str, ...]] | None = None,
) -> SendFilter:
    """Return the filter that the values of these fields make; raises AskedError.

    Fields: sender, recipient, type, client, upstream, message_id, task_id, since, until; None or missing:
    not asked for. `aliases` gives the other spellings under which a recipient may be kept.
    """
    from relay.records.sends import SendFilter

    texts: dict[str, Any] = {
        name: _text(field, given.get(field))
        for field, name in (
            ("sender", "sender"),
            ("recipient", "recipient"),
            ("type", "task_type"),
            ("client", "client"),
            ("upstream", "upstream"),
            ("message_id", "message_id"),
        )
    }
    for name in ("sender", "recipient"):
        if (found := texts[name]) is not None and found.startswith("<") and found.endswith(">"):
            texts[name] = found[1:-1]
    if texts["recipient"] is not None and aliases is not None:
        texts["aliases"] = aliases(texts["recipient"])
    return SendFilter(
        **texts,
        task_id=_identity(given.get("task_id")),
        since=_when("since", given.get("since"), now, zone),
        until=_when("until", given.get("until"), now, zone),
    )


def _text(field: str, value: str | None) -> str | None:
    if value is None:
        return None
    if len(value) > MAX_VALUE:
        raise AskedError(field, f"{MAX_VALUE} characters at most")
    try:
        return text(value.strip().encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise AskedError(field, "text") from None


def _when(field: str, value: str | None, now: datetime, zone: tzinfo | None) -> datetime | None:
    if value is None:
        return None
    try:
        return moment(value, now, zone)
    except ValueError:
        raise AskedError(field, WHEN) from None


def _identity(value: str | None) -> UUID | None:
    if value is None:
        return None
    try:
        return UUID(value.strip())
    except ValueError:
        raise AskedError("task_id", "a UUID such as 019b1c7e-5a2f-7c31-9d0e-3f5b8a6c2d14") from None
