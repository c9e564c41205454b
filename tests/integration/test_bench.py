"""The scripts of `bench` run: in short here, in full by hand. Nothing here depends on how fast they are."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench import reading, report, table
from bench.cases import CASES
from bench.ends import await_count
from bench.errors import RunError
from bench.measure import Result
from bench.plot import bars
from bench.processes import Descendants, running
from bench.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str, progress: bool = False) -> str:
    """Run a script; return what it printed. It must end with status 0, which says that its counts agree.

    `progress`: it says on standard error how far it is.
    """
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, bool(done.stderr)) == (0, progress), done.stdout + done.stderr
    return done.stdout


def test_a_short_soak(tmp_path: Path) -> None:
    shown = run("soak", "--messages", "3000", "--every", "0.3", "--directory", str(tmp_path))
    assert "the counts agree" in shown
    assert "memory, MiB" in shown
    assert list(tmp_path.iterdir()) == []


def test_expiry_to_the_end_of_a_small_backlog(tmp_path: Path) -> None:
    sizes = ["--rows", "3000", "--recipients", "1", "300", "--seconds", "0.3", "--rounds", "1"]
    shown = run("expiry", *sizes, "--to-the-end", "--directory", str(tmp_path))
    assert shown.count("0 expired ones left: ok") == 2


def test_both_databases_side_by_side(tmp_path: Path) -> None:
    small = ["--table", "3000", "--expired", "20000", "--messages", "60", "--rounds", "1", "--seconds", "0.1"]
    shown = run("stores", "--parts", "table", "expiry", "relays", *small, "--directory", str(tmp_path))
    assert shown.count("into one of 3,000 rows") == 2
    assert shown.count("of 20,000 expired rows deleted beside two writers") == 2
    assert shown.count(" relay(s): ") == 4
    assert list(tmp_path.iterdir()) == []


def test_starts_are_measured(tmp_path: Path) -> None:
    short = ["--rounds", "1", "--ends", "own", "--directory", str(tmp_path)]
    runs = tmp_path / "runs.json"
    targets = ["--targets", "direct", "naive", "relay"]
    shown = run(
        "run", "--cases", "start", "start-again", *targets, *short, "--json", str(runs), progress=True
    )
    results = [json.loads(line) for line in runs.read_text("utf-8").splitlines()]
    measured = {(each["case"], each["target"]): each["values"] for each in results}
    assert measured.keys() == {("start", "naive"), ("start", "relay"), ("start-again", "relay")}
    assert all(values["start_ms"] > 0 for values in measured.values())
    assert all(0 <= values["stolen"] <= 100 for values in measured.values())
    assert [("help_ms" in values) for values in measured.values()] == [False, True, True]
    assert "start to greeting, ms | relay --help, ms |" in shown


def test_a_run_counts_messages_and_rows_and_makes_tables(tmp_path: Path) -> None:
    cases = ["keep", "recipients-10", "waiting-pipelined"]
    short = ["--rounds", "1", "--seconds", "0.1", "--ends", "own", "--directory", str(tmp_path)]
    targets = ["--targets", "direct", "naive", "bare", "relay"]
    runs = tmp_path / "runs.json"

    shown = run("run", "--cases", *cases, *targets, *short, "--json", str(runs), progress=True)

    results = [json.loads(line) for line in runs.read_text("utf-8").splitlines()]
    measured = {(result["case"], result["target"]): result["values"] for result in results}
    assert measured.keys() == {
        *(("keep", target) for target in ("direct", "naive", "bare", "relay")),
        ("recipients-10", "relay"),
        *(("waiting-pipelined", target) for target in ("direct", "relay")),
    }
    assert all(values["messages"] >= CASES[case].least for (case, _), values in measured.items())
    assert all(("cpu_ms" in values) == (target != "direct") for (_, target), values in measured.items())
    for case in ("keep", "waiting-pipelined"):
        assert f"### {case}: {CASES[case].title}" in shown
    assert "### recipients" in shown
    assert list(tmp_path.iterdir()) == [runs]


@dataclass
class Lossy:
    """A sink that has taken fewer messages than were sent, or more."""

    arrived: int
    port: int = 0

    def count(self) -> int:
        return self.arrived


@pytest.mark.parametrize("arrived", [9, 11])
def test_a_run_in_which_a_message_is_lost_or_doubled_does_not_count(arrived: int) -> None:
    with pytest.raises(RunError, match=f"10 messages sent, {arrived} arrived"):
        await_count(Lossy(arrived), 10, seconds=0.05)


def test_the_account_of_a_family_has_its_children(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    child = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {burn!r}]); time.sleep(60)"
    with running([sys.executable, "-c", child], tmp_path / "log") as family:
        while family.cpu_s() < 0.3:  # the time limit is pytest's
            family.check()
        assert family.process.pid in family.pids()
    assert family.process.returncode == -signal.SIGTERM


def test_so_has_the_account_from_proc(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    child = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {burn!r}]); time.sleep(60)"
    with running([sys.executable, "-c", child], tmp_path / "log", accounted=False) as family:
        assert isinstance(family.family, Descendants)
        while family.cpu_s() < 0.3:
            family.check()


def test_a_table_has_the_median_of_all_rounds_with_least_and_most() -> None:
    results = [
        Result("keep", target, number, {"rate": rate, "cpu_ms": cpu})
        for target, rates, cpu in (("relay", (10, 30, 20), 0.25), ("naive", (5, 5, 5), 1.0))
        for number, rate in enumerate(rates)
    ]
    (shown,) = report.tables(["keep"], ["naive", "relay", "slimta"], report.Runs(results))
    assert "| relay | 20.0 (10.0 - 30.0) | 0.250 |" in shown
    assert "| slimta | no run that counts |" in shown
    assert "relay/naive: messages/s 4.00 (2.00 - 6.00), CPU a message 0.25." in shown


def test_time_that_the_host_gave_to_others_is_told() -> None:
    quiet = [
        Result("keep", name, 0, {"cpu_ms": 0.3, "rate": 3000.0, "stolen": 0.4})
        for name in ("direct", "relay")
    ]
    busy = [Result("keep", "relay", 1, {"cpu_ms": 0.5, "rate": 2000.0, "stolen": 31.0})]
    assert "the host" not in report.tables(["keep"], ["direct", "relay"], report.Runs(quiet))[0]
    (told,) = report.tables(["keep"], ["direct", "relay"], report.Runs(quiet + busy))
    assert "of the processors' time the host gave others 0 (0 - 31) %." in told


def test_a_family_is_compared_with_its_first_step_and_a_recipient_has_its_price() -> None:
    costs = {"recipients-1": 0.2, "recipients-500": 5.19}
    results = [Result(case, "relay", 0, {"cpu_ms": cost}) for case, cost in costs.items()]
    (shown,) = report.tables(list(costs), ["direct", "relay"], report.Runs(results))
    assert "| 5.19 | 25.95 |" in shown
    assert "A recipient costs 10.0 µs of CPU." in shown


def test_what_is_missing_is_named() -> None:
    assert report.complaints({"exim": "exim4 is not installed"}, []) == [
        "Not measured: exim (exim4 is not installed)."
    ]
    for target in TARGETS.values():
        assert (
            target.missing()
            or target.version()
            or target.name in ("direct", "naive", "bare", "relay", "relay-python")
        )


def test_tables_go_between_the_markers_of_a_page_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nbehind\n", "utf-8")
    report.put(page, "new")
    assert page.read_text("utf-8") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nbehind\n"
    page.write_text("no place", "utf-8")
    with pytest.raises(ValueError, match="has no place"):
        report.put(page, "new")


def test_a_picture_has_a_bar_for_each_target_the_cheapest_first() -> None:
    picture = ET.fromstring(bars([("a & b", {"naive": 1.5, "relay": 0.2, "pipe": 0.05})]))
    bar = "{http://www.w3.org/2000/svg}rect"
    assert [each.get("class") for each in picture.iter(bar)] == ["bar", "bar own", "bar"]
    widths = [float(each.get("width", 0)) for each in picture.iter(bar)]
    assert widths == sorted(widths)
    assert widths[0] > 0
    texts = ["".join(each.itertext()) for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["a & b", "pipe", "0.050", "relay", "0.200", "naive", "1.50"]


def test_a_full_table_is_one_that_the_relay_takes_as_its_own(tmp_path: Path) -> None:
    path = tmp_path / "task_done.db"
    table.fill(path, 2000)
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*), count(DISTINCT task_id) FROM task_done").fetchone() == (
            2000,
            2000,
        )
        assert database.execute("SELECT count(*) FROM task_done_recipient").fetchone() == (2000,)
        first, last = database.execute("SELECT min(sent_at), max(sent_at) FROM task_done_send").fetchone()
        assert len(first) == len(last) == len("2026-11-23 07:46:00.123456")
        indexes = database.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
        assert {name for (name,) in indexes} >= {"ix_task_done_sent_at", "ix_task_done_recipient_recipient"}


def test_every_answer_beside_its_bare_query() -> None:
    command = [sys.executable, "-m", "bench.reading", "--rows", "5000", "--times", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `/")]
    assert [line.split("`")[1] for line in rows] == list(reading.ANSWERS)
