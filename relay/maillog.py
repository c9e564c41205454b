"""The mail log: one function for each event of the relay, plain values in, one line out.

Rules: a line is always exactly one line of printable characters, whatever clients, upstreams and errors put
into the values; octets that are no UTF-8 and characters that do not print come out as backslash escapes, in
JSON and on the console alike. Values are bounded. Secrets do not get in: passwords are cut out of URLs, and
settings that are secret by their name are hidden. Logging never raises: a log that cannot be written must
not turn accepted mail into an error. The libraries that write clients' octets raw are silenced, the others
come out here. Lines keep their order; those of one turn of the event loop are written together, but an error
is written at once, with all that waits before it.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final, Required, TypedDict
from uuid import UUID

import orjson
import structlog

from relay.outcome import Outcome
from relay.records.model import Doubt, Entry, Record

__all__ = [
    "Facts",
    "certificate_read",
    "certificate_refused",
    "configure",
    "draining",
    "expiry_behind",
    "expiry_done",
    "expiry_failed",
    "expiry_progress",
    "failover",
    "found_in_journal",
    "hurrying",
    "in_doubt",
    "limit_hit",
    "limits_counted_again",
    "limits_not_counted",
    "listening",
    "login",
    "login_refused",
    "reload_ignored",
    "reload_refused",
    "reload_takes_restart",
    "reloaded",
    "retention_changed",
    "retention_differs",
    "retention_shortened",
    "row_lost",
    "session_refused",
    "settings",
    "started",
    "stopped",
    "transaction",
    "unforeseen",
    "upstream_connected",
    "upstream_down",
    "upstream_drained",
    "upstream_failed",
    "upstream_retired",
    "upstream_up",
    "user_not_checked",
    "users_not_read",
    "users_read",
    "warning",
    "xforward_refused",
]

Wire = str | bytes
"""Text as it came: it may hold any octet or character."""

MAX_TEXT: Final = 1024
"""Characters of one value in a line."""
MAX_TRACEBACK: Final = 8192
"""Characters of one traceback; its end says most, so that is what stays."""
MAX_ITEMS: Final = 20
"""Members of one list in a line; recipients have their count beside it."""
MAX_WAITING: Final = 64 * 1024
"""Octets of lines that may wait for the end of the event loop's turn."""

# Silenced with their children: aiosmtpd ("mail.log") writes client octets raw and, after a refused AUTH,
# the credentials that follow; aiosmtplib the same for its upstream's.
_SILENCED: Final = ("mail", "aiosmtplib")

_LEVEL_OF: Final = {
    Outcome.ACCEPTED: "info",
    Outcome.REJECTED: "info",
    Outcome.DEFERRED: "info",
    Outcome.REFUSED: "info",
    Outcome.ABORTED: "info",
    Outcome.UNAVAILABLE: "warning",
    Outcome.IN_DOUBT: "error",
}

_SECRET_KEY: Final = re.compile(r"(?:\A|_)(?:password|secret|token|api_key)\Z", re.IGNORECASE)
_URL_PASSWORD: Final = re.compile(r"(?<=://)([^\s/@:]{0,256}):\S{0,256}@")
_HIDDEN: Final = "(hidden)"


# ---------------------------------------------------------------------------------------------- life


def started(
    version: str, listeners: Sequence[str], upstreams: Sequence[str], store: str, http: str | None
) -> None:
    """The relay runs: its addresses, its upstreams by name and address, the store's URL."""
    _current.log.info(
        "started", version=version, listeners=listeners, upstreams=upstreams, store=store, http=http
    )


def listening(address: str) -> None:
    """One listener (or the HTTP side) is bound to `address`."""
    _current.log.info("listening", address=address)


def draining(sessions: int, timeout_s: float) -> None:
    """No new sessions; those that are open have `timeout_s` seconds to finish."""
    _current.log.info("draining", sessions=sessions, timeout_s=timeout_s)


def hurrying() -> None:
    """The drain ends now; what the upstream has not answered yet is in doubt."""
    _current.log.warning("hurrying")


def stopped() -> None:
    """The relay has ended in order."""
    _current.log.info("stopped")
    _current.output.flush()


def settings(effective: Mapping[str, Any]) -> None:
    """The settings in force, secrets hidden."""
    _current.log.info(
        "settings", **{section: _without_secrets(value) for section, value in effective.items()}
    )


def reloaded(changed: Sequence[str]) -> None:
    """The configuration was read again and is in force; `changed` are the names of the keys that did."""
    _current.log.info("reloaded", changed=changed)


def reload_takes_restart(keys: Sequence[str]) -> None:
    """These keys have changed, and the values that the relay was started with stay in force."""
    _current.log.warning("reload: takes a restart", keys=keys)


def reload_refused(reason: str) -> None:
    """The configuration was read again and cannot be used; nothing has changed. One line for each mistake."""
    _current.log.error("reload refused", reason=reason)


def reload_ignored(reason: str) -> None:
    """The configuration was not read again."""
    _current.log.warning("reload ignored", reason=reason)


def warning(text: str) -> None:
    """Something that the operator should know and that has no event of its own."""
    _current.log.warning("warning", text=text)


def unforeseen(where: str, task_id: UUID | str | None, error: BaseException) -> None:
    """An error that nobody foresaw, with its traceback; `where` names the step that it ended."""
    _current.log.error(
        "unforeseen", where=where, task_id=task_id, error=_error(error), traceback=_traceback(error)
    )


# ---------------------------------------------------------------------------------- sessions and mail


def session_refused(peer: str, listener: str, reason: str, detail: str | None = None) -> None:
    """A client was turned away, or its session was ended."""
    _current.log.info("session refused", peer=peer, listener=listener, reason=reason, detail=detail)


def login(user: str, client: str, listener: str) -> None:
    """A client has logged in."""
    _current.log.info("login", user=user, client=client, listener=listener)


def login_refused(outcome: str, user: str, client: str, listener: str, reply: Wire) -> None:
    """A client could not log in; `user` is whom it said to be."""
    _current.log.warning(
        "login refused", outcome=outcome, user=user, client=client, listener=listener, reply=reply
    )


def certificate_read(not_after: str) -> None:
    """The listeners' certificate was read again."""
    _current.log.info("certificate read", not_after=not_after)


def certificate_refused(reason: str) -> None:
    """The listeners' new certificate cannot be used; the one before stays in use."""
    _current.log.error("certificate refused", reason=reason)


class Refusal(TypedDict):
    """A recipient that the upstream did not take, and its reply."""

    recipient: Wire
    reply: Wire


class Facts(TypedDict, total=False):
    """What is known of a message, in the order of its line; what is not known is left out.

    `recipients` are those that the upstream accepted, `refused` the others; `reply` is the upstream's last
    word, `client_reply` what the client was told. Times in seconds: waiting for a connection, from the end of
    data to the upstream's reply, making the row durable, and from MAIL to now.
    """

    outcome: Outcome | None
    task_id: Required[UUID | str]
    client: Required[str]
    listener: Required[str]
    sender: Required[Wire]
    recipients: Required[Sequence[Wire]]
    recipient_count: Required[int]
    refused: Sequence[Refusal]
    refused_count: int
    task_type: str
    message_id: Wire
    size: int
    upstream: str
    reply: Wire
    client_reply: Wire
    wait_s: float
    upstream_s: float
    commit_s: float
    total_s: float
    client_gone: bool


def transaction(outcome: Outcome, facts: Facts) -> None:
    """The one line of a message, made of its facts."""
    _bound(facts)
    level, write = _current.direct[outcome]
    if write is not None and (line := _plain_line(level, facts)) is not None:
        write(line)
    else:
        getattr(_current.log, level)("message", fields=facts)


def in_doubt(reason: str, facts: Facts) -> None:
    """The verdict on a message is overdue: it is still awaited, and the message's line comes with it."""
    _bound(facts)
    _current.log.warning("in doubt", fields={**facts, "reason": reason, "awaited": True})


def _bound(facts: Facts) -> None:
    facts["recipients"] = facts["recipients"][:MAX_ITEMS]
    if "refused" in facts:
        facts["refused"] = facts["refused"][:MAX_ITEMS]


def found_in_journal(doubt: Doubt) -> None:
    """A message was under way when the relay was killed: it is in doubt, unless it has its row."""
    fields = {
        "task_id": doubt.task_id,
        "client": doubt.client,
        "sender": doubt.sender,
        "recipients": doubt.recipients[:MAX_ITEMS],
        "recipient_count": doubt.data.get("recipient_count", len(doubt.recipients)),
        "task_type": doubt.task_type,
        "message_id": doubt.message_id,
        "size": doubt.size,
        "upstream": doubt.upstream,
        "since": doubt.since.isoformat(),
        "reason": doubt.reason,
        "awaited": False,
    }
    _current.log.warning("in doubt", fields=fields)


# ---------------------------------------------------------------------------------------------- users


def users_read(file: str, users: int) -> None:
    """The file of users has changed: it has `users` of them, and they are in force."""
    _current.log.info("users read", file=file, users=users)


def users_not_read(file: str, reasons: Sequence[str]) -> None:
    """The file of users has changed and cannot be used; the users that were stay in force."""
    _current.log.error("users not read", file=file, reasons=reasons)


def user_not_checked(file: str, user: str, reason: str) -> None:
    """A password could not be held against the user's hash."""
    _current.log.error("user not checked", file=file, user=user, reason=reason)


# ------------------------------------------------------------------------------------------ upstreams


def upstream_connected(name: str, address: str, reason: Wire) -> None:
    """A connection to an upstream is ready; `reason` says what it took (TLS version, identity)."""
    _current.log.debug("upstream connected", upstream=name, address=address, reason=reason)


def upstream_failed(name: str, address: str, reason: Wire) -> None:
    """An upstream could not be connected to."""
    _current.log.warning("upstream failed", upstream=name, address=address, reason=reason)


def upstream_down(name: str, address: str, reason: Wire, pause_s: float) -> None:
    """An upstream has failed too often: messages do not go there, the next try is in `pause_s` seconds."""
    _current.log.error(
        "upstream down", upstream=name, address=address, reason=reason, pause_s=round(pause_s, 1)
    )


def upstream_up(name: str, address: str) -> None:
    """An upstream that was down can be connected to again."""
    _current.log.info("upstream up", upstream=name, address=address)


def upstream_drained(name: str, address: str) -> None:
    """No transaction is left on an upstream that gets no new ones."""
    _current.log.info("upstream drained", upstream=name, address=address)


def failover(task_id: UUID | str, name: str, to: str, reason: Wire) -> None:
    """A message goes on to another upstream: the one that was tried has not answered MAIL."""
    _current.log.warning("failover", task_id=task_id, upstream=name, to=to, reason=reason)


def xforward_refused(name: str, address: str, reason: Wire) -> None:
    """An upstream that offers XFORWARD did not take it; mail goes on without, on that connection."""
    _current.log.warning("xforward refused", upstream=name, address=address, reason=reason)


def upstream_retired(name: str, address: str, reason: Wire) -> None:
    """A connection to an upstream was closed instead of kept."""
    _current.log.debug("upstream retired", upstream=name, address=address, reason=reason)


# -------------------------------------------------------------------------------------------- records


def limit_hit(
    task_id: UUID,
    *,
    limit: str,
    action: str,
    key: str,
    used: int,
    maximum: int,
    unit: str,
    window_s: float,
) -> None:
    """A rate limit was reached for `key`; `action` is what that meant for the message, or for a recipient."""
    _current.log.info(
        "limit hit",
        task_id=str(task_id),
        limit=limit,
        action=action,
        key=key,
        used=used,
        maximum=maximum,
        unit=unit,
        window_s=window_s,
    )


def limits_not_counted(reason: str) -> None:
    """The store cannot be asked for what was sent: limits go by what the relay knows, or defer."""
    _current.log.warning("limits not counted", reason=reason)


def limits_counted_again() -> None:
    """The store answers again."""
    _current.log.warning("limits counted again")


def row_lost(entry: Entry, reason: str) -> None:
    """Neither the store nor the spool could keep this entry: it is here, whole, and nowhere else."""
    kind = "record" if isinstance(entry, Record) else "doubt" if isinstance(entry, Doubt) else "settled"
    _current.log.error("row lost", task_id=entry.task_id, kind=kind, reason=reason, row=_row(entry))


def expiry_done(rows: int, seconds: float) -> None:
    """An expiry run has deleted `rows`."""
    _current.log.info("expiry done", rows=rows, seconds=seconds)


def expiry_progress(rows: int, seconds: float, lag_s: float) -> None:
    """A long expiry run has deleted `rows` so far; the oldest row left is due for `lag_s` seconds."""
    _current.log.info("expiry progress", **_progress(rows, seconds, lag_s))


def expiry_behind(rows: int, seconds: float, lag_s: float) -> None:
    """An expiry run takes longer than the interval between two: rows may expire faster than they go."""
    _current.log.warning("expiry behind", **_progress(rows, seconds, lag_s))


def _progress(rows: int, seconds: float, lag_s: float) -> dict[str, float]:
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / max(seconds, 0.001), 1),
        "lag_s": round(lag_s, 1),
    }


def expiry_failed(reason: str) -> None:
    """An expiry run failed; the next one comes at its time."""
    _current.log.error("expiry failed", reason=reason)


def retention_changed(rows: int) -> None:
    """The retention settings changed; `rows` rows follow them now."""
    _current.log.info("retention changed", rows=rows)


def retention_shortened(rows: int) -> None:
    """The retention settings became shorter: the next expiry run will delete `rows` rows for it."""
    _current.log.warning("retention shortened", rows=rows)


def retention_differs(relays: list[str]) -> None:
    """Other relays on the store keep rows longer: so does this one, as long as they say so."""
    _current.log.warning("retention differs, the longer holds", relays=relays)


# ------------------------------------------------------------------------------------------- the line


class _Output:
    """Writes whole lines to a binary stream, standard output when None, in their order, and never raises.

    A line waits until the event loop's turn is over, if one runs in this thread, so that all lines of a turn
    cost one system call; without a loop it is written at once. Errors do not wait, nor does more than
    MAX_WAITING. Lines that could not be written are counted, and a line tells their number once lines can be.
    """

    def __init__(self, stream: BinaryIO | None) -> None:
        self._stream = stream
        self._lost = 0
        self._waiting: list[bytes] = []
        self._size = 0
        self._due: asyncio.AbstractEventLoop | None = None  # will flush; one that was closed never does
        self._thread = 0  # in which it runs
        # Libraries log in threads of their own, and in finalizers, which may run in the midst of a flush.
        self._lock = threading.RLock()

    def line(self, line: bytes) -> None:
        with self._lock:
            self._waiting.append(line + b"\n")
            self._size += len(line)
            due = self._due
            if due is not None and self._thread == threading.get_ident() and due.is_running():
                # The loop is known; to ask for it costs a system call (CPython 3.11).
                if self._size >= MAX_WAITING:
                    self.flush()
                return
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                self.flush()
                return
            if self._size >= MAX_WAITING:
                self.flush()
            elif self._due is not loop:
                self._due, self._thread = loop, threading.get_ident()
                loop.call_soon(self.flush)

    def line_at_once(self, line: bytes) -> None:
        with self._lock:
            self._waiting.append(line + b"\n")
            self.flush()

    debug = info = warning = line
    error = critical = line_at_once

    def flush(self) -> None:
        """Write the lines that wait."""
        with self._lock:
            self._due, self._size = None, 0
            # The new list first: between taking the lines and clearing them no finalizer may run.
            self._waiting, lines = [], self._waiting
            if not lines:
                return
            stream = self._stream or sys.stdout.buffer
            try:
                stream.write(b"".join(lines))
                stream.flush()
            except (OSError, ValueError):  # a broken pipe, a full disk; ValueError: the stream is closed
                self._lost += len(lines)
                return
            if self._lost:
                lost, self._lost = self._lost, 0
                _current.log.error("log lines lost", lines=lost)


def _plain_line(level: str, facts: Facts) -> bytes | None:
    """Return the JSON line of a message whose values need no cleaning, None if one might.

    One look at the whole line instead of one at each value: if it is ASCII without an escape, a DEL and a
    URL, so is each value, and none is longer than all.
    """
    line = {"time": datetime.now(UTC), "level": level, "event": "message", **facts}
    try:
        # As round(value, 6), in a fifth of its time.
        line["wait_s"] = round(facts["wait_s"] * 1e6) / 1e6
        line["upstream_s"] = round(facts["upstream_s"] * 1e6) / 1e6
        line["commit_s"] = round(facts["commit_s"] * 1e6) / 1e6
        line["total_s"] = round(facts["total_s"] * 1e6) / 1e6
        found = orjson.dumps(line, bytes.decode, orjson.OPT_UTC_Z)
    except (TypeError, ValueError, OverflowError):  # no UTF-8, a lone surrogate, a number that is none
        return None
    if len(found) > MAX_TEXT or not found.isascii() or b"\\" in found or b"\x7f" in found:
        return None
    return None if b"/" in found and b"://" in found else found  # a slash is found sooner


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _cleaned(_logger: Any, level: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Give a line its time and level, first, and every value its printable form."""
    line: dict[str, Any] = {
        "time": datetime.now(UTC),
        "level": level,
        "event": _printable(fields.pop("event")),
    }
    for key, value in fields.pop("fields", fields).items():
        if value is None:
            continue
        kind = value.__class__
        if kind is str:
            plain = value.isprintable() and len(value) <= MAX_TEXT and "://" not in value
            line[key] = value if plain else _printable(value)
        elif kind is float:
            line[key] = round(value, 6)  # seconds; no clock here means more digits
        elif kind is int or kind is bool:
            line[key] = value
        else:
            line[key] = _plain(value)
    return line


def _json(_logger: Any, _level: str, line: MutableMapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(line, option=orjson.OPT_UTC_Z)
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(line, default=_json_text).encode()


class _Console:
    """Lines for people; coloured on a terminal."""

    def __init__(self, *, colors: bool) -> None:
        self._render = structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False, pad_event_to=0)

    def __call__(self, logger: Any, level: str, line: MutableMapping[str, Any]) -> bytes:
        line["timestamp"] = line.pop("time").strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return self._render(logger, level, line).encode("utf-8", "backslashreplace")


class _Verbatim(str):
    """Text that is printable already and keeps its length."""

    __slots__ = ()


def _plain(value: Any) -> Any:
    """Return a value made of JSON's types only, its texts printable and bounded, its lists too."""
    if value is None or isinstance(value, _Verbatim | bool | int | float):
        return value
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value[:MAX_ITEMS]]
        return items if len(value) <= MAX_ITEMS else [*items, f"... ({len(value)} in all)"]
    if isinstance(value, Mapping):
        return {_printable(str(key)): _plain(item) for key, item in value.items()}
    return _printable(_text(value))


def _printable(text: str) -> str:
    """Escape what does not print (controls, line separators, bidirectional marks), and bound the length."""
    if len(text) <= MAX_TEXT and text.isprintable() and "://" not in text:
        return text
    cut = text[: 2 * MAX_TEXT]
    if "://" in cut:  # before the cut, which might fall between a password and its "@"
        cut = _URL_PASSWORD.sub(r"\1:***@", cut)
    if not cut.isprintable():
        cut = "".join(map(_escaped, cut[:MAX_TEXT]))
    if len(cut) > MAX_TEXT or len(text) > MAX_TEXT:
        cut = f"{cut[:MAX_TEXT]}... ({len(text)} characters)"
    return cut


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def _error(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error)).strip()[-MAX_TRACEBACK:]
    return _Verbatim("".join(map(_escaped, _URL_PASSWORD.sub(r"\1:***@", text)))[-MAX_TRACEBACK:])


def _row(entry: Entry) -> str:
    """Return the whole row as one JSON object in printable ASCII: nothing may be lost here."""
    # `ensure_ascii` escapes everything that is not ASCII, and every control character but DEL.
    return _Verbatim(json.dumps(dataclasses.asdict(entry), default=_json_text).replace("\x7f", "\\u007f"))


def _json_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _without_secrets(value: Any, key: str = "") -> Any:
    if value is not None and _SECRET_KEY.search(key):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {name: _without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return value


# -------------------------------------------------------------------------------------- configuration


class _Bridge(logging.Handler):
    """Brings what libraries say through the standard library's logging into the mail log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit the format
            text = str(record.msg)
        error = record.exc_info[1] if record.exc_info else None
        found = None if error is None else _traceback(error)
        level = next(name for least, name in _STANDARD_LEVELS if record.levelno >= least)
        getattr(_current.log, level)(text, logger=record.name, traceback=found)


_LEVELS: Final = ("debug", "info", "warning", "error", "critical")

# Any number is a level there, the ones between the names too.
_STANDARD_LEVELS: Final = (
    (logging.CRITICAL, "critical"),
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
    (logging.NOTSET, "debug"),
)


class _Current:
    """Where lines go now; `configure` replaces it."""

    output: _Output
    log: structlog.typing.FilteringBoundLogger
    direct: Mapping[Outcome, tuple[str, Callable[[bytes], None] | None]]
    """The level of a message's line, and what writes it without a logger, if it is to be JSON."""


_current: Final = _Current()


def _use(render: Any, level: str, stream: BinaryIO | None) -> None:
    _current.output = _Output(stream)
    # Bound once and kept: a line then costs no look-up of structlog's configuration.
    _current.log = structlog.wrap_logger(
        _current.output,
        processors=[_cleaned, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
    ).bind()
    written = _LEVELS[_LEVELS.index(level) :] if render is _json else ()
    _current.direct = {
        outcome: (of_it, getattr(_current.output, of_it) if of_it in written else None)
        for outcome, of_it in _LEVEL_OF.items()
    }


def _flush() -> None:
    _current.output.flush()


_use(_json, "info", None)
atexit.register(_flush)


def configure(format: str, level: str, stream: BinaryIO | None = None) -> None:  # noqa: A002
    """Set how lines look and which are written; may be called again.

    `format` is "json" (one object a line) or "console" (lines for people, coloured on a terminal); `level`
    one of debug, info, warning, error, critical. `stream` takes the lines' octets, by default standard
    output. The standard library's logging comes out here too, from warnings up.
    """
    render = _json if format == "json" else _Console(colors=(stream or sys.stdout).isatty())
    _current.output.flush()
    _use(render, level, stream)
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    if not any(isinstance(handler, _Bridge) for handler in root.handlers):
        root.addHandler(_Bridge())
    for name in _SILENCED:
        silenced = logging.getLogger(name)
        silenced.propagate = False
        silenced.setLevel(logging.CRITICAL + 1)
        silenced.handlers = [logging.NullHandler()]
