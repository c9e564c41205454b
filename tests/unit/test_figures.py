"""The data of the charts."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from relay.outcome import Outcome
from relay.web.figures import SPANS, by_outcome, by_type

NOW = datetime(2026, 11, 23, 12, 34, 56, tzinfo=UTC)


def minute(at: str, **counts: int) -> dict[str, object]:
    return {"at": at, **dict.fromkeys((outcome.value for outcome in Outcome), 0), **counts}


def test_the_last_hour_has_sixty_minutes_known_or_not() -> None:
    figure = by_outcome(
        [minute("2026-11-23T12:33:00Z", accepted=5, in_doubt=1), minute("2026-11-23T12:34:00Z", accepted=2)],
        NOW,
    )
    drawn = json.loads(figure.data)
    assert len(drawn["x"]) == 60
    assert drawn["step"] == 60
    assert drawn["x"][-1] == datetime(2026, 11, 23, 12, 34, tzinfo=UTC).timestamp()
    assert [series["label"] for series in drawn["series"]] == ["accepted", "in doubt"]
    assert drawn["series"][0]["values"] == [None] * 58 + [5, 2]
    assert [(row.moment.minute, row.values) for row in figure.rows] == [(34, [2, 0]), (33, [5, 1])]
    assert [series.total for series in figure.series] == [7, 1]


def test_an_hour_without_mail_still_names_what_it_counts() -> None:
    figure = by_outcome([], NOW)
    assert [series.label for series in figure.series] == ["accepted"]
    assert figure.rows == []


def test_slots_of_every_span_hold_all_that_was_sent_in_it() -> None:
    for span in SPANS.values():
        begin = span.begin(NOW)
        hours = int((NOW - begin) / timedelta(hours=1)) + 1
        figure = by_type([(begin + timedelta(hours=at), "a", 1) for at in range(hours)], span, NOW)
        assert figure.series[0].total == hours
        assert len(figure.begins) == span.slots
        assert figure.begins[-1] <= NOW < figure.begins[-1] + span.step
        assert all(value for value in figure.series[0].values)


def test_the_biggest_types_have_colours_and_the_rest_is_together() -> None:
    span = SPANS["24h"]
    counts = [(NOW, f"type-{at:02}", 100 - at) for at in range(12)]
    figure = by_type(counts, span, NOW)
    assert [series.label for series in figure.series] == [f"type-{at:02}" for at in range(7)] + ["5 others"]
    assert [series.colour for series in figure.series] == [f"series-{at}" for at in range(1, 8)] + [
        "series-other"
    ]
    assert sum(series.total for series in figure.series) == sum(count for _, _, count in counts)
    eight = by_type(counts[:8], span, NOW)
    assert len(eight.series) == 8
    assert "others" not in eight.series[-1].label


def test_what_is_not_of_the_span_is_left_out() -> None:
    span = SPANS["24h"]
    early = span.begin(NOW) - timedelta(seconds=1)
    assert by_type([(early, "a", 1), (NOW + timedelta(hours=2), "a", 1)], span, NOW).series == []
