"""The instruments, as a scrape of the real endpoint sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from itertools import product
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from relay import __version__
from relay.metrics import AUTH_OUTCOMES, CONNECT_OUTCOMES, REJECT_REASONS, REPLY_COMMANDS, WAITED_FOR, Metrics
from relay.outcome import Outcome
from relay.web import Web
from relay.web.server import Server

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
TEXT = "text/plain"

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
Scrape = Callable[[str], Awaitable[Series]]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(
        upstreams=["primary", "spare"], listeners=["127.0.0.1:2525"], task_types=["mention", "digest"]
    )


@pytest.fixture
async def scrape(metrics: Metrics) -> AsyncIterator[Scrape]:
    web = Web(lambda: Server(metrics, lambda: (True, [])))
    await web.start("127.0.0.1", 0)

    async def scrape(accept: str) -> Series:
        url = f"http://127.0.0.1:{web.port}/metrics"
        async with aiohttp.ClientSession() as client, client.get(url, headers={"Accept": accept}) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith(accept.partition(";")[0])
            parse = parse_openmetrics if accept == OPENMETRICS else parse_text
            families = list(parse(await answer.text()))
        samples = [sample for family in families for sample in family.samples]
        series = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
        assert len(series) == len(samples)
        return series

    yield scrape
    await web.stop()


def labelled(series: Series, name: str, **labels: str) -> float:
    return series[f"smtp_relay_{name}", frozenset(labels.items())]


OUTCOMES = [outcome.value for outcome in Outcome]
UPSTREAMS = ["primary", "spare"]
WITH_NONE = [*UPSTREAMS, "none"]
EXPECTED: Mapping[str, Mapping[str, list[str]]] = {
    "messages_total": {"upstream": WITH_NONE, "outcome": OUTCOMES},
    "recipients_total": {"upstream": WITH_NONE, "outcome": OUTCOMES},
    "message_bytes_total": {"direction": ["in", "out"]},
    "message_size_bytes_count": {},
    "transaction_seconds_count": {"upstream": WITH_NONE},
    "transaction_wait_seconds_total": {"upstream": WITH_NONE, "waited_for": list(WAITED_FOR)},
    "upstream_reply_seconds_count": {"upstream": UPSTREAMS, "command": list(REPLY_COMMANDS)},
    "client_sessions": {},
    "client_sessions_total": {"listener": ["127.0.0.1:2525"]},
    "client_rejects_total": {"reason": list(REJECT_REASONS)},
    "auth_total": {"outcome": list(AUTH_OUTCOMES)},
    "upstream_connections": {"upstream": UPSTREAMS, "state": ["idle", "active", "connecting"]},
    "upstream_connects_total": {"upstream": UPSTREAMS, "outcome": list(CONNECT_OUTCOMES)},
    "upstream_up": {"upstream": UPSTREAMS},
    "upstream_drained": {"upstream": UPSTREAMS},
    "upstream_failovers_total": {"upstream": UPSTREAMS},
    "upstream_wait_seconds_count": {"upstream": UPSTREAMS},
    "records_total": {"task_type": ["mention", "digest", "other"]},
    "record_commit_seconds_count": {},
    "record_batch_rows_count": {},
    "records_pending": {},
    "records_spooled": {},
    "records_reserve_bytes": {},
    "record_errors_total": {},
    "expired_rows_total": {},
    "expiry_lag_seconds": {},
    "expiry_last_run_timestamp_seconds": {},
    "expiry_duration_seconds": {},
    "config_last_reload_success_timestamp_seconds": {},
    "config_last_reload_successful": {},
}


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
async def test_every_instrument_stands_at_zero_with_all_its_labels(scrape: Scrape, accept: str) -> None:
    series = await scrape(accept)
    for name, labels in EXPECTED.items():
        expected = {frozenset(zip(labels, values, strict=True)) for values in product(*labels.values())}
        found = {key: value for (key_name, key), value in series.items() if key_name == f"smtp_relay_{name}"}
        assert found == dict.fromkeys(expected, 0), name


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
async def test_there_is_no_instrument_beside_the_expected_ones(scrape: Scrape, accept: str) -> None:
    series = await scrape(accept)
    ours = {name.removeprefix("smtp_relay_") for name, _ in series if name.startswith("smtp_relay_")}
    parts = {
        name.replace("_count", part)
        for name in EXPECTED
        if name.endswith("_count")
        for part in ("_sum", "_bucket")
    }
    assert ours == {*EXPECTED, *parts, "build_info"}
    assert labelled(series, "build_info", version=__version__) == 1


async def test_the_process_is_measured_too(scrape: Scrape) -> None:
    assert ("process_open_fds", frozenset()) in await scrape(TEXT)


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
async def test_times_reach_300_seconds_and_sizes_64_mebibytes(scrape: Scrape, accept: str) -> None:
    bounds: dict[str, set[float]] = {}
    for name, labels in await scrape(accept):
        if name.endswith("_bucket"):
            bounds.setdefault(name, set()).add(float(dict(labels)["le"]))
    for name, limits in bounds.items():
        if name.endswith("_seconds_bucket"):
            assert min(limits) == 0.0005
            assert sorted(limits)[-2:] == [300, float("inf")]
    sizes = bounds["smtp_relay_message_size_bytes_bucket"]
    assert min(sizes) == 1024
    assert sorted(sizes)[-2] == 64 * 1024 * 1024


async def test_a_transaction_moves_its_own_series_only(metrics: Metrics, scrape: Scrape) -> None:
    before = await scrape(TEXT)
    metrics.upstreams["primary"].finished((Outcome.ACCEPTED, 2, 0.3, 0.0, 0.0, 0.0, 1000))
    metrics.upstreams["primary"].recipient(Outcome.REJECTED)
    after = await scrape(TEXT)
    moved = {
        (name, dict(labels)["outcome"]): value - before[name, labels]
        for (name, labels), value in after.items()
        if name.startswith(("smtp_relay_messages", "smtp_relay_recip")) and value != before[name, labels]
    }
    assert moved == {
        ("smtp_relay_messages_total", "accepted"): 1,
        ("smtp_relay_recipients_total", "accepted"): 2,
        ("smtp_relay_recipients_total", "rejected"): 1,
    }
    assert labelled(after, "messages_total", upstream="primary", outcome="accepted") == 1
    assert labelled(after, "transaction_seconds_sum", upstream="primary") == pytest.approx(0.3)
    assert labelled(after, "transaction_seconds_bucket", upstream="primary", le="0.25") == 0
    assert labelled(after, "transaction_seconds_bucket", upstream="primary", le="0.5") == 1


async def test_a_transaction_without_an_upstream_counts_as_none(metrics: Metrics, scrape: Scrape) -> None:
    nowhere = metrics.upstreams["none"]
    nowhere.finished((Outcome.REFUSED, 3, 0.001, 0.0, 0.0, 0.0, 0))
    nowhere.up(True)
    nowhere.connections(1, 2, 3)
    series = await scrape(TEXT)
    assert labelled(series, "messages_total", upstream="none", outcome="refused") == 1
    assert labelled(series, "recipients_total", upstream="none", outcome="refused") == 3
    named_none = {name for name, labels in series if ("upstream", "none") in labels}
    assert not any(name.startswith("smtp_relay_upstream_") for name in named_none)


async def test_the_waits_of_transactions_add_up(metrics: Metrics, scrape: Scrape) -> None:
    primary = metrics.upstreams["primary"]
    primary.finished((Outcome.ACCEPTED, 1, 4.0, 0.5, 1.0, 0.25, 0))
    primary.finished((Outcome.ABORTED, 0, 2.0, 1.5, 1.0, 0.0, 0))  # waits that overlap leave the client none
    series = await scrape(TEXT)
    found = {
        whom: labelled(series, "transaction_wait_seconds_total", upstream="primary", waited_for=whom)
        for whom in WAITED_FOR
    }
    assert found == {"client": 2.25, "connection": 2.0, "upstream": 2.0, "record": 0.25}


def noted(metrics: Metrics) -> int:
    """Return how many values wait to be counted."""
    waiting: list[list[Any]] = [metrics._recorded, *(each._finished for each in metrics.upstreams.values())]
    waiting += [histogram._fresh for histogram in metrics._series._histograms]
    return sum(map(len, waiting))


def note_a_message(metrics: Metrics, seconds: float) -> None:
    primary = metrics.upstreams["primary"]
    for command in ("mail", "rcpt", "data", "end_of_data"):
        primary.replied[command](seconds)
    primary.waited(seconds)
    primary.finished((Outcome.ACCEPTED, 1, seconds, 0.0, 0.0, 0.0, 100))
    metrics.accepted(100)
    metrics.row_recorded("mention")
    metrics.committed(1, seconds)


def test_what_is_noted_is_counted_once_and_does_not_stay(metrics: Metrics) -> None:
    settled = Metrics(upstreams=UPSTREAMS, listeners=["127.0.0.1:2525"], task_types=["mention", "digest"])
    for number in range(100):
        note_a_message(metrics, number / 64)
        note_a_message(settled, number / 64)
        settled.settle()
        assert noted(settled) == 0
    assert noted(metrics) == 1000
    scrapes = [
        [line for line in each.exposition(None)[0].splitlines() if b"smtp_relay_" in line]
        for each in (metrics, settled, metrics)
    ]
    assert noted(metrics) == 0
    assert scrapes[0] == scrapes[1] == scrapes[2]
    assert b'smtp_relay_upstream_wait_seconds_count{upstream="primary"} 100.0' in scrapes[0]


async def test_the_upstream_instruments_move(metrics: Metrics, scrape: Scrape) -> None:
    spare = metrics.upstreams["spare"]
    for command in REPLY_COMMANDS:
        spare.replied[command](0.02)
    for outcome in CONNECT_OUTCOMES:
        spare.connected(outcome)
    spare.waited(0.5)
    spare.connections(idle=1, active=2, connecting=3)
    spare.up(True)
    series = await scrape(OPENMETRICS)
    for command in REPLY_COMMANDS:
        assert labelled(series, "upstream_reply_seconds_count", upstream="spare", command=command) == 1
    for outcome in CONNECT_OUTCOMES:
        assert labelled(series, "upstream_connects_total", upstream="spare", outcome=outcome) == 1
    assert labelled(series, "upstream_wait_seconds_sum", upstream="spare") == 0.5
    for state, count in (("idle", 1), ("active", 2), ("connecting", 3)):
        assert labelled(series, "upstream_connections", upstream="spare", state=state) == count
    assert labelled(series, "upstream_up", upstream="spare") == 1
    assert labelled(series, "upstream_up", upstream="primary") == 0
    spare.up(False)
    assert labelled(await scrape(OPENMETRICS), "upstream_up", upstream="spare") == 0


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
async def test_the_client_instruments_move(metrics: Metrics, scrape: Scrape, accept: str) -> None:
    metrics.session_opened("127.0.0.1:2525")
    metrics.session_opened("127.0.0.1:2525")
    metrics.session_closed()
    for reason in REJECT_REASONS:
        metrics.rejected(reason)
    for outcome in AUTH_OUTCOMES:
        metrics.auth(outcome)
    metrics.upstreams["primary"].finished((Outcome.ACCEPTED, 1, 0.1, 0.0, 0.0, 0.0, 1000))
    metrics.accepted(900)
    series = await scrape(accept)
    assert labelled(series, "client_sessions") == 1
    assert labelled(series, "client_sessions_total", listener="127.0.0.1:2525") == 2
    for reason in REJECT_REASONS:
        assert labelled(series, "client_rejects_total", reason=reason) == 1
    for outcome in AUTH_OUTCOMES:
        assert labelled(series, "auth_total", outcome=outcome) == 1
    assert labelled(series, "message_bytes_total", direction="in") == 1000
    assert labelled(series, "message_bytes_total", direction="out") == 900
    assert labelled(series, "message_size_bytes_sum") == 900
    assert labelled(series, "message_size_bytes_bucket", le="1024.0") == 1


async def test_the_record_and_expiry_instruments_move(metrics: Metrics, scrape: Scrape) -> None:
    for task_type in ("mention", "welcome", "", "other"):
        metrics.row_recorded(task_type)
    metrics.committed(7, 0.004)
    metrics.record_error()
    metrics.records_pending(3)
    metrics.records_spooled(2)
    metrics.records_reserve(4096)
    metrics.expired(11)
    metrics.expiry_run(1_700_000_000.0, 1.5)
    series = await scrape(OPENMETRICS)
    assert labelled(series, "records_total", task_type="mention") == 1
    assert labelled(series, "records_total", task_type="digest") == 0
    assert labelled(series, "records_total", task_type="other") == 3
    assert labelled(series, "record_batch_rows_sum") == 7
    assert labelled(series, "record_commit_seconds_sum") == 0.004
    assert labelled(series, "record_errors_total") == 1
    assert labelled(series, "records_pending") == 3
    assert labelled(series, "records_spooled") == 2
    assert labelled(series, "records_reserve_bytes") == 4096
    assert labelled(series, "expired_rows_total") == 11
    assert labelled(series, "expiry_last_run_timestamp_seconds") == 1_700_000_000
    assert labelled(series, "expiry_duration_seconds") == 1.5


async def test_a_task_type_counts_under_the_name_that_the_configuration_has_for_it(
    metrics: Metrics, scrape: Scrape
) -> None:
    metrics.add_task_types(["Invoice", "invoice", "News"])
    for task_type in ("news", "NEWS", "Invoice", "invoice", "invoice", "INVOICE", "Mention", "welcome"):
        metrics.row_recorded(task_type)
    series = await scrape(OPENMETRICS)
    for name, rows in {"News": 2, "Invoice": 2, "invoice": 2, "mention": 1, "other": 1}.items():
        assert labelled(series, "records_total", task_type=name) == rows


def histograms(series: Series) -> dict[tuple[str, frozenset[tuple[str, str]]], list[float]]:
    """Return every histogram's bucket counts in the order of their bounds, +Inf last."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], dict[float, float]] = {}
    for (name, labels), value in series.items():
        if name.startswith("smtp_relay_") and name.endswith("_bucket"):
            (bound,) = [float(text) for label, text in labels if label == "le"]
            rest = frozenset((label, text) for label, text in labels if label != "le")
            found.setdefault((name.removesuffix("_bucket"), rest), {})[bound] = value
    return {key: [counts[bound] for bound in sorted(counts)] for key, counts in found.items()}


async def test_a_value_counts_in_every_bucket_whose_bound_it_does_not_pass(
    metrics: Metrics, scrape: Scrape
) -> None:
    spare = metrics.upstreams["spare"]
    for seconds in (0, 0.25, 0.2500001, 300, 300.5):
        spare.waited(seconds)
    series = await scrape(TEXT)
    for bound, count in (("0.0005", 1), ("0.1", 1), ("0.25", 2), ("0.5", 3), ("300.0", 4), ("+Inf", 5)):
        assert labelled(series, "upstream_wait_seconds_bucket", upstream="spare", le=bound) == count
    assert labelled(series, "upstream_wait_seconds_count", upstream="spare") == 5


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
async def test_scrapes_amid_counting_agree_with_themselves(
    metrics: Metrics, scrape: Scrape, accept: str
) -> None:
    primary = metrics.upstreams["primary"]
    enough = asyncio.Event()

    async def count() -> None:
        while not enough.is_set():
            for seconds in (0.25, 64, 512):  # sums of these are exact
                primary.finished((Outcome.ACCEPTED, 2, seconds, 0.0, 0.0, 0.0, 0))
                primary.replied["rcpt"](seconds)
                metrics.committed(3, seconds)
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    scrapes = [await scrape(accept) for _ in range(5)]
    enough.set()
    await counting

    for series in scrapes:
        for (name, labels), buckets in histograms(series).items():
            assert buckets == sorted(buckets), name
            assert buckets[-1] == series[f"{name}_count", labels], name
        messages = labelled(series, "messages_total", upstream="primary", outcome="accepted")
        assert messages == labelled(series, "transaction_seconds_count", upstream="primary")
        assert messages == labelled(series, "record_batch_rows_count")
        assert labelled(series, "record_batch_rows_sum") == 3 * messages
        assert labelled(series, "record_commit_seconds_sum") == (0.25 + 64 + 512) * messages / 3
        assert labelled(series, "recipients_total", upstream="primary", outcome="accepted") == 2 * messages
    totals = [labelled(series, "record_batch_rows_count") for series in scrapes]
    assert totals == sorted(set(totals))  # counting went on between the scrapes


def test_two_relays_in_one_process_do_not_share_instruments() -> None:
    one, two = (Metrics(upstreams=[], listeners=["a"], task_types=[]) for _ in range(2))
    one.session_opened("a")
    assert b'client_sessions_total{listener="a"} 1.0' in one.exposition(None)[0]
    assert b'client_sessions_total{listener="a"} 0.0' in two.exposition(None)[0]


def test_a_registry_can_be_given() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(upstreams=[], listeners=[], task_types=[], registry=registry)
    metrics.records_pending(4)
    assert metrics.registry is registry
    assert registry.get_sample_value("smtp_relay_records_pending") == 4


def test_an_upstream_cannot_take_the_name_of_none() -> None:
    with pytest.raises(ValueError, match="'none'"):
        Metrics(upstreams=["none"], listeners=[], task_types=[])


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "text/plain"),
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("text/plain;version=x;escaping=y", "text/plain"),
        ("text/html, Application/OpenMetrics-Text;q=0.5", "application/openmetrics-text"),
        ("application/openmetrics-text; version=nonsense", "application/openmetrics-text"),
        ("application/openmetrics-text; version=99", "application/openmetrics-text"),
    ],
)
def test_the_format_follows_the_accept_header(
    metrics: Metrics, accept: str | None, content_type: str
) -> None:
    body, answered = metrics.exposition(accept)
    assert answered.startswith(content_type)
    assert "99" not in answered
    assert body.endswith(b"# EOF\n") is (content_type != "text/plain")


def test_every_instrument_says_what_it_is(metrics: Metrics) -> None:
    for family in metrics.registry.collect():
        assert family.documentation.endswith(".") or not family.name.startswith("smtp_relay_"), family.name


async def test_an_upstream_can_come_later(metrics: Metrics, scrape: Scrape) -> None:
    added = metrics.add_upstream("late")
    assert metrics.add_upstream("late") is added
    assert metrics.upstreams["late"] is added
    assert metrics.add_upstream("primary") is metrics.upstreams["primary"]
    added.failed_over()
    added.drained(value=True)
    series = await scrape(TEXT)
    assert labelled(series, "upstream_failovers_total", upstream="late") == 1
    assert labelled(series, "upstream_drained", upstream="late") == 1
    assert labelled(series, "messages_total", upstream="late", outcome="accepted") == 0
