"""The mail log: each event one line, whatever stands in its values."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import maillog
from relay.maillog import destination
from relay.maillog.output import MAX_WAITING
from relay.maillog.values import MAX_ITEMS, MAX_TEXT, MAX_TRACEBACK
from relay.outcome import Outcome
from relay.records.model import Doubt, Record, Settled

TASK_ID = UUID("01930000-0000-7000-8000-000000000001")

# What ends a line for some reader, or moves a terminal: C0, DEL, C1, the Unicode separators, bidi marks.
UNWANTED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\ufeff]")
NASTY = 'a\r\n{"event":"forged"}\x00\x1b[31m\x7f\x85\x9b\u2028\u2029\u202e\ufeffz'


class Log:
    """The lines that were written."""

    def __init__(self) -> None:
        self.stream = io.BytesIO()

    def lines(self) -> list[str]:
        text = self.stream.getvalue().decode("utf-8")
        assert text.endswith("\n") or not text
        return text.split("\n")[:-1]

    def json(self) -> dict[str, Any]:
        (line,) = self.lines()
        entry = json.loads(line)
        assert isinstance(entry, dict)
        return entry


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    maillog.configure("json", "info")


@pytest.fixture
def log() -> Log:
    log = Log()
    maillog.configure("json", "debug", log.stream)
    return log


def facts(**changed: Any) -> Any:
    """Return the facts of a message, in the order of its line; a change to None leaves one out."""
    fields: dict[str, Any] = {
        "outcome": Outcome.ACCEPTED,
        "task_id": TASK_ID,
        "client": "127.0.0.1",
        "listener": "127.0.0.1:2525",
        "sender": b"app@example.com",
        "recipients": [b"one@example.org", b"two@example.org"],
        "recipient_count": 2,
        "refused": [{"recipient": b"bad@example.org", "reply": b"550 5.1.1 unknown"}],
        "refused_count": 1,
        "task_type": "mention",
        "message_id": "<1@example.com>",
        "size": 4123,
        "upstream": "primary",
        "reply": b"250 2.0.0 Ok: queued as 4F12",
        "client_reply": b"250 2.0.0 Ok: queued as 4F12",
        "wait_s": 0.0000123456,
        "upstream_s": 0.25,
        "commit_s": 0.001,
        "total_s": 0.3,
        "client_gone": None,
    }
    return {name: value for name, value in (fields | changed).items() if value is not None}


def say_transaction(outcome: Outcome = Outcome.ACCEPTED, **changed: Any) -> None:
    maillog.transaction(outcome, facts(**changed, outcome=outcome))


def record(**changed: Any) -> Record:
    fields: dict[str, Any] = {
        "task_id": TASK_ID,
        "task_type": "mention",
        "sender": "app@example.com",
        "client": "127.0.0.1",
        "sent_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "upstream": "primary",
        "upstream_reply": "250 2.0.0 Ok",
        "size": 10,
        "duration_ms": 20,
        "recipients": ("one@example.org",),
    }
    return Record(**{**fields, **changed})


def doubt(**changed: Any) -> Doubt:
    fields: dict[str, Any] = {
        "task_id": TASK_ID,
        "task_type": "mention",
        "sender": "app@example.com",
        "client": "127.0.0.1",
        "since": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "upstream": "primary",
        "reason": "lost",
        "size": 10,
        "duration_ms": 20,
        "recipients": ("one@example.org",),
    }
    return Doubt(**{**fields, **changed})


EVENTS: dict[str, Callable[[Any], None]] = {
    "started": lambda text: maillog.started(text, [text], [text], text, text, compiled=True),
    "listening": maillog.listening,
    "draining": lambda _: maillog.draining(3, 30.0),
    "hurrying": lambda _: maillog.hurrying(),
    "stopped": lambda _: maillog.stopped(),
    "reloaded": lambda text: maillog.reloaded([text]),
    "reload_takes_restart": lambda text: maillog.reload_takes_restart([text]),
    "reload_refused": maillog.reload_refused,
    "reload_ignored": maillog.reload_ignored,
    "settings": lambda text: maillog.settings({"log": {"level": text, text: [text]}}),
    "warning": maillog.warning,
    "unforeseen": lambda text: maillog.unforeseen(text, TASK_ID, RuntimeError(text)),
    "session_refused": lambda text: maillog.session_refused(text, text, text),
    "transaction": lambda text: say_transaction(
        sender=text,
        recipients=[text] * 3,
        refused=[{"recipient": text, "reply": text}],
        message_id=text,
        reply=text,
        task_type=text,
    ),
    "upstream_connected": lambda text: maillog.upstream_connected(text, text, text),
    "upstream_failed": lambda text: maillog.upstream_failed(text, text, text),
    "upstream_full": lambda text: maillog.upstream_full(text, text, text, 3, 20),
    "upstream_down": lambda text: maillog.upstream_down(text, text, text, 0.5),
    "upstream_up": lambda text: maillog.upstream_up(text, text),
    "upstream_drained": lambda text: maillog.upstream_drained(text, text),
    "failover": lambda text: maillog.failover(TASK_ID, text, text, text),
    "upstream_retired": lambda text: maillog.upstream_retired(text, text, text),
    "login": lambda text: maillog.login(text, text, text),
    "login_refused": lambda text: maillog.login_refused(text, text, text, text, text),
    "certificate_read": maillog.certificate_read,
    "certificate_refused": maillog.certificate_refused,
    "users_read": lambda text: maillog.users_read(text, 8),
    "users_not_read": lambda text: maillog.users_not_read(text, [text]),
    "user_not_checked": lambda text: maillog.user_not_checked(text, text, text),
    "xforward_refused": lambda text: maillog.xforward_refused(text, text, text),
    "in_doubt": lambda text: maillog.in_doubt(
        text, facts(sender=text.encode(), recipients=[text.encode()], client_reply=text)
    ),
    "found_in_journal": lambda text: maillog.found_in_journal(doubt(sender=text, recipients=(text,))),
    "row_lost": lambda text: maillog.row_lost(record(sender=text, data={text: text}), text),
    "expiry_behind": lambda _: maillog.expiry_behind(5, 0.25, 60.0),
    "expiry_progress": lambda _: maillog.expiry_progress(5, 0.25, 60.0),
    "expiry_done": lambda _: maillog.expiry_done(5, 0.25),
    "expiry_failed": maillog.expiry_failed,
    "limit_hit": lambda text: maillog.limit_hit(
        TASK_ID, limit=text, action=text, key=text, used=3, maximum=2, unit=text, window_s=60.0
    ),
    "limits_not_counted": maillog.limits_not_counted,
    "limits_counted_again": lambda _: maillog.limits_counted_again(),
    "retention_differs": lambda text: maillog.retention_differs([text]),
    "retention_changed": lambda _: maillog.retention_changed(6),
    "retention_shortened": lambda _: maillog.retention_shortened(7),
}


def test_every_event_is_tried_here() -> None:
    functions = {name for name in maillog.__all__ if inspect.isfunction(getattr(maillog, name))}
    assert functions == {*EVENTS, "configure", "flush"}


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_one_printable_line(name: str, log_format: str) -> None:
    log = Log()
    maillog.configure(log_format, "debug", log.stream)
    EVENTS[name](NASTY)
    (line,) = log.lines()
    assert not UNWANTED.search(line)
    if log_format == "json":
        entry = json.loads(line)
        assert list(entry)[:3] == ["time", "level", "event"]
        assert datetime.fromisoformat(entry["time"]).tzinfo == UTC


@given(st.one_of(st.text(), st.binary(), st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zp", "Cf"]))))
def test_no_text_from_the_wire_breaks_a_line(text: str | bytes) -> None:
    for log_format in ("json", "console"):
        log = Log()
        maillog.configure(log_format, "debug", log.stream)
        maillog.upstream_failed("primary", "192.0.2.1", text)
        say_transaction(
            sender=text, recipients=[text], refused=[{"recipient": text, "reply": text}], reply=text
        )
        assert len(log.lines()) == 2
        assert not any(UNWANTED.search(line) for line in log.lines())


@given(
    st.one_of(
        st.text(),
        st.binary(),
        st.text(st.characters(max_codepoint=0x7F)),
        st.text(st.characters(categories=["Cs", "Cc"])),
        st.sampled_from([10, 400, 900, 1024, 1025, 3000]).map("x".__mul__),
        st.sampled_from(["smtp://relay:hunter2@host/", "a/b", r"a\b", '"a b"@c', "\x7f", "\u0100"]),
    )
)
def test_a_value_reads_the_same_in_a_message_and_elsewhere(text: str | bytes) -> None:
    log = Log()
    maillog.configure("json", "debug", log.stream)
    maillog.upstream_failed("primary", "192.0.2.1", text)
    say_transaction(
        sender=text,
        recipients=[text],
        refused=[{"recipient": text, "reply": text}],
        message_id=text,
        reply=text,
    )
    plain, message = map(json.loads, log.lines())
    expected = plain["reason"]
    assert [message[key] for key in ("sender", "message_id", "reply")] == [expected] * 3
    assert message["recipients"] == [expected]
    assert message["refused"] == [{"recipient": expected, "reply": expected}]


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0, 0.0),
        (0.1 + 0.2, 0.3),
        (1e-7, 0.0),
        (12.3456789, 12.345679),
        (86_400.000_000_4, 86_400.0),
        (float("inf"), None),
        (float("nan"), None),
    ],
)
@pytest.mark.parametrize("reply", [b"250 ok", b'250 "ok"'])
def test_seconds_have_six_digits(log: Log, seconds: float, written: float | None, reply: bytes) -> None:
    say_transaction(total_s=seconds, reply=reply)
    assert log.json()["total_s"] == written


def test_a_message_is_one_line_with_all_that_matters(log: Log) -> None:
    say_transaction()
    entry = log.json()
    entry.pop("time")
    assert entry == {
        "level": "info",
        "event": "message",
        "outcome": "accepted",
        "task_id": str(TASK_ID),
        "client": "127.0.0.1",
        "listener": "127.0.0.1:2525",
        "sender": "app@example.com",
        "recipients": ["one@example.org", "two@example.org"],
        "recipient_count": 2,
        "refused": [{"recipient": "bad@example.org", "reply": "550 5.1.1 unknown"}],
        "refused_count": 1,
        "task_type": "mention",
        "message_id": "<1@example.com>",
        "size": 4123,
        "upstream": "primary",
        "reply": "250 2.0.0 Ok: queued as 4F12",
        "client_reply": "250 2.0.0 Ok: queued as 4F12",
        "wait_s": 0.000012,
        "upstream_s": 0.25,
        "commit_s": 0.001,
        "total_s": 0.3,
    }


def test_what_is_not_there_is_left_out(log: Log) -> None:
    say_transaction(
        Outcome.REFUSED,
        sender=b"",
        recipients=[],
        recipient_count=0,
        refused=None,
        refused_count=None,
        task_type=None,
        message_id=None,
        upstream=None,
        reply=None,
        client_reply=None,
        client_gone=True,
    )
    entry = log.json()
    assert entry["sender"] == ""
    assert entry["client_gone"] is True
    assert set(entry) == {
        *("time", "level", "event", "outcome", "task_id", "client", "listener", "sender"),
        *("recipients", "recipient_count", "size", "wait_s", "upstream_s", "commit_s", "total_s"),
        "client_gone",
    }


@pytest.mark.parametrize(
    ("outcome", "level"),
    [
        (Outcome.ACCEPTED, "info"),
        (Outcome.REJECTED, "info"),
        (Outcome.DEFERRED, "info"),
        (Outcome.UNAVAILABLE, "warning"),
        (Outcome.IN_DOUBT, "error"),
        (Outcome.REFUSED, "info"),
        (Outcome.ABORTED, "info"),
    ],
)
def test_the_level_follows_the_outcome(log: Log, outcome: Outcome, level: str) -> None:
    say_transaction(outcome)
    assert log.json()["level"] == level
    assert log.json()["outcome"] == outcome.value


def test_levels_below_the_configured_one_are_not_written() -> None:
    log = Log()
    maillog.configure("json", "warning", log.stream)
    say_transaction(Outcome.ACCEPTED)
    maillog.listening("127.0.0.1:2525")
    assert log.lines() == []
    say_transaction(Outcome.UNAVAILABLE)
    assert log.json()["outcome"] == "unavailable"


def test_octets_that_are_no_utf8_are_escaped(log: Log) -> None:
    maillog.upstream_failed("primary", "192.0.2.1", b"caf\xe9 na\xc3\xafve\x00")
    assert log.json()["reason"] == r"caf\xe9 naïve\x00"


def test_long_values_and_lists_are_cut(log: Log) -> None:
    recipients = [b"%d@example.org" % number for number in range(1000)]
    say_transaction(
        recipients=recipients,
        recipient_count=1000,
        refused=[{"recipient": each, "reply": b"550"} for each in recipients],
        refused_count=1000,
        reply=b"x" * 60_000,
    )
    entry = log.json()
    assert entry["recipients"] == [f"{number}@example.org" for number in range(20)]
    assert entry["recipient_count"] == 1000
    assert len(entry["refused"]) == 20
    assert entry["refused_count"] == 1000
    assert entry["reply"] == "x" * MAX_TEXT + "... (60000 characters)"
    assert len(log.lines()[0]) < 6000


def test_escapes_do_not_make_a_value_longer_than_its_bound(log: Log) -> None:
    maillog.upstream_failed("primary", "192.0.2.1", "\u2028" * 5000)
    assert len(log.json()["reason"]) < MAX_TEXT + 40


def test_other_lists_tell_how_long_they_were(log: Log) -> None:
    maillog.started("1", [str(number) for number in range(25)], [], "sqlite:///x", None, compiled=False)
    entry = log.json()
    assert entry["listeners"][20:] == ["... (25 in all)"]
    assert "http" not in entry


def test_passwords_do_not_get_in(log: Log) -> None:
    class Secret:
        def __str__(self) -> str:
            return "**********"

    maillog.settings(
        {
            "records": {"url": "postgresql://relay:pa/ss:w@rd@db.example/x"},
            "upstreams": [{"name": "a", "password": "hunter2", "username": "u"}, {"password": None}],
            "http": {"token": Secret(), "token_file": "/run/token", "api_token": "abc"},
            "tls": {"key": Secret()},
        }
    )
    entry = log.json()
    assert entry["records"] == {"url": "postgresql://relay:***@db.example/x"}
    assert entry["upstreams"] == [
        {"name": "a", "password": "(hidden)", "username": "u"},
        {"password": None},
    ]
    assert entry["http"] == {"token": "(hidden)", "token_file": "/run/token", "api_token": "(hidden)"}
    assert entry["tls"] == {"key": "**********"}


@pytest.mark.parametrize("padding", [0, MAX_TEXT - 20, MAX_TEXT - 5])
def test_a_password_is_cut_out_of_any_text(log: Log, padding: int) -> None:
    maillog.expiry_failed("x" * padding + " cannot open postgresql://relay:hunter2@db/x")
    assert "hunter" not in log.lines()[0]


def test_an_error_comes_with_its_traceback_on_one_line(log: Log) -> None:
    def failing() -> None:
        raise ValueError("bad\nthing")

    try:
        failing()
    except ValueError as error:
        maillog.unforeseen("end of data", TASK_ID, error)
    entry = log.json()
    assert entry["level"] == "error"
    assert entry["where"] == "end of data"
    assert entry["error"] == r"ValueError: bad\nthing"
    assert entry["traceback"].startswith(r"Traceback (most recent call last):\n")
    assert "in failing" in entry["traceback"]


def test_of_a_long_traceback_the_end_stays(log: Log) -> None:
    error = RuntimeError("the end")
    error.__cause__ = RuntimeError("x" * 20_000)
    maillog.unforeseen("somewhere", None, error)
    entry = log.json()
    assert entry["traceback"].endswith("RuntimeError: the end")
    assert len(entry["traceback"]) <= MAX_TRACEBACK
    assert "task_id" not in entry


def test_an_error_that_cannot_be_printed_is_logged_all_the_same(log: Log) -> None:
    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise ValueError

    maillog.unforeseen("somewhere", None, UnprintableError())
    assert "UnprintableError" in log.json()["error"]


def test_a_row_that_only_the_log_has_is_there_whole(log: Log) -> None:
    recipients = tuple(f"{number}@example.org" for number in range(500))
    maillog.row_lost(
        record(recipients=recipients, upstream_reply=NASTY, data={"tags": ["x" * 5000]}), "no space left"
    )
    entry = log.json()
    assert entry["level"] == "error"
    assert entry["reason"] == "no space left"
    row = json.loads(entry["row"])
    assert row["recipients"] == list(recipients)
    assert row["upstream_reply"] == NASTY
    assert row["data"] == {"tags": ["x" * 5000]}
    assert row["task_id"] == str(TASK_ID)
    assert row["sent_at"] == "2026-01-02T03:04:05+00:00"


def test_what_is_in_doubt_and_awaited_has_all_that_a_message_has(log: Log) -> None:
    maillog.in_doubt(
        "no answer", facts(outcome=None, reply=None, client_reply="451 4.4.2 see id", upstream_s=0.0)
    )
    say_transaction(client_reply="451 4.4.2 see id", upstream_s=0.0)
    awaited, message = map(json.loads, log.lines())
    assert (awaited["event"], awaited["level"]) == ("in doubt", "warning")
    assert (awaited.pop("reason"), awaited.pop("awaited")) == ("no answer", True)
    assert awaited.keys() == message.keys() - {"outcome", "reply"}
    others = awaited.keys() - {"time", "level", "event"}
    assert {name: awaited[name] for name in others} == {name: message[name] for name in others}


def test_what_was_found_in_the_journal_is_awaited_no_more(log: Log) -> None:
    recipients = tuple(f"{number}@example.org" for number in range(30))
    maillog.found_in_journal(doubt(recipients=recipients, data={"recipient_count": 50}))
    entry = log.json()
    assert (entry["event"], entry["level"], entry["awaited"]) == ("in doubt", "warning", False)
    assert entry["recipients"] == list(recipients[:MAX_ITEMS])
    assert (entry["recipient_count"], entry["reason"]) == (50, "lost")
    assert (entry["task_id"], entry["since"]) == (str(TASK_ID), "2026-01-02T03:04:05+00:00")


def test_an_entry_that_only_the_log_has_says_its_kind(log: Log) -> None:
    maillog.row_lost(Settled(TASK_ID), "no space left")
    entry = log.json()
    assert entry["kind"] == "settled"
    assert json.loads(entry["row"]) == {"task_id": str(TASK_ID)}


def test_numbers_that_json_readers_dread_are_written(log: Log) -> None:
    maillog.settings({"server": {"max_message_size": 2**70}})
    assert log.json()["server"] == {"max_message_size": 2**70}


# ------------------------------------------------------------------------------------------- console


def test_console_lines_are_plain_off_a_terminal() -> None:
    log = Log()
    maillog.configure("console", "info", log.stream)
    say_transaction()
    (line,) = log.lines()
    assert "\x1b" not in line
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \[info", line)
    assert "outcome=accepted" in line
    assert "sender=app@example.com" in line


def test_console_lines_show_where_a_value_ends() -> None:
    log = Log()
    maillog.configure("console", "info", log.stream)
    maillog.reloaded(["log.level"])
    maillog.warning('a "word" = b')
    maillog.certificate_read("2027")
    maillog.session_refused("", "::1", "it's", None)
    assert [line.partition(" ")[2] for line in log.lines()] == [
        "[info     ] reloaded changed=['log.level']",
        """[warning  ] warning text='a "word" = b'""",
        "[info     ] certificate read not_after=2027",
        """[info     ] session refused peer= listener=::1 reason="it's\"""",
    ]


def test_console_lines_are_coloured_on_a_terminal() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "wb") as terminal:
        maillog.configure("console", "info", terminal)
        maillog.stopped()
        seen = os.read(master, 4096)
    os.close(master)
    assert re.sub(rb"[0-9]{4}-[^\x1b]*", b"NOW", seen) == (
        b"\x1b[2mNOW\x1b[0m [\x1b[1;32minfo     \x1b[0m] \x1b[1mstopped\x1b[0m\r\n"
    )


# --------------------------------------------------------------------------------- the standard library


def test_libraries_come_out_here(log: Log) -> None:
    try:
        raise OSError("gone\r\naway")
    except OSError:
        logging.getLogger("asyncio").exception("task %r failed\n", "x\x1b")
    entry = log.json()
    assert entry["level"] == "error"
    assert entry["logger"] == "asyncio"
    assert entry["event"] == r"task 'x\x1b' failed" + r"\n"
    assert "OSError: gone" in entry["traceback"]


@pytest.mark.parametrize(
    ("number", "level"), [(10, "debug"), (25, "info"), (30, "warning"), (45, "error"), (50, "critical")]
)
def test_levels_of_libraries_are_kept(log: Log, number: int, level: str) -> None:
    library = logging.getLogger("some.library")
    library.setLevel(1)
    library.log(number, "words")
    assert log.json()["level"] == level


def test_a_library_that_misuses_its_log_does_no_harm(log: Log) -> None:
    # Straight to our handler: the one of pytest raises for such a record.
    misused = logging.LogRecord("some.library", logging.WARNING, "", 0, "%d of %d", ("x",), None)
    for handler in logging.getLogger().handlers:
        if handler.__class__.__module__ == destination.__name__:
            handler.handle(misused)
    assert log.json()["event"] == "%d of %d"


@pytest.mark.parametrize("name", ["mail.log", "mail.debug", "aiosmtplib", "aiosmtplib.protocol"])
def test_the_libraries_that_log_octets_of_clients_are_silent(
    log: Log, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger(name).error("AUTH PLAIN AGFwcABodW50ZXIy")
    assert log.lines() == []
    assert capsys.readouterr() == ("", "")


def test_configuring_twice_does_not_write_twice(log: Log) -> None:
    maillog.configure("json", "info", log.stream)
    logging.getLogger("aiohttp.server").error("once")
    assert len(log.lines()) == 1


# ----------------------------------------------------------------------------------------- the stream


def test_lines_go_to_standard_output_by_default(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    maillog.configure("json", "info")
    maillog.stopped()
    out, err = capfdbinary.readouterr()
    assert json.loads(out)["event"] == "stopped"
    assert err == b""


def test_a_log_that_cannot_be_written_is_no_error_and_tells_its_gap() -> None:
    class Broken(io.BytesIO):
        broken = True

        def write(self, octets: Any, /) -> int:
            if self.broken:
                raise BrokenPipeError
            return super().write(octets)

    stream = Broken()
    maillog.configure("json", "info", stream)
    say_transaction()
    maillog.stopped()
    stream.broken = False
    maillog.listening("127.0.0.1:2525")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [entry["event"] for entry in events] == ["listening", "log lines lost"]
    assert events[1]["lines"] == 2


def test_a_closed_stream_is_no_error() -> None:
    stream = io.BytesIO()
    maillog.configure("json", "info", stream)
    stream.close()
    say_transaction()
    maillog.configure("json", "info", io.BytesIO())


def test_a_full_device_is_no_error() -> None:
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        maillog.configure("json", "info", full)
        say_transaction()
    maillog.configure("json", "info", io.BytesIO())


# ------------------------------------------------------------------------------------------- the writes


class Writes(io.BytesIO):
    """The texts of the warnings in each write."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[list[str]] = []

    def write(self, octets: Any, /) -> int:
        entries = [json.loads(line) for line in bytes(octets).splitlines()]
        self.texts.append([entry.get("text") or entry["event"] for entry in entries])
        return super().write(octets)


@pytest.fixture
def writes() -> Writes:
    writes = Writes()
    maillog.configure("json", "debug", writes)
    return writes


async def test_lines_of_one_turn_of_the_loop_are_one_write_in_their_order(writes: Writes) -> None:
    maillog.warning("1")
    say_transaction()
    maillog.warning("2")
    say_transaction(reply=NASTY)
    assert writes.texts == []
    await asyncio.sleep(0)
    assert writes.texts == [["1", "message", "2", "message"]]
    maillog.warning("3")
    await asyncio.sleep(0)
    assert writes.texts[1:] == [["3"]]


def test_without_a_loop_each_line_is_written_at_once(writes: Writes) -> None:
    maillog.warning("1")
    say_transaction()
    assert writes.texts == [["1"], ["message"]]


@pytest.mark.parametrize(
    "error",
    [
        lambda: maillog.unforeseen("here", None, RuntimeError()),
        lambda: maillog.row_lost(record(), "no space left"),
        lambda: say_transaction(Outcome.IN_DOUBT),
        lambda: say_transaction(Outcome.IN_DOUBT, reply=NASTY),
        lambda: logging.getLogger("some.library").critical("words"),
    ],
)
async def test_an_error_is_written_at_once_after_what_waits(
    writes: Writes, error: Callable[[], None]
) -> None:
    maillog.warning("before")
    error()
    ((first, _),) = writes.texts
    assert first == "before"
    maillog.warning("after")
    await asyncio.sleep(0)
    assert writes.texts[1:] == [["after"]]


async def test_the_last_line_of_the_relay_does_not_wait(writes: Writes) -> None:
    maillog.warning("1")
    maillog.stopped()
    assert writes.texts == [["1", "stopped"]]


async def test_lines_that_wait_are_bounded(writes: Writes) -> None:
    count = 0
    while not writes.texts:
        maillog.warning("x" * 1000)
        count += 1
        assert count * 1000 <= MAX_WAITING
    assert len(writes.texts[0]) == count > MAX_WAITING // 1200
    maillog.warning("later")
    await asyncio.sleep(0)
    assert writes.texts[1:] == [["later"]]


async def test_a_line_of_a_thread_keeps_its_place(writes: Writes) -> None:
    maillog.warning("1")
    thread = threading.Thread(target=maillog.warning, args=("2",))
    thread.start()
    thread.join()
    maillog.warning("3")
    await asyncio.sleep(0)
    assert writes.texts == [["1", "2"], ["3"]]


async def test_a_change_of_the_configuration_loses_no_line(writes: Writes) -> None:
    maillog.warning("1")
    maillog.configure("json", "info", io.BytesIO())
    assert writes.texts == [["1"]]


def test_lines_of_a_loop_that_ended_come_with_the_next_loop(writes: Writes) -> None:
    for text in ("1", "2"):
        loop = asyncio.new_event_loop()
        loop.call_soon(loop.stop)
        loop.call_soon(maillog.warning, text)  # in the loop's last turn
        loop.run_forever()
        loop.close()
    assert writes.texts == []

    async def last() -> None:
        maillog.warning("3")
        await asyncio.sleep(0)

    asyncio.run(last())
    assert writes.texts == [["1", "2", "3"]]


def test_lines_that_wait_at_the_end_of_the_process_are_written() -> None:
    program = """
import asyncio
from relay import maillog
loop = asyncio.new_event_loop()
loop.call_soon(loop.stop)
loop.call_soon(maillog.warning, "last words")
loop.run_forever()
loop.close()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=30)
    assert json.loads(ended.stdout)["text"] == "last words"
    assert ended.stderr == b""


async def test_all_lines_of_a_write_that_failed_are_counted() -> None:
    class Broken(Writes):
        broken = True

        def write(self, octets: Any, /) -> int:
            if self.broken:
                raise BrokenPipeError
            return super().write(octets)

    stream = Broken()
    maillog.configure("json", "info", stream)
    for number in range(3):
        maillog.warning(str(number))
    await asyncio.sleep(0)
    stream.broken = False
    maillog.warning("again")
    await asyncio.sleep(0)
    assert stream.texts == [["again"], ["log lines lost"]]
    assert json.loads(stream.getvalue().splitlines()[1])["lines"] == 3
