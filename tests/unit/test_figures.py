"""The data of the charts."""

from __future__ import annotations

import json
from datetime import UTC, datetime

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


def test_the_slots_of_every_span_end_now() -> None:
    for span in SPANS.values():
        figure = by_type({"a": [1] * span.slots}, span, NOW)
        assert figure.series[0].total == span.slots
        assert len(figure.begins) == span.slots
        assert figure.begins[-1] <= NOW < figure.begins[-1] + span.step
        assert figure.begins[0] == span.begin(NOW)


def test_the_biggest_types_have_colours_and_the_rest_is_together() -> None:
    span = SPANS["24h"]
    slots = {f"type-{at:02}": [0] * 23 + [100 - at] for at in range(12)}
    figure = by_type(slots, span, NOW)
    assert [series.label for series in figure.series] == [f"type-{at:02}" for at in range(7)] + ["5 others"]
    colours = [series.colour for series in figure.series]
    assert colours == [f"series-{at}" for at in range(1, 8)] + ["series-other"]
    assert sum(series.total for series in figure.series) == sum(map(sum, slots.values()))
    eight = by_type(dict(list(slots.items())[:8]), span, NOW)
    assert len(eight.series) == 8
    assert "others" not in eight.series[-1].label
    many = by_type({**slots, None: [7] * 24}, span, NOW)
    assert (many.series[-1].label, many.series[-1].total) == ("all others", figure.series[-1].total + 7 * 24)
