"""What stands now, in words."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from relay.outcome import Outcome
from relay.web.standing import Tile, limit_row, standing

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def outcomes(**counts: int) -> dict[str, int]:
    return {**dict.fromkeys((outcome.value for outcome in Outcome), 0), **counts}


def status(**over: Any) -> dict[str, Any]:
    return {
        "ready": True,
        "notes": ["upstream primary: up"],
        "sessions": 3,
        "rate_per_s": 0.5,
        "last_hour": [outcomes(accepted=100)],
        "upstreams": [
            {
                "name": "primary",
                "connections": {"idle": 2, "active": 1, "connecting": 1},
                "outcomes": outcomes(accepted=90, rejected=3, in_doubt=1, refused=7),
                "latency": {"p50_s": 0.01, "p95_s": 0.2},
            }
        ],
        "records": {"pending": 0, "spooled": 0, "errors": 0},
        "expiry": {"lag_s": 0.0, "last_run_at": "2026-11-23T11:55:00Z", "rows": 5},
        **over,
    }


def tile(label: str, in_doubt: int | None = 0, **over: Any) -> Tile:
    (found,) = [each for each in standing(status(**over), in_doubt, NOW).tiles if each.label == label]
    return found


def test_all_is_well() -> None:
    found = standing(status(), 0, NOW)
    assert (found.headline, found.tone, list(found.lines)) == ("All is well", "good", [])
    assert {each.tone for each in found.tiles} <= {"good", ""}
    (upstream,) = found.upstreams
    assert (upstream.state, upstream.tone, upstream.accepted, upstream.failed) == ("up", "good", 90, 4)
    assert (upstream.busy, upstream.idle) == (2, 2)


@pytest.mark.parametrize(
    ("over", "headline", "tone", "line"),
    [
        (
            {"notes": ["upstream primary: down: refused"]},
            "Working, with trouble",
            "warn",
            "upstream primary is down",
        ),
        (
            {"notes": ["rows go to the spool: locked", "upstream primary: up"]},
            "Working, with trouble",
            "warn",
            "rows go to the spool: locked",
        ),
        ({"ready": False, "notes": ["draining"]}, "Not ready", "bad", "draining"),
    ],
)
def test_trouble_is_told_with_its_reason(over: dict[str, Any], headline: str, tone: str, line: str) -> None:
    found = standing(status(**over), 0, NOW)
    assert (found.headline, found.tone, list(found.lines)) == (headline, tone, [line])


@pytest.mark.parametrize(
    ("state", "tone"), [("drained", ""), ("draining, 2 transactions", ""), ("down: x", "bad")]
)
def test_an_upstream_is_shown_as_it_is(state: str, tone: str) -> None:
    (upstream,) = standing(status(notes=[f"upstream primary: {state}"]), 0, NOW).upstreams
    assert (upstream.state, upstream.tone) == (state, tone)


@pytest.mark.parametrize(
    ("rate", "figure", "unit"),
    [
        (0.0, "0", "messages/min"),
        (0.5, "30", "messages/min"),
        (12.34, "12.3", "messages/s"),
        (1234.5, "1,234", "messages/s"),
    ],
)
def test_the_rate_is_in_the_unit_that_fits(rate: float, figure: str, unit: str) -> None:
    found = tile("Rate", rate_per_s=rate)
    assert (found.figure, found.unit) == (figure, unit)


@pytest.mark.parametrize(("rejected", "tone"), [(0, "good"), (1, "good"), (5, "warn"), (20, "bad")])
def test_the_share_that_failed_gives_the_tone(rejected: int, tone: str) -> None:
    found = tile(
        "Last hour", last_hour=[outcomes(accepted=50), outcomes(accepted=50, rejected=rejected, refused=90)]
    )
    assert found.tone == tone
    assert found.more == (f"{rejected} rejected" if rejected else "none failed")


def test_in_doubt_has_a_way_to_the_list() -> None:
    assert tile("In doubt", 2).link == "/in-doubt"
    assert tile("In doubt", 0).link == ""
    assert tile("In doubt", None).figure == "-"


def test_the_spool_and_expiry_tell_when_they_are_behind() -> None:
    assert tile("Spool", records={"pending": 0, "spooled": 7, "errors": 0}).tone == "warn"
    assert tile("Spool", records={"pending": 0, "spooled": 0, "errors": 1}).tone == "bad"
    assert (tile("Expiry").figure, tile("Expiry").unit) == ("5", "min ago")
    late = tile("Expiry", expiry={"lag_s": 5 * 3600.0, "last_run_at": "2026-11-23T11:55:00Z", "rows": 0})
    assert (late.tone, late.more) == ("warn", "overdue for 5 h")
    assert tile("Expiry", expiry={"lag_s": 0.0, "last_run_at": None, "rows": 0}).more == "has not run yet"


def test_a_limit_says_its_rule_and_who_is_near() -> None:
    limit = {
        "name": "digest",
        "scope": "recipient_domain",
        "unit": "octets",
        "maximum": 1 << 20,
        "window_s": 3600.0,
        "action": "defer",
        "keys": [
            {"key": "example.com", "used": 1 << 20, "state": "over", "room_in_s": 90.0},
            {"key": "", "used": 900_000, "state": "near", "room_in_s": None},
        ],
    }
    row = limit_row(limit)
    assert row.rule == "1.0 MiB in 1h for each recipient domain, defer"
    assert [(key.key, key.used, key.tone, key.state) for key in row.keys] == [
        ("example.com", "1.0 MiB", "bad", "over, room in 90 s"),
        ("<>", "879 KiB", "warn", "near"),
    ]
    assert row.keys[0].part == 1.0
