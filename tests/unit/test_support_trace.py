"""The reading of traces, and the judgement about the order of calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trace import calls, disorder

READ = '7 recvfrom(9<socket:[5]>, "250 no. 1;\\r\\n", 4096, 0, NULL, NULL) = 12'
ROW = '8 pwrite64(11</data/rows.db-wal>, "\\r\\0\\0no. 1;", 4096, 32) = 4096'
SYNC = "8 fdatasync(11</data/rows.db-wal>)  = 0"
ANSWER = '7 sendto(10<socket:[6]>, "250 no. 1;\\r\\n", 12, 0, NULL, 0) = 12'
LOG = '7 write(1</data/relay.log>, "no. 1;", 6) = 6'


def judged(*lines: str) -> str | None:
    return disorder(calls(lines), "no. 1;", Path("/data"))


def test_calls_in_pieces_are_put_together() -> None:
    found = calls(
        [
            "7 <... read resumed>, 4096) = 3",
            "8 fdatasync(11</data/rows.db-wal> <unfinished ...>",
            "7 read(9<socket:[5]>,  <unfinished ...>",
            "--- SIGTERM {si_signo=SIGTERM} ---",
            "8 <... fdatasync resumed>)          = 0",
            '7 <... read resumed>"no. 1;", 4096) = 6',
            "7 recvfrom(9<socket:[5]>, 0x7f, 4096, 0, NULL, NULL) = -1 EAGAIN (try again)",
            "7 write(1</data/relay.log>,  <unfinished ...>",
            "7 +++ exited with 0 +++",
        ]
    )
    assert [(call.name, call.begun, call.ended, call.file, call.result) for call in found] == [
        ("fdatasync", 1, 4, "/data/rows.db-wal", 0),
        ("read", 2, 5, "socket:[5]", 6),
        ("recvfrom", 6, 6, "socket:[5]", -1),
    ]
    assert "no. 1;" in found[1].text


def test_the_order_as_it_must_be() -> None:
    assert judged(READ, ROW, SYNC, LOG, ANSWER) is None


def test_a_row_that_shares_the_sync_of_others() -> None:
    begun, ended = "8 fdatasync(11</data/rows.db-wal> <unfinished ...>", "8 <... fdatasync resumed>) = 0"
    assert judged(READ, ROW, begun, LOG, ended, ANSWER) is None


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([ROW, SYNC, ANSWER], "never read"),
        ([READ, ROW, SYNC, LOG], "never answered"),
        ([READ, ANSWER, ROW, SYNC], "before the row was written"),
        ([ROW, SYNC, READ, ANSWER], "before the row was written"),
        ([READ, LOG.replace("/data", "/log"), SYNC, ANSWER], "before the row was written"),
        ([READ, ROW, ANSWER, SYNC], "before the row was synced"),
        ([READ, SYNC, ROW, ANSWER], "before the row was synced"),
        ([READ, ROW, SYNC.replace("-wal", ""), ANSWER], "before the row was synced"),
        (
            [READ, ROW, SYNC.replace("= 0", "= -1 EIO (Input/output error)"), ANSWER],
            "before the row was synced",
        ),
        (
            [
                READ,
                "8 fdatasync(11</data/rows.db-wal> <unfinished ...>",
                ROW.replace("8 ", "9 ", 1),
                "8 <... fdatasync resumed>) = 0",
                ANSWER,
            ],
            "before the row was synced",
        ),
        (
            [
                READ,
                ROW,
                "8 fdatasync(11</data/rows.db-wal> <unfinished ...>",
                ANSWER,
                "8 <... fdatasync resumed>) = 0",
            ],
            "before the row was synced",
        ),
    ],
)
def test_what_is_out_of_order(lines: list[str], wrong: str) -> None:
    assert wrong in str(judged(*lines))
