"""What stands now, in words and figures for the page. Pure functions of what `Overview` tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from relay.settings.units import format_duration
from relay.web.shown import number, octets, seconds

__all__ = ["LimitRow", "Standing", "Tile", "UpstreamRow", "limit_row", "standing"]

_FAILED: Final = ("rejected", "deferred", "unavailable", "in_doubt")
_MANY_FAILED, _TOO_MANY_FAILED = 0.02, 0.10
_LATE_S: Final = 3 * 3600
"""How long an expired row may be there before the page says so; the alert's threshold."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure: its name, itself, its unit, what more there is to say; `tone`: good, warn, bad or none."""

    label: str
    figure: str
    unit: str
    more: str
    tone: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True)
class UpstreamRow:
    """One upstream: how it is, its messages since the start, its time of late, its connections."""

    name: str
    state: str
    tone: str
    accepted: int
    failed: int
    half: float | None
    most: float | None
    busy: int
    idle: int


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One sender, recipient or what else a limit counts, near the limit or over it."""

    key: str
    used: str
    part: float
    """Of the maximum: 1 and more is over it."""
    tone: str
    state: str


@dataclass(frozen=True, slots=True)
class LimitRow:
    """One rate limit, and who is near it."""

    name: str
    rule: str
    keys: Sequence[KeyRow]


@dataclass(frozen=True, slots=True)
class Standing:
    """All of it, with the state in a few words, and lines that say why."""

    headline: str
    tone: str
    lines: Sequence[str]
    tiles: Sequence[Tile]
    upstreams: Sequence[UpstreamRow]


def standing(status: Mapping[str, Any], in_doubt: int | None, now: datetime) -> Standing:
    """Return what `status` (of `Overview.now`) says; `in_doubt` is None where the records cannot be read."""
    states = dict(_states(status["notes"]))
    upstreams = [_upstream(each, states) for each in status["upstreams"]]
    lines = [note for note in status["notes"] if not note.startswith("upstream ")]
    down = [each.name for each in upstreams if each.tone == "bad"]
    if not status["ready"]:
        headline, tone = "Not ready", "bad"
    elif down or lines:
        headline, tone = "Working, with trouble", "warn"
        lines += [f"upstream {name} is down" for name in down]
    else:
        headline, tone = "All is well", "good"
    tiles = [
        _rate(status),
        _hour(status),
        Tile("Clients", number(status["sessions"]), "", "connected now"),
        _doubt(in_doubt),
        _waiting(status["records"]),
        _expiry(status["expiry"], now),
    ]
    return Standing(headline, tone, lines, tiles, upstreams)


def limit_row(limit: Mapping[str, Any]) -> LimitRow:
    """Return a limit as it stands now, as the API tells it."""
    write = octets if limit["unit"] == "octets" else number
    unit = "" if limit["unit"] == "octets" else f" {limit['unit']}"
    each = "in all" if limit["scope"] == "all" else f"for each {limit['scope'].replace('_', ' ')}"
    rule = (
        f"{write(limit['maximum'])}{unit} in {format_duration(limit['window_s'])} {each}, {limit['action']}"
    )
    keys = [_key_row(key, limit, write(key["used"])) for key in limit["keys"]]
    return LimitRow(limit["name"], rule, keys)


def _key_row(key: Mapping[str, Any], limit: Mapping[str, Any], used: str) -> KeyRow:
    room_in, over = key["room_in_s"], key["state"] == "over"
    wait = "" if room_in is None else f", room in {seconds(room_in)}"
    name = "all together" if limit["scope"] == "all" else key["key"] or "<>"
    part = key["used"] / limit["maximum"] if limit["maximum"] else 1.0
    return KeyRow(name, used, part, "bad" if over else "warn", f"over{wait}" if over else "near")


def _states(notes: Sequence[str]) -> list[tuple[str, str]]:
    """Return upstreams and how they are, out of the lines of /readyz."""
    return [
        (name, state)
        for note in notes
        if note.startswith("upstream ")
        for name, _, state in [note.removeprefix("upstream ").partition(": ")]
    ]


def _upstream(upstream: Mapping[str, Any], states: Mapping[str, str]) -> UpstreamRow:
    state = states.get(upstream["name"], "not in use any more")
    tone = "good" if state == "up" else "bad" if state.startswith("down") else ""
    outcomes, latency, connections = upstream["outcomes"], upstream["latency"], upstream["connections"]
    return UpstreamRow(
        upstream["name"],
        state,
        tone,
        outcomes["accepted"],
        sum(outcomes[name] for name in _FAILED),
        latency["p50_s"],
        latency["p95_s"],
        connections["active"] + connections["connecting"],
        connections["idle"],
    )


def _rate(status: Mapping[str, Any]) -> Tile:
    rate = status["rate_per_s"]
    if rate >= 1:
        return Tile(
            "Rate", f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}", "messages/s", "over the last minute"
        )
    return Tile("Rate", f"{rate * 60:.0f}", "messages/min", "over the last minute")


def _hour(status: Mapping[str, Any]) -> Tile:
    accepted = sum(minute["accepted"] for minute in status["last_hour"])
    failed = {name: sum(minute[name] for minute in status["last_hour"]) for name in _FAILED}
    told = [f"{number(count)} {name.replace('_', ' ')}" for name, count in failed.items() if count]
    share = sum(failed.values()) / max(1, accepted + sum(failed.values()))
    tone = "bad" if share > _TOO_MANY_FAILED else "warn" if share > _MANY_FAILED else "good"
    return Tile("Last hour", number(accepted), "accepted", ", ".join(told) or "none failed", tone)


def _doubt(count: int | None) -> Tile:
    if count is None:
        return Tile("In doubt", "-", "", "the records cannot be read", "warn")
    if not count:
        return Tile("In doubt", "0", "", "every message got its answer", "good")
    return Tile("In doubt", number(count), "", "may have been sent: see them", "warn", "/in-doubt")


def _waiting(records: Mapping[str, Any]) -> Tile:
    if records["spooled"]:
        return Tile("Spool", number(records["spooled"]), "rows", "wait for the store", "warn")
    if records["errors"]:
        return Tile(
            "Spool", "0", "rows", f"{number(records['errors'])} errors since the start: see the log", "bad"
        )
    return Tile("Spool", "0", "rows", "the store takes all", "good")


def _expiry(expiry: Mapping[str, Any], now: datetime) -> Tile:
    lag = expiry["lag_s"]
    if expiry["last_run_at"] is None:
        return Tile("Expiry", "-", "", "has not run yet")
    ago = max(0.0, (now - datetime.fromisoformat(expiry["last_run_at"])).total_seconds())
    figure, _, unit = seconds(ago if ago >= 1 else 0).partition(" ")
    more = f"overdue for {seconds(lag)}" if lag > _LATE_S else f"{number(expiry['rows'])} rows deleted so far"
    return Tile(
        "Expiry",
        "now" if ago < 1 else figure,
        "" if ago < 1 else f"{unit} ago",
        more,
        "warn" if lag > _LATE_S else "good",
    )
