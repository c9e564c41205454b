"""`relay sends` while rows come: `--follow`, and a long export that somebody looks at."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from relay.cli import main
from relay.cli.sends import OVERLAP
from tests.support.recorded import configured, record
from tests.support.rows import SENT_AT, make_record

ROW = make_record(task_id=UUID(int=1))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(tmp_path, monkeypatch)


@pytest.fixture
def following() -> Iterator[subprocess.Popen[str]]:
    record(ROW, replace(ROW, task_id=UUID(int=2), sent_at=SENT_AT + timedelta(seconds=1)))
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "sends", "--follow", "--format", "json", "--type", "mention"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def test_new_rows_are_printed_as_they_come(following: subprocess.Popen[str]) -> None:
    assert following.stdout is not None
    numbers = [UUID(json.loads(following.stdout.readline())["task_id"]).int for _ in range(2)]
    assert numbers == [1, 2]
    record(
        replace(ROW, task_id=UUID(int=3), task_type="digest"),
        replace(ROW, task_id=UUID(int=4), sent_at=SENT_AT - timedelta(days=1)),  # late, from the spool
    )
    record(replace(ROW, task_id=UUID(int=5)))
    numbers = [UUID(json.loads(following.stdout.readline())["task_id"]).int for _ in range(2)]
    assert numbers == [4, 5]


def test_without_a_limit_all_rows_come_first() -> None:
    number = 2 * OVERLAP + 500
    record(*(replace(ROW, task_id=UUID(int=at)) for at in range(1, number)))
    command = [sys.executable, "-m", "relay", "sends", "--follow", "--limit", "0", "--format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = [UUID(json.loads(process.stdout.readline())["task_id"]).int for _ in range(1, number)]
            record(replace(ROW, task_id=UUID(int=number)))
            found.append(UUID(json.loads(process.stdout.readline())["task_id"]).int)
        finally:
            process.kill()
    assert found == [*range(1, number + 1)]


def test_a_row_that_comes_while_it_begins_is_printed() -> None:
    record(ROW)
    script = (
        "import sys; from relay.records.queries import Queries; page = Queries.page\n"
        "async def held(*asked):\n"
        "    found = await page(*asked); print('read', file=sys.stderr, flush=True); sys.stdin.readline()\n"
        "    return found\n"
        "Queries.page = held; from relay.cli import main; main(['sends', '--follow', '--format', 'json'])"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == "read\n"
        record(replace(ROW, task_id=UUID(int=2)))
        process.stdin.write("\n")
        process.stdin.flush()
        record(replace(ROW, task_id=UUID(int=3)))
        found = []
        while not found or found[-1] != 3:  # the one that came afterwards is printed in any case
            found.append(UUID(json.loads(process.stdout.readline())["task_id"]).int)
        process.kill()
    assert found == [1, 2, 3]


def test_an_end_from_the_keyboard_is_no_error(following: subprocess.Popen[str]) -> None:
    assert following.stdout is not None
    following.stdout.readline()
    following.send_signal(2)
    _, said = following.communicate(timeout=30)
    assert "Traceback" not in said
    assert following.returncode in (0, 130)


def test_following_takes_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sends", "--follow", "--until", "today"]) == 2
    assert "does not go with --until" in capsys.readouterr().err


def test_a_long_export_says_how_far_it_is_where_somebody_looks() -> None:
    record(*(replace(ROW, task_id=UUID(int=n)) for n in range(1, 900)))
    script = (
        "import relay.cli.sends as s; s.PROGRESS_S = 0.0; from relay.cli import main; "
        "main(['sends', '--limit', '0', '--format', 'csv'])"
    )
    master, slave = pty.openpty()
    with Path("out.csv").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=out, stderr=slave, check=True, timeout=60
        )
    os.close(slave)
    said = os.read(master, 10_000).decode()
    os.close(master)
    assert done.returncode == 0
    assert "\r200 rows" in said
    assert said.endswith("\r\x1b[K")
    assert len(list(csv.reader(Path("out.csv").read_text().splitlines()))) == 900
