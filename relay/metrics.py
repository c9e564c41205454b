"""Every instrument of the relay, and the only importer of the Prometheus client library.

Rules: the names are public interface (prefix `smtp_relay_`, base units, `_total` for counters). Label values
come from the configuration or from fixed sets, never from what a client or an upstream sends, and every
combination stands at 0 from the start, so that rates and alerts work before the first event. Children are
bound once here; nothing on a message's way looks a label up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import UnknownMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from relay import __version__
from relay.outcome import Outcome

__all__ = [
    "CONNECT_OUTCOMES",
    "NO_UPSTREAM",
    "OTHER_TASK_TYPE",
    "REJECT_REASONS",
    "REPLY_COMMANDS",
    "Metrics",
    "UpstreamMetrics",
]

REPLY_COMMANDS: Final = ("mail", "rcpt", "data", "end_of_data", "rset")
"""The commands whose upstream replies are timed."""

CONNECT_OUTCOMES: Final = ("ok", "unreachable", "timeout", "greeting", "tls", "auth", "protocol")
"""How an attempt to connect to an upstream can end."""

REJECT_REASONS: Final = (
    "not_allowed",
    "too_many_connections",
    "too_many_client_connections",
    "too_large",
    "too_many_recipients",
    "out_of_step",
    "too_many_errors",
    "timeout",
    "slow",
    "stray_newline",
    "nul",
    "loop",
    "draining",
    "records",
    "internal",
)
"""Why the relay itself turned a client away."""

NO_UPSTREAM: Final = "none"
"""The `upstream` label of a transaction that got no upstream."""

OTHER_TASK_TYPE: Final = "other"
"""The `task_type` label of every type that the configuration does not name."""

_OPENMETRICS: Final = "application/openmetrics-text"

_CONNECTION_STATES: Final = ("idle", "active", "connecting")

# From a reply on loopback to the wait for an end of data that an upstream scans for minutes.
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OCTETS: Final = tuple(1024 * 4**power for power in range(9))  # 1 KiB to 64 MiB
_ROWS: Final = tuple(2**power for power in range(11))  # 1 to 1024


class Metrics:
    """The instruments of one relay process, in a registry of their own.

    `upstreams` and `listeners` are the configured names; `task_types` the types that the configuration
    names (every other type counts as `other`). Raises ValueError for an upstream named `none`, the label
    of transactions without one.
    """

    def __init__(
        self,
        *,
        upstreams: Sequence[str],
        listeners: Sequence[str],
        task_types: Sequence[str],
        registry: CollectorRegistry | None = None,
    ) -> None:
        if NO_UPSTREAM in upstreams:
            raise ValueError(
                f"an upstream cannot be named {NO_UPSTREAM!r}: it labels transactions without one"
            )
        # A `_created` series beside each counter and histogram lengthens a scrape, and nobody reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry() if registry is None else registry
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        self.upstreams: Mapping[str, UpstreamMetrics] = _upstream_metrics(upstreams, self.registry)
        """By upstream name; `none` is for transactions that got no upstream."""
        self._bind_clients(listeners)
        self._bind_octets()
        self._bind_records(task_types)
        self._bind_expiry()
        _gauge(self.registry, "build_info", "1; the label tells the version that runs.", "version").labels(
            __version__
        ).set(1)

    def _bind_clients(self, listeners: Sequence[str]) -> None:
        registry = self.registry
        self._sessions = _gauge(registry, "client_sessions", "Client sessions open now.")
        self._sessions_total = _SessionsTotal(listeners)
        registry.register(self._sessions_total)
        rejects = _counter(
            registry,
            "client_rejects_total",
            "Sessions, commands and messages that the relay itself refused.",
            "reason",
        )
        self._rejects = {reason: rejects.labels(reason) for reason in REJECT_REASONS}

    def _bind_octets(self) -> None:
        registry = self.registry
        octets = _counter(
            registry,
            "message_bytes_total",
            "Octets of message content: in, all that clients sent; out, messages that were accepted.",
            "direction",
        )
        self._octets_in = octets.labels("in")
        self._octets_out = octets.labels("out")
        self._message_size = _histogram(registry, "message_size_bytes", "Size of accepted messages.", _OCTETS)

    def _bind_records(self, task_types: Sequence[str]) -> None:
        registry = self.registry
        records = _counter(registry, "records_total", "Rows made for accepted messages.", "task_type")
        self._records = {name: records.labels(name) for name in (*task_types, OTHER_TASK_TYPE)}
        self._records_other = self._records[OTHER_TASK_TYPE]
        self._commit_seconds = _histogram(
            registry, "record_commit_seconds", "Time for one commit of rows to the store."
        )
        self._batch_rows = _histogram(registry, "record_batch_rows", "Rows that shared one commit.", _ROWS)
        self._records_pending = _gauge(registry, "records_pending", "Rows waiting for their commit now.")
        self._records_spooled = _gauge(
            registry, "records_spooled", "Rows in the spool now, waiting for the store."
        )
        self._record_errors = _counter(
            registry, "record_errors_total", "Attempts to keep rows in the store or the spool that failed."
        )

    def _bind_expiry(self) -> None:
        registry = self.registry
        self._expired_rows = _counter(
            registry, "expired_rows_total", "Rows deleted because they had expired."
        )
        self._expiry_last_run = _gauge(
            registry, "expiry_last_run_timestamp_seconds", "When the last expiry run finished, Unix time."
        )
        self._expiry_duration = _gauge(registry, "expiry_duration_seconds", "Time the last expiry run took.")

    def session_opened(self, listener: str) -> None:
        """Count a client session that begins on the configured `listener`."""
        self._sessions.inc()
        self._sessions_total.by_listener[listener] += 1

    def session_closed(self) -> None:
        """Count a client session that ended."""
        self._sessions.dec()

    def rejected(self, reason: str) -> None:
        """Count a refusal of the relay's own; `reason` is one of REJECT_REASONS."""
        self._rejects[reason].inc()

    def message_in(self, octets: int) -> None:
        """Count octets of content that came from a client."""
        self._octets_in.inc(octets)

    def message_out(self, octets: int) -> None:
        """Count octets of content that went to an upstream."""
        self._octets_out.inc(octets)

    def message_size(self, octets: int) -> None:
        """Observe the size of an accepted message."""
        self._message_size.observe(octets)

    def row_recorded(self, task_type: str) -> None:
        """Count the row of an accepted message; a type that the configuration does not name is `other`."""
        self._records.get(task_type, self._records_other).inc()

    def committed(self, rows: int, seconds: float) -> None:
        """Observe one commit to the store: how many rows shared it and how long it took."""
        self._batch_rows.observe(rows)
        self._commit_seconds.observe(seconds)

    def record_error(self) -> None:
        """Count a failed attempt to keep rows."""
        self._record_errors.inc()

    def records_pending(self, rows: int) -> None:
        """Set how many rows wait for their commit."""
        self._records_pending.set(rows)

    def records_spooled(self, rows: int) -> None:
        """Set how many rows are in the spool."""
        self._records_spooled.set(rows)

    def expired(self, rows: int) -> None:
        """Count rows that expiry deleted."""
        self._expired_rows.inc(rows)

    def expiry_run(self, finished_at: float, seconds: float) -> None:
        """Set when the last expiry run finished (Unix time, seconds) and how long it took."""
        self._expiry_last_run.set(finished_at)
        self._expiry_duration.set(seconds)

    def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """Return what a scrape gets, and its content type.

        Prometheus text, or OpenMetrics where the HTTP `accept` header names it.
        """
        # Only the media type of a header counts: the library compares a version with numbers unseen (and
        # fails on letters), then repeats it as its own. Escaping is moot: the names here need none.
        wants = {entry.partition(";")[0].strip().lower() for entry in (accept or "").split(",")}
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in wants else "")
        return encode(self.registry), content_type


class UpstreamMetrics:
    """The instruments of one upstream, bound to its name."""

    __slots__ = (
        "_connections",
        "_connects",
        "_messages",
        "_recipients",
        "_replies",
        "_transaction_seconds",
        "_up",
        "_wait_seconds",
    )

    def __init__(self, name: str, transactions: _Transactions, connections: _Connections) -> None:
        self._messages = {outcome: transactions.messages.labels(name, outcome.value) for outcome in Outcome}
        self._recipients = {
            outcome: transactions.recipients.labels(name, outcome.value) for outcome in Outcome
        }
        self._transaction_seconds = transactions.seconds.labels(name)
        self._replies = {command: connections.replies.labels(name, command) for command in REPLY_COMMANDS}
        self._connects = {outcome: connections.connects.labels(name, outcome) for outcome in CONNECT_OUTCOMES}
        self._connections = tuple(connections.open.labels(name, state) for state in _CONNECTION_STATES)
        self._wait_seconds = connections.wait.labels(name)
        self._up = connections.up.labels(name)

    def transaction(self, outcome: Outcome, seconds: float, recipients: Mapping[Outcome, int]) -> None:
        """Count one finished transaction and its recipients, each by its own outcome.

        `seconds` is from MAIL to the outcome.
        """
        self._messages[outcome].inc()
        self._transaction_seconds.observe(seconds)
        for recipient_outcome, count in recipients.items():
            self._recipients[recipient_outcome].inc(count)

    def reply(self, command: str, seconds: float) -> None:
        """Observe how long the upstream took to answer; `command` is one of REPLY_COMMANDS."""
        self._replies[command].observe(seconds)

    def connected(self, outcome: str) -> None:
        """Count an attempt to connect; `outcome` is one of CONNECT_OUTCOMES."""
        self._connects[outcome].inc()

    def waited(self, seconds: float) -> None:
        """Observe how long a transaction waited for a connection."""
        self._wait_seconds.observe(seconds)

    def connections(self, idle: int, active: int, connecting: int) -> None:
        """Set how many connections there are in each state."""
        gauges = self._connections
        gauges[0].set(idle)
        gauges[1].set(active)
        gauges[2].set(connecting)

    def up(self, value: bool) -> None:
        """Set whether the upstream can be used."""
        self._up.set(value)


class _SessionsTotal(Collector):
    """The counter `client_sessions_total`, beside the gauge `client_sessions`.

    OpenMetrics names a counter's family without `_total`, so as a counter it would collide with the gauge;
    as a family of unknown type both keep their names in either format.
    """

    def __init__(self, listeners: Sequence[str]) -> None:
        self.by_listener = dict.fromkeys(listeners, 0)

    def collect(self) -> Iterable[UnknownMetricFamily]:
        family = UnknownMetricFamily(
            "smtp_relay_client_sessions_total", "Client sessions begun.", labels=("listener",)
        )
        for listener, sessions in self.by_listener.items():
            family.add_metric((listener,), sessions)
        yield family


class _Transactions:
    """The instruments of transactions, labelled by upstream."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.messages = _counter(
            registry, "messages_total", "Finished transactions by outcome.", "upstream", "outcome"
        )
        self.recipients = _counter(
            registry,
            "recipients_total",
            "Recipients of finished transactions by outcome.",
            "upstream",
            "outcome",
        )
        self.seconds = _histogram(
            registry, "transaction_seconds", "Time from MAIL to the outcome.", _SECONDS, "upstream"
        )


class _Connections:
    """The instruments of connections, labelled by upstream; without a registry they are never scraped."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self.replies = _histogram(
            registry,
            "upstream_reply_seconds",
            "Time from a command's way up to the upstream's reply.",
            _SECONDS,
            "upstream",
            "command",
        )
        self.open = _gauge(registry, "upstream_connections", "Upstream connections now.", "upstream", "state")
        self.connects = _counter(
            registry, "upstream_connects_total", "Attempts to connect by outcome.", "upstream", "outcome"
        )
        self.up = _gauge(registry, "upstream_up", "1 if the upstream can be used, 0 if not.", "upstream")
        self.wait = _histogram(
            registry,
            "upstream_wait_seconds",
            "Time that transactions waited for an upstream connection.",
            _SECONDS,
            "upstream",
        )


def _upstream_metrics(names: Iterable[str], registry: CollectorRegistry) -> dict[str, UpstreamMetrics]:
    transactions = _Transactions(registry)
    connections = _Connections(registry)
    metrics = {name: UpstreamMetrics(name, transactions, connections) for name in names}
    # Without an upstream there are transactions and no connections: `upstream_up{upstream="none"} 0` would
    # be a false alarm for ever.
    metrics[NO_UPSTREAM] = UpstreamMetrics(NO_UPSTREAM, transactions, _Connections(None))
    return metrics


def _counter(registry: CollectorRegistry | None, name: str, text: str, *labels: str) -> Counter:
    return Counter(f"smtp_relay_{name}", text, labels, registry=registry)


def _gauge(registry: CollectorRegistry | None, name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"smtp_relay_{name}", text, labels, registry=registry)


def _histogram(
    registry: CollectorRegistry | None,
    name: str,
    text: str,
    buckets: Sequence[float] = _SECONDS,
    *labels: str,
) -> Histogram:
    return Histogram(f"smtp_relay_{name}", text, labels, registry=registry, buckets=buckets)
