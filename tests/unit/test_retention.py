from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from relay.records.retention import Retention

SENT = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)


@pytest.mark.parametrize(
    ("task_type", "expected"),
    [
        ("mention", SENT + timedelta(days=90)),
        ("receipt", None),
        ("anything else", SENT + timedelta(days=30)),
    ],
)
def test_a_type_that_is_named_has_its_own_period_and_others_the_default(task_type, expected):
    retention = Retention(timedelta(days=30), {"mention": timedelta(days=90), "receipt": None})
    assert retention.expires_at(task_type, SENT) == expected


def test_a_default_of_never_leaves_the_named_types_their_period():
    retention = Retention(None, {"mention": timedelta(seconds=1)})
    assert retention.expires_at("digest", SENT) is None
    assert retention.expires_at("mention", SENT) == SENT + timedelta(seconds=1)


def test_an_end_beyond_the_calendar_is_never():
    assert Retention(timedelta(days=365 * 9000)).expires_at("mention", SENT) is None


def test_canonical_text_is_equal_for_settings_that_keep_rows_equally_long():
    day = timedelta(days=1)
    plain = Retention(day, {"a": day * 2, "b": None}).canonical()
    assert Retention(day, {"b": None, "a": timedelta(hours=48)}).canonical() == plain
    assert Retention(day, {"a": day * 2, "b": None, "c": day}).canonical() == plain


@pytest.mark.parametrize(
    "other",
    [
        Retention(None),
        Retention(timedelta(days=1, microseconds=1)),
        Retention(timedelta(days=1), {"a": timedelta(days=2)}),
        Retention(timedelta(days=1), {"a": None}),
    ],
)
def test_canonical_text_differs_for_settings_that_do_not(other):
    assert other.canonical() != Retention(timedelta(days=1)).canonical()
