"""How values are written for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from markupsafe import Markup

from relay.web.shown import iso, number, octets, one_line, seconds, utc, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0004, "0.4 ms"),
        (0.003, "3 ms"),
        (0.025, "25 ms"),
        (0.4, "400 ms"),
        (1.0, "1 s"),
        (1.25, "1.2 s"),
        (42, "42 s"),
        (240, "4 min"),
        (7200, "2 h"),
        (10 * 86400, "10 d"),
    ],
)
def test_lengths_of_time_are_as_fine_as_it_matters(value: float | None, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1.0 KiB"),
        (20480, "20 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3072 MiB"),
    ],
)
def test_sizes(value: int, text: str) -> None:
    assert octets(value) == text


def test_moments_are_in_utc() -> None:
    moment = datetime(2026, 11, 23, 9, 46, 1, 500000, tzinfo=timezone(timedelta(hours=2)))
    assert utc(moment) == "2026-11-23 07:46:01"
    assert iso(moment) == "2026-11-23T07:46:01.500Z"
    assert datetime.fromisoformat(iso(moment)) == moment.astimezone(UTC)


def test_counts_and_replies() -> None:
    assert number(1234567) == "1,234,567"
    assert number(None) == ""
    assert one_line("250 a\n250 b") == "250 a 250 b"


def test_what_does_not_print_or_turns_the_text_round_is_escaped() -> None:
    assert visible("ann@example.com") == "ann@example.com"
    assert visible("a\u202egnp.exe") == "a\\u202egnp.exe"
    assert visible("\x1b[31mred\x00") == "\\x1b[31mred\\x00"
    assert visible("one\ntwo") == "one\ntwo"
    assert visible("Zoë 邮") == "Zoë 邮"
    assert visible(None) == ""
    assert visible(7) == 7
    assert visible(Markup("<b>\u202e</b>")) == Markup("<b>\u202e</b>"), "what templates wrote is theirs"
