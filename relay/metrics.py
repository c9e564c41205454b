"""Every instrument of the relay.

Rules: the names are public interface (prefix `smtp_relay_`, base units, `_total` for counters). Label values
come from the configuration or from fixed sets, never from what a client or an upstream sends, and every
combination stands at 0 from the start, so that rates and alerts work before the first event. Series are
bound once here; nothing on a message's way looks a label up.

The event loop's thread alone counts and scrapes. What comes with every message is only noted when it
happens, by the `append` of a list, and counted together: at each scrape, and once a second by `settle`, which
the relay calls so that the lists stay short. What a scrape reads are the series (`series.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import sub
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from relay import __version__
from relay.limits.rule import fold
from relay.outcome import Outcome
from relay.series import Number, Series

__all__ = [
    "AUTH_OUTCOMES",
    "CONNECT_OUTCOMES",
    "DURATIONS",
    "NO_UPSTREAM",
    "OTHER_TASK_TYPE",
    "REJECT_REASONS",
    "REPLY_COMMANDS",
    "WAITED_FOR",
    "Counts",
    "Finished",
    "Gauges",
    "Metrics",
    "UpstreamMetrics",
]

REPLY_COMMANDS: Final = ("mail", "rcpt", "data", "bdat", "end_of_data", "rset")
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
    "proxy",
    "tls",
    "too_many_logins",
    "crowded",
    "limit",
)
"""Why the relay itself turned a client away."""

NO_UPSTREAM: Final = "none"
"""The `upstream` label of a transaction that got no upstream."""

AUTH_OUTCOMES: Final = ("ok", "failed", "unavailable", "throttled", "aborted")
"""How an AUTH command of a client can end."""

OTHER_TASK_TYPE: Final = "other"
"""The `task_type` label of every type that the configuration does not name."""

_OPENMETRICS: Final = "application/openmetrics-text"

WAITED_FOR: Final = ("client", "connection", "upstream", "record")
"""What a transaction can wait for: its client, a connection to the upstream, the upstream's replies and its
taking of content, the row."""

_CONNECTION_STATES: Final = ("idle", "active", "connecting")

# From a reply on loopback to the wait for an end of data that an upstream scans for minutes.
DURATIONS: Final = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 300),
)
"""The bounds between which times are counted, in seconds; a last count is for what took longer."""
_OCTETS: Final = tuple(1024 * 4**power for power in range(9))  # 1 KiB to 64 MiB
_ROWS: Final = tuple(2**power for power in range(11))  # 1 to 1024


Finished = tuple[Outcome, int, float, float, float, float, int]
"""A finished transaction: its outcome; how many recipients share that; the seconds from MAIL to the outcome,
and of these what it waited for a connection, for the upstream, and for the row; octets of content that came.

No class of its own: it is made for every message, and to make a plain one costs no call.
"""


@dataclass(frozen=True, slots=True)
class Counts:
    """Where some counters of one upstream stand."""

    outcomes: tuple[int, ...]
    """Transactions, in the order of `Outcome`."""
    answers: tuple[int, ...]
    """Replies to an end of data, by the time they took: between the bounds of DURATIONS."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """What stands now, whatever was before. Times in seconds, those `_at` since 1970."""

    sessions: int
    connections: Mapping[str, tuple[int, int, int]]
    """By upstream: idle, active, connecting."""
    pending: int
    spooled: int
    reserve: int
    record_errors: int
    expiry_at: float
    """0: not yet."""
    expiry_lag: float
    expired_rows: int


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
        self.registry = CollectorRegistry() if registry is None else registry
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        self._series = series = Series(before_scrape=self.settle)
        # Without an upstream there are transactions and no connections: `upstream_up{upstream="none"} 0`
        # would be a false alarm for ever, so those series are in no scrape.
        self.upstreams: dict[str, UpstreamMetrics] = {}
        """By upstream name; `none` is for transactions that got no upstream."""
        for name in upstreams:
            self.add_upstream(name)
        self.upstreams[NO_UPSTREAM] = UpstreamMetrics(NO_UPSTREAM, series, Series(before_scrape=_nothing))
        self._limits: dict[tuple[str, str], Number] = {}
        self._bind_clients(series, listeners)
        self._bind_octets(series)
        self._bind_records(series, task_types)
        self._bind_expiry(series)
        text = "1 if the configuration that was read last is in force, 0 if it was refused."
        self._reload_ok = series.gauge("config_last_reload_successful", text)
        text = "When the configuration in force was read, Unix time."
        self._reload_at = series.gauge("config_last_reload_success_timestamp_seconds", text)
        series.gauge("build_info", "1; the label tells the version that runs.", version=__version__).value = 1
        self.registry.register(series)

    def add_upstream(self, name: str) -> UpstreamMetrics:
        """Return the instruments of an upstream, made where there are none; those of one that went stay."""
        if name not in self.upstreams:
            self.upstreams[name] = UpstreamMetrics(name, self._series, self._series)
        return self.upstreams[name]

    def _bind_clients(self, series: Series, listeners: Sequence[str]) -> None:
        self._sessions = series.gauge("client_sessions", "Client sessions open now.")
        # OpenMetrics names a counter's family without `_total`, so as a counter it would collide with the
        # gauge; as a family of unknown type both keep their names in either format.
        self._sessions_total: dict[str, Number] = {}
        self.add_listeners(listeners)
        text = "Sessions, commands and messages that the relay itself refused."
        self._rejects = {
            reason: series.counter("client_rejects_total", text, reason=reason) for reason in REJECT_REASONS
        }
        text = "Logins of clients by outcome."
        self._auth = {
            outcome: series.counter("auth_total", text, outcome=outcome) for outcome in AUTH_OUTCOMES
        }

    def _bind_octets(self, series: Series) -> None:
        text = "Octets of message content: in, all that clients sent; out, messages that were accepted."
        self._octets_in = series.counter("message_bytes_total", text, direction="in")
        self._octets_out = series.counter("message_bytes_total", text, direction="out")
        self._message_size = series.histogram("message_size_bytes", "Size of accepted messages.", _OCTETS)
        self.accepted: Callable[[int], None] = self._message_size.observe
        """Count an accepted message of so many octets."""

    def _bind_records(self, series: Series, task_types: Sequence[str]) -> None:
        self._records: dict[str, Number] = {}
        self._records_folded: dict[str, Number] = {}
        self.add_task_types((*task_types, OTHER_TASK_TYPE))
        self._recorded: list[str] = []
        self.row_recorded: Callable[[str], None] = self._recorded.append
        """Count the row of an accepted message; a type that the configuration does not name is `other`.

        It may name one in another case, as limits do, for which that is the same.
        """
        self._commit_seconds = series.histogram(
            "record_commit_seconds", "Time for one commit of rows to the store.", DURATIONS
        )
        self._batch_rows = series.histogram("record_batch_rows", "Rows that shared one commit.", _ROWS)
        self._records_pending = series.gauge("records_pending", "Rows waiting for their commit now.")
        self._records_spooled = series.gauge(
            "records_spooled", "Rows in the spool now, waiting for the store."
        )
        self._records_reserve = series.gauge(
            "records_reserve_bytes", "Disk space taken ahead for rows, in the spool, and free."
        )
        self._record_errors = series.counter(
            "record_errors_total", "Attempts to keep rows in the store or the spool that failed."
        )

    def _bind_expiry(self, series: Series) -> None:
        self._expired_rows = series.counter("expired_rows_total", "Rows deleted because they had expired.")
        self._expiry_last_run = series.gauge(
            "expiry_last_run_timestamp_seconds", "When the last expiry run finished, Unix time."
        )
        self._expiry_duration = series.gauge("expiry_duration_seconds", "Time the last expiry run took.")
        self._expiry_lag = series.gauge(
            "expiry_lag_seconds", "For how long the oldest expired row that is still there has been due."
        )

    # What a changed configuration names has series from then on; what it names no more keeps its own.

    def add_listeners(self, listeners: Iterable[str]) -> None:
        """Make the series of these listeners, where there are none."""
        text = "Client sessions begun."
        for listener in listeners:
            self._sessions_total[listener] = self._series.unknown(
                "client_sessions_total", text, listener=listener
            )

    def add_task_types(self, task_types: Iterable[str]) -> None:
        """Make the series of these task types, where there are none."""
        text = "Rows made for accepted messages."
        for name in task_types:
            self._records[name] = self._series.counter("records_total", text, task_type=name)
            self._records_folded.setdefault(fold(name), self._records[name])

    def add_limits(self, limits: Iterable[tuple[str, str]]) -> None:
        """Make the series of these limits, by name and action, where there are none."""
        text = "Messages and recipients for which a rate limit had no room."
        for limit, action in limits:
            if (limit, action) not in self._limits:
                series = self._series.counter("limit_hits_total", text, limit=limit, action=action)
                self._limits[limit, action] = series

    def limit_hit(self, limit: str, action: str) -> None:
        """Count a message or a recipient for which a limit had no room."""
        self._limits[limit, action].value += 1

    def config_read(self, at: float | None) -> None:
        """Set when (Unix time, seconds) the configuration in force was read; None: what was read is not."""
        self._reload_ok.value = int(at is not None)
        if at is not None:
            self._reload_at.value = at

    def session_opened(self, listener: str) -> None:
        """Count a client session that begins on the configured `listener`."""
        self._sessions.value += 1
        self._sessions_total[listener].value += 1

    def session_closed(self) -> None:
        """Count a client session that ended."""
        self._sessions.value -= 1

    def rejected(self, reason: str) -> None:
        """Count a refusal of the relay's own; `reason` is one of REJECT_REASONS."""
        self._rejects[reason].value += 1

    def auth(self, outcome: str) -> None:
        """Count an AUTH command of a client; `outcome` is one of AUTH_OUTCOMES."""
        self._auth[outcome].value += 1

    def certificate(self, not_after: float | None) -> None:
        """Show when the listeners' certificate expires, in seconds since 1970; none, no series."""
        name = "certificate_expiry_timestamp_seconds"
        if not_after is None:
            self._series.remove(name)
            return
        text = "When the certificate that listeners show expires, in seconds since 1970."
        self._series.gauge(name, text).value = not_after

    def committed(self, rows: int, seconds: float) -> None:
        """Observe one commit to the store: how many rows shared it and how long it took."""
        self._batch_rows.observe(rows)
        self._commit_seconds.observe(seconds)

    def record_error(self) -> None:
        """Count a failed attempt to keep rows."""
        self._record_errors.value += 1

    def records_pending(self, rows: int) -> None:
        """Set how many rows wait for their commit."""
        self._records_pending.value = rows

    def records_spooled(self, rows: int) -> None:
        """Set how many rows are in the spool."""
        self._records_spooled.value = rows

    def records_reserve(self, octets: int) -> None:
        """Set how much disk space is taken ahead for rows and free."""
        self._records_reserve.value = octets

    def expired(self, rows: int) -> None:
        """Count rows that expiry deleted."""
        self._expired_rows.value += rows

    def expiry_run(self, finished_at: float, seconds: float) -> None:
        """Set when the last expiry run finished (Unix time, seconds) and how long it took."""
        self._expiry_last_run.value = finished_at
        self._expiry_duration.value = seconds

    def expiry_lag(self, seconds: float) -> None:
        """Set for how long the oldest expired row that is still there is due; 0 when there is none."""
        self._expiry_lag.value = seconds

    def settle(self) -> None:
        """Count what was only noted so far; to be called once a second."""
        self._octets_in.value += sum(upstream.settle() for upstream in self.upstreams.values())
        self._series.settle()
        self._octets_out.value = self._message_size.sum  # what was accepted is what has its size observed
        recorded = Counter(self._recorded)
        self._recorded.clear()
        for task_type, rows in recorded.items():
            series = self._records.get(task_type) or self._records_folded.get(fold(task_type))
            (series or self._records[OTHER_TASK_TYPE]).value += rows

    # For the relay's own page, which has no Prometheus to ask

    def counts(self) -> dict[str, Counts]:
        """Return where the counters of each upstream stand."""
        self.settle()
        return {name: upstream.counts() for name, upstream in self.upstreams.items()}

    def gauges(self) -> Gauges:
        """Return what stands now."""
        return Gauges(
            sessions=int(self._sessions.value),
            connections={
                name: upstream.open for name, upstream in self.upstreams.items() if name != NO_UPSTREAM
            },
            pending=int(self._records_pending.value),
            spooled=int(self._records_spooled.value),
            reserve=int(self._records_reserve.value),
            record_errors=int(self._record_errors.value),
            expiry_at=self._expiry_last_run.value,
            expiry_lag=self._expiry_lag.value,
            expired_rows=int(self._expired_rows.value),
        )

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
        "_drained",
        "_failovers",
        "_finished",
        "_messages",
        "_recipients",
        "_replies",
        "_transaction_seconds",
        "_up",
        "_wait_seconds",
        "_waits",
        "finished",
        "replied",
        "waited",
    )

    def __init__(self, name: str, transactions: Series, connections: Series) -> None:
        self._finished: list[Finished] = []
        self.finished: Callable[[Finished], None] = self._finished.append
        """Count one finished transaction."""
        text = "Finished transactions by outcome."
        self._messages = {
            outcome: transactions.counter("messages_total", text, upstream=name, outcome=outcome.value)
            for outcome in Outcome
        }
        text = "Recipients of finished transactions by outcome."
        self._recipients = {
            outcome: transactions.counter("recipients_total", text, upstream=name, outcome=outcome.value)
            for outcome in Outcome
        }
        self._transaction_seconds = transactions.histogram(
            "transaction_seconds", "Time from MAIL to the outcome.", DURATIONS, upstream=name
        )
        text = "Time that finished transactions spent waiting, by what they waited for."
        self._waits = tuple(
            transactions.counter("transaction_wait_seconds_total", text, upstream=name, waited_for=whom)
            for whom in WAITED_FOR
        )
        text = "Time from a command's way up to the upstream's reply."
        self._replies = {
            command: connections.histogram(
                "upstream_reply_seconds", text, DURATIONS, upstream=name, command=command
            )
            for command in REPLY_COMMANDS
        }
        self.replied: Mapping[str, Callable[[float], None]] = {
            command: histogram.observe for command, histogram in self._replies.items()
        }
        """Observe how long the upstream took to answer; for each of REPLY_COMMANDS."""
        self._connections = tuple(
            connections.gauge("upstream_connections", "Upstream connections now.", upstream=name, state=state)
            for state in _CONNECTION_STATES
        )
        text = "Attempts to connect by outcome."
        self._connects = {
            outcome: connections.counter("upstream_connects_total", text, upstream=name, outcome=outcome)
            for outcome in CONNECT_OUTCOMES
        }
        self._up = connections.gauge("upstream_up", "1 if the upstream can be used, 0 if not.", upstream=name)
        self._drained = connections.gauge(
            "upstream_drained", "1 if the upstream gets no new messages, 0 if it does.", upstream=name
        )
        self._failovers = connections.counter(
            "upstream_failovers_total", "Messages that went on from here to another upstream.", upstream=name
        )
        text = "Time that transactions waited for an upstream connection."
        self._wait_seconds = connections.histogram("upstream_wait_seconds", text, DURATIONS, upstream=name)
        self.waited: Callable[[float], None] = self._wait_seconds.observe
        """Observe how long a transaction waited for a connection."""

    def recipient(self, outcome: Outcome) -> None:
        """Count a recipient of a finished transaction that does not share its outcome."""
        self._recipients[outcome].value += 1

    def settle(self) -> int:
        """Count the transactions that were only noted so far; return how many octets of content came."""
        if not self._finished:
            return 0
        outcomes, recipients, totals, connection, upstream, record, octets = zip(*self._finished, strict=True)
        self._finished.clear()
        for (outcome, alike), times in Counter(zip(outcomes, recipients, strict=True)).items():
            self._messages[outcome].value += times
            self._recipients[outcome].value += times * alike
        self._transaction_seconds.count(sorted(totals))
        # What is left of the time is the client's; that is no less than nothing, whatever rounding says.
        waited = map(sum, zip(connection, upstream, record, strict=True))
        of_clients = filter((0.0).__lt__, map(sub, totals, waited))
        for counter, seconds in zip(self._waits, (of_clients, connection, upstream, record), strict=True):
            counter.value += sum(seconds)
        return sum(octets)

    def connected(self, outcome: str) -> None:
        """Count an attempt to connect; `outcome` is one of CONNECT_OUTCOMES."""
        self._connects[outcome].value += 1

    def connections(self, idle: int, active: int, connecting: int) -> None:
        """Set how many connections there are in each state."""
        gauges = self._connections
        gauges[0].value = idle
        gauges[1].value = active
        gauges[2].value = connecting

    @property
    def open(self) -> tuple[int, int, int]:
        """Connections: idle, active, connecting."""
        idle, active, connecting = (int(gauge.value) for gauge in self._connections)
        return idle, active, connecting

    def counts(self) -> Counts:
        """Return where the counters stand; `settle` first."""
        outcomes = tuple(int(self._messages[outcome].value) for outcome in Outcome)
        return Counts(outcomes, self._replies["end_of_data"].counts)

    def up(self, value: bool) -> None:
        """Set whether the upstream can be used."""
        self._up.value = value

    def drained(self, value: bool) -> None:
        """Set whether the upstream is left without new messages."""
        self._drained.value = value

    def failed_over(self) -> None:
        """Count a message that could not go here and went on to another upstream."""
        self._failovers.value += 1


def _nothing() -> None:
    """What is in no scrape has nothing to settle before it."""
