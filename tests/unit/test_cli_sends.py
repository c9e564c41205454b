from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from relay.asking import moment
from relay.cli import main
from relay.cli.format import Format
from relay.cli.rows import HEADER, HEADER_IN_DOUBT, Table, fitted, writer
from relay.records.model import Doubt, Record
from relay.records.sends import Send
from relay.records.tables import COLUMNS
from tests.support.recorded import configured, record

NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="+alice@example.com",
    client="127.0.0.1",
    sent_at=NOW,
    upstream="primary",
    upstream_reply="250-2.0.0 Ok:\n250 2.0.0 queued \x1b[31m\x9b2J",
    size=4096,
    duration_ms=12,
    recipients=("=1+1@example.net", "bob@example.net", "carol@example.net"),
    message_id='<"1", 2@example.com>',
    data={"headers": {"Subject": "\x9b\u202e"}},
)
SEND = Send(
    id=1,
    client_task_id=None,
    sender_domain="example.com",
    expires_at=None,
    **{name: getattr(ROW, name) for name in ("task_type", "sender", "client", "sent_at", "upstream", "size")},
    **{name: getattr(ROW, name) for name in ("upstream_reply", "message_id", "duration_ms", "data")},
    task_id=str(ROW.task_id),
    recipients=ROW.recipients,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty working directory with a configuration, in a zone of its own."""
    configured(tmp_path, monkeypatch)
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_table_for_a_pipe_is_plain_and_whole(capsys):
    record(ROW, replace(ROW, task_id=UUID(int=2), sender="", recipients=("x@y",), upstream_reply="250 ok"))

    assert main(["sends"]) == 0

    captured = capsys.readouterr()
    assert captured.err == ""
    assert [re.split("  +", line) for line in captured.out.splitlines()] == [
        list(HEADER),
        ["2026-11-23 13:16:00", "mention", "<>", "x@y", "250 ok"],
        [
            *("2026-11-23 13:16:00", "mention", "+alice@example.com", "=1+1@example.net +2"),
            r"250-2.0.0 Ok: 250 2.0.0 queued \x1b[31m\x9b2J",
        ],
    ]


DOUBT = Doubt(
    since=NOW,
    reason="closed by the\nupstream \x1b[31m",
    **{name: getattr(ROW, name) for name in ("task_id", "task_type", "sender", "client", "upstream", "size")},
    **{name: getattr(ROW, name) for name in ("duration_ms", "recipients", "message_id", "data")},
)


def test_what_is_in_doubt_is_another_table(capsys):
    record(replace(ROW, task_id=UUID(int=2)), DOUBT)

    assert main(["sends", "--in-doubt"]) == 0

    captured = capsys.readouterr()
    assert captured.err == ""
    assert [re.split("  +", line) for line in captured.out.splitlines()] == [
        list(HEADER_IN_DOUBT),
        [
            *("2026-11-23 13:16:00", "mention", "+alice@example.com", "=1+1@example.net +2"),
            r"closed by the upstream \x1b[31m",
        ],
    ]


def test_what_is_in_doubt_for_programs(capsys):
    record(DOUBT)

    assert main(["sends", "--in-doubt", "--format", "json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    entry = json.loads(line)
    assert main(["sends", "--in-doubt", "--format", "csv"]) == 0
    header, values = csv.reader(io.StringIO(capsys.readouterr().out))

    assert entry == {
        "id": 1,
        "task_id": str(DOUBT.task_id),
        "client_task_id": None,
        "task_type": "mention",
        "sender": "+alice@example.com",
        "sender_domain": "example.com",
        "client": "127.0.0.1",
        "since": "2026-11-23T07:46:00.123456Z",
        "expires_at": "2026-12-23T07:46:00.123456Z",
        "upstream": "primary",
        "reason": DOUBT.reason,
        "message_id": DOUBT.message_id,
        "size": 4096,
        "duration_ms": 12,
        "data": DOUBT.data,
        "recipients": list(DOUBT.recipients),
    }
    assert header == list(entry)
    assert values[-1] == "=1+1@example.net bob@example.net carol@example.net"


def test_filters_for_what_is_in_doubt(capsys):
    record(DOUBT, replace(DOUBT, task_id=UUID(int=2), since=NOW + timedelta(hours=1), sender=""))
    found = {
        "--sender=+ALICE@example.com": 1,
        "--sender=@example.com": 1,
        "--sender=<>": 1,
        "--recipient=bob@EXAMPLE.net": 2,
        "--recipient=@Example.NET": 2,
        "--recipient=@ample.net": 0,
        "--recipient=nobody@example.net": 0,
        "--type=mention": 2,
        "--type=digest": 0,
        "--client=127.0.0.2": 0,
        '--message-id="1", 2@example.com': 2,
        "--task-id=00000000000000000000000000000002": 1,
        "--since=2026-11-23T08:00Z": 1,
        "--until=2026-11-23T08:00Z": 1,
        "--limit=1": 1,
    }
    for option, rows in found.items():
        assert main(["sends", "--in-doubt", "--format", "json", option]) == 0
        assert len(capsys.readouterr().out.splitlines()) == rows, option
    assert main(["sends", "--in-doubt", "--type=digest"]) == 0
    assert capsys.readouterr().err == "relay: no messages in doubt found\n"


@pytest.mark.parametrize(
    ("count", "said"), [(0, ""), (1, "1 message is in doubt"), (2, "2 messages are in doubt")]
)
def test_whoever_looks_at_the_sends_is_told_of_what_is_in_doubt(count, said, capsys, monkeypatch):
    record(ROW, *(replace(DOUBT, task_id=UUID(int=number + 2)) for number in range(count)))
    line = f"relay: {said}, see relay sends --in-doubt\n" if said else ""

    assert main(["sends"]) == 0
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["sends"]) == 0
    assert sys.stderr.getvalue() == line
    assert main(["sends", "--in-doubt", "--format", "csv"]) == 0
    assert sys.stderr.getvalue() == line


def test_filters_reach_the_query(capsys):
    record(ROW, replace(ROW, task_id=UUID(int=2), sent_at=NOW + timedelta(hours=1)))
    found = {
        "--sender=+ALICE@example.com": 2,
        "--sender=<+alice@example.com>": 2,
        "--sender=@example.com": 2,
        "--sender=<>": 0,
        "--recipient=bob@EXAMPLE.net": 2,
        "--recipient=nobody@example.net": 0,
        "--type=mention": 2,
        "--type=digest": 0,
        "--client=127.0.0.1": 2,
        "--client=127.0.0.2": 0,
        '--message-id="1", 2@example.com': 2,
        "--message-id=1": 0,
        "--task-id=00000000000000000000000000000002": 1,
        "--since=2026-11-23T08:00Z": 1,
        "--until=2026-11-23T08:00Z": 1,
        "--since=2026-11-24": 0,
        "--limit=1": 1,
        "--limit=0": 2,
        "--sender=caf\udce9": 0,  # an argument that is no UTF-8
    }
    for option, rows in found.items():
        assert main(["sends", "--format=json", option]) == 0
        assert (option, len(capsys.readouterr().out.splitlines())) == (option, rows)


def test_nothing_found_is_said_on_the_side(capsys):
    record(ROW)
    for output, out, err in (
        ("table", "", "relay: no sends found\n"),
        ("json", "", ""),
        ("csv", ",".join((*COLUMNS["task_done"], "recipients")) + "\n", ""),
    ):
        assert main(["sends", "--sender=x@y", f"--format={output}"]) == 0
        assert capsys.readouterr() == (out, err)


@pytest.mark.parametrize("output", Format)
def test_no_store_is_made_and_nothing_printed(output, capsys):
    assert main(["sends", f"--format={output}"]) == 1

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("relay: data/task_done.db: no such file")
    assert captured.err.count("\n") == 1
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("arguments", "option", "takes"),
    [
        (["--since=tomorrow"], "--since", "90m, 2h or 7d"),
        (["--since="], "--since", "90m, 2h or 7d"),
        (["--since=90"], "--since", "90m, 2h or 7d"),
        (["--until=99999999d"], "--until", "90m, 2h or 7d"),
        (["--since=1h", "--until=2h"], "--until", "after that of --since"),
        (["--task-id=5"], "--task-id", "a UUID"),
        (["--sender="], "--sender", "or <>"),
        (["--sender=@"], "--sender", "@domain"),
        (["--recipient=<>"], "--recipient", "an address or @domain"),
        (["--type= "], "--type", "a task type"),
        (["--client="], "--client", "an IP address"),
        (["--message-id="], "--message-id", "a Message-ID"),
        (["--limit=-1"], "--limit", "0"),
        (["--limit=many"], "--limit", "integer"),
        (["--format=xml"], "--format", "'table', 'json', 'csv'"),
    ],
    ids=str,
)
def test_a_bad_value_is_one_line(arguments, option, takes, capsys):
    assert main(["sends", *arguments]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"relay: invalid value for '{option}': ")
    assert takes in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--config=other.toml", "--format=json", "--tz=UTC", "--follow"])
def test_an_option_before_show_is_not_passed_over(option, capsys):
    record(ROW)

    assert main(["sends", option, "show", str(ROW.task_id)]) == 2

    assert capsys.readouterr() == (
        "",
        "relay: options of show stand behind it: relay sends show TASK_ID --config FILE\n",
    )
    assert main(["sends", "show", str(ROW.task_id)]) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("90m", NOW - timedelta(minutes=90)),
        ("7d", NOW - timedelta(days=7)),
        ("2026-11-23", datetime(2026, 11, 22, 18, 30, tzinfo=UTC)),
        ("2026-11-23T07:46", datetime(2026, 11, 23, 2, 16, tzinfo=UTC)),
        ("2026-11-23 07:46:01.5", datetime(2026, 11, 23, 2, 16, 1, 500000, tzinfo=UTC)),
        ("2026-11-23T07:46:00.123456Z", NOW),
        ("2026-11-23T08:46:00.123456+01:00", NOW),
    ],
)
def test_when(value, expected):
    assert moment(value, NOW) == expected


# Formats


def written(output, *sends, out=None):
    out = out or io.StringIO()
    write = writer(output, out)
    write(())
    write(sends)
    return out.getvalue()


def test_json_has_every_column_and_the_same_values():
    text = written(Format.JSON, SEND, SEND)

    assert text.replace("\n", "").isprintable()
    first, second = map(json.loads, text.splitlines())
    assert first == second
    assert list(first) == [*COLUMNS["task_done"], "recipients"]
    assert first["sent_at"] == "2026-11-23T07:46:00.123456Z"
    assert first["expires_at"] is None
    assert first["data"] == ROW.data
    assert first["upstream_reply"] == ROW.upstream_reply
    assert first["recipients"] == list(ROW.recipients)


def test_csv_has_every_column_and_the_same_values():
    header, row, again = csv.reader(io.StringIO(written(Format.CSV, SEND, SEND), newline=""))

    assert header == [*COLUMNS["task_done"], "recipients"]
    assert row == again
    values = dict(zip(header, row, strict=True))
    assert values["sender"] == "+alice@example.com"
    assert values["recipients"] == "=1+1@example.net bob@example.net carol@example.net"
    assert values["upstream_reply"] == ROW.upstream_reply
    assert values["message_id"] == ROW.message_id
    assert values["client_task_id"] == values["expires_at"] == ""
    assert values["sent_at"] == "2026-11-23T07:46:00.123456Z"
    assert json.loads(values["data"]) == ROW.data


@pytest.mark.parametrize("output", Format)
def test_text_from_the_wire_does_not_drive_a_terminal(output, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert written(output, SEND, out=Terminal()).replace("\n", "").isprintable()


def test_the_header_stands_out_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = written(Format.TABLE, SEND, SEND, out=Terminal())
    assert text.startswith("\x1b[1mTIME ")
    assert text.count("\x1b") == 2


@pytest.mark.parametrize("width", [80, 200])
def test_a_table_fits_its_terminal(width):
    long = replace(
        SEND, sender="jörg@" + "漢字" * 30, recipients=("a" * 70 + "@x", "b@x"), upstream_reply="250 ok " * 40
    )
    from rich.cells import cell_len

    header, *lines = Table(width).lines([SEND, long])

    assert header.split() == list(HEADER)
    assert max(map(cell_len, lines)) <= width
    assert lines[1].startswith("2026-11-23 13:16:00  mention  jörg@")
    assert "… +1  250 ok" in lines[1]


def test_later_pages_keep_the_columns_and_have_no_header():
    table = Table(None)
    first = table.lines([SEND])
    [line] = table.lines([replace(SEND, sender="longer-than-all-before@example.com")])
    assert table.lines([]) == []
    assert len(first) == 2
    assert "longer-than-all-before@example.com  =1+1" in line


@pytest.mark.parametrize(
    ("wanted", "width", "widths"),
    [
        ([19, 5, 10], 40, [19, 5, 10]),
        ([19, 5, 30], 48, [19, 5, 20]),
        ([19, 20, 30], 53, [19, 15, 15]),
        ([19, 20, 5], 10, [19, 8, 5]),
    ],
)
def test_the_widest_gives_way(wanted, width, widths):
    assert fitted(wanted, width) == widths


# As a process


def run(*arguments, **options):
    command = [sys.executable, "-m", "relay", "sends", *arguments]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("output", Format)
def test_a_reader_that_has_seen_enough_is_no_error(output):
    record(*(replace(ROW, task_id=UUID(int=number), upstream_reply="250 " * 500) for number in range(300)))
    command = [sys.executable, "-m", "relay", "sends", "--limit=0", f"--format={output}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_disk_that_is_full_is_said():
    record(ROW)
    with Path("/dev/full").open("wb") as full:
        done = run(stdout=full)

    assert done.stderr.startswith(b"relay: cannot write what was found: No space left on device\n")
    assert b"Traceback" not in done.stderr


def test_every_encoding_of_a_terminal_will_do(monkeypatch):
    record(replace(ROW, sender="jörg@example.com"))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")

    assert b"j\\xf6rg@example.com" in run(stdout=subprocess.PIPE).stdout
    assert "jörg@example.com" in run("--format=json", stdout=subprocess.PIPE).stdout.decode()


def test_without_a_file_the_records_of_a_trial_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)

    assert main(["sends"]) == 1

    assert "data/task_done.db" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


SERVICE = """
[[upstreams]]
address = "smtp.example.com:587"
username = "relay"
[[listeners]]
address = "127.0.0.1:2525"
tls = "starttls"
[tls]
cert = "/run/credentials/cert"
key = "/run/credentials/key"
[clients]
auth = "users"
[http]
token_file = "/run/credentials/token"
"""
"""Some secrets are where the service alone finds them; other keys come from its environment."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["sends"],
        ["stats", "--by", "type"],
        ["limits"],
        ["spool", "list"],
        ["spool", "replay"],
        ["expire"],
        ["forget", "nobody@example.com"],
        ["migrate-store", "--from", "sqlite:///data/task_done.db", "--to", "sqlite:///other.db"],
    ],
)
def test_the_records_need_nothing_that_is_the_services_alone(arguments, capsys):
    Path("relay.toml").write_text(SERVICE)
    record(ROW)

    assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize("option", ["--from", "--to"])
def test_a_url_that_is_none_is_the_options_mistake(option, capsys):
    urls = {
        "--from": "sqlite:///data/task_done.db",
        "--to": "sqlite:///other.db",
        option: "mysql://a:sesame@b",
    }

    assert main(["migrate-store", *(word for pair in urls.items() for word in pair)]) == 2

    assert capsys.readouterr().err == (
        f"relay: invalid value for '{option}': must be sqlite:///path or "
        "postgresql://user@host:port/database; see relay --help\n"
    )


def test_what_the_records_do_not_need_is_read_by_a_check(capsys):
    Path("relay.toml").write_text(SERVICE)

    assert main(["check"]) == 2
    assert "upstreams.0.password: missing" in capsys.readouterr().err


def test_other_mistakes_are_told_to_who_reads_the_records(capsys):
    Path("relay.toml").write_text('[upstream]\n[records]\nurl = "mysql:///data"\n')

    assert main(["sends"]) == 2
    assert capsys.readouterr().err == (
        "relay: relay.toml: records.url: must be sqlite:///path or postgresql://user@host:port/database\n"
        'relay: relay.toml: upstream: unknown key; did you mean "upstreams"?\n'
    )


def test_wildcards_and_the_upstream(capsys):
    record(
        replace(ROW, task_id=UUID(int=1), task_type="mention"),
        replace(ROW, task_id=UUID(int=2), task_type="digest"),
        replace(ROW, task_id=UUID(int=3), task_type="mention"),
    )
    assert main(["sends", "--recipient", "*@example.net", "--upstream", "prim*", "--type", "m*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["sends", "--recipient", "*@example.org"]) == 0
    assert "no sends found" in capsys.readouterr().err
