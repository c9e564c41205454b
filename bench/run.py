"""Measures the relay beside a direct send, a naive and a bare relay and the installed peers, over loopback.

    python -m bench.run [--quick] [--cases ...] [--targets ...] [--rounds N] [--seconds S] [--write]

Rules: sink, target and load are processes of their own. Every round of a case starts each target afresh, one
after the other, so that a slow minute of the machine meets all of them; medians are given with the least and
the most. What counts as a run, `measure.py` says. CPU-ms a message is the figure to trust; rates drift with
the machine. `--write` puts tables and picture into the documentation.
Exit status: 0 all runs counted, 1 some did not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import installed, report
from bench.cases import CASES, FAMILIES, QUICK
from bench.ends import tool
from bench.errors import RunError
from bench.measure import Result, measure
from bench.plot import bars
from bench.processes import ROOT
from bench.targets import TARGETS

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "benchmarks.svg"
PICTURED = ("keep", "short", "large")
QUICK_TARGETS = ("direct", "naive", "relay")


def main() -> int:
    """Run what the arguments ask for, print the tables, and write them where asked to."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here is ended here
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    missing = {name: why for name in arguments.targets if (why := TARGETS[name].missing())}
    targets = [name for name in arguments.targets if name not in missing]
    postfix = arguments.ends == "postfix" and all(tool(name) for name in ("smtp-source", "smtp-sink"))
    results: list[Result] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as scratch:
        about = _about(Path(scratch), postfix=postfix)
        print(about, flush=True)
        for case in arguments.cases:
            _run(case, targets, arguments, Path(scratch), results, failures, postfix=postfix)
    text = "\n\n".join(
        [
            f"{about}\nTaken on {time.strftime('%d %B %Y', time.gmtime())} by `{_command()}`.",
            report.described(targets),
            *report.complaints(missing, failures),
            *report.tables(arguments.cases, targets, report.Runs(results)),
        ]
    )
    print("\n" + text)
    if arguments.write:
        PICTURE.write_text(_picture(targets, report.Runs(results)), "utf-8")
        shown = f"![CPU-ms a message, by target]({PICTURE.name})"
        report.put(PAGE, f"{shown}\n\n{text}")
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of a second, a few cases, no peers")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--seconds", type=float, help="length of one timed run, about; default 3")
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help=f"{', '.join(CASES)}, or all of {', '.join(FAMILIES)}"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument(
        "--ends",
        choices=["postfix", "own"],
        default="postfix",
        help="who sends and takes: smtp-source and smtp-sink where installed (default), or bench.load and "
        "bench.sink",
    )
    parser.add_argument(
        "--directory", type=Path, help="where databases go; a real disk, or commits cost nothing"
    )
    parser.add_argument("--json", type=Path, help="add all runs to this file, one JSON object a line")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (1.0 if arguments.quick else 3.0)
    named = arguments.cases or (QUICK if arguments.quick else CASES)
    arguments.cases = [case for name in named for case in FAMILIES.get(name, [name])]
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}")
    arguments.targets = arguments.targets or list(QUICK_TARGETS if arguments.quick else TARGETS)
    return arguments


def _run(
    case: str,
    targets: Sequence[str],
    arguments: argparse.Namespace,
    scratch: Path,
    results: list[Result],
    failures: list[str],
    *,
    postfix: bool,
) -> None:
    """All rounds of a case; a target whose run does not count is left out of the rounds that follow."""
    chosen = CASES[case]
    taking_part = [
        name
        for name in targets
        if (not chosen.only or name in chosen.only) and not (name == "direct" and chosen.kind != "load")
    ]
    for number in range(arguments.rounds):
        for target in list(taking_part):
            directory = scratch / f"{case}-{number}-{target}"
            directory.mkdir()
            began = time.monotonic()
            try:
                result = measure(
                    chosen, TARGETS[target], number, arguments.seconds, directory, postfix=postfix
                )
            except (RunError, OSError, sqlite3.Error) as error:
                failures.append(f"{case}, {target}, round {number + 1}: {error}")
                taking_part.remove(target)
                print(f"  {failures[-1]}", file=sys.stderr, flush=True)
                continue
            results.append(result)
            if arguments.json:
                with arguments.json.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(asdict(result)) + "\n")
            values = ", ".join(f"{name} {value:,.3f}" for name, value in result.values.items())
            print(
                f"  {case:16}{target:16}round {number + 1}: {values} [{time.monotonic() - began:.0f} s]",
                file=sys.stderr,
                flush=True,
            )


def _picture(targets: Sequence[str], runs: report.Runs) -> str:
    panels = []
    for case in PICTURED:
        medians = {target: runs.median(case, target, "cpu_ms") for target in targets}
        known = {target: median for target, median in medians.items() if median}
        if known:
            panels.append((f"CPU-ms a message (logarithmic): {CASES[case].title}", known))
    return bars(panels)


def _about(directory: Path, *, postfix: bool) -> str:
    """The machine, and the ends."""
    ends = (
        "Postfix's `smtp-source` and `smtp-sink` for short, keep and large; slow: `smtp-source` and the sink "
        "of this project, else its client and its sink"
        if postfix
        else "client and sink of this project"
    )
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"relay {'compiled' if installed.compiled() else 'not compiled'}, "
        f"SQLite {sqlite3.sqlite_version}, fsync {_fsync_ms(directory):.2f} ms, "
        f"load {os.getloadavg()[0]:.1f} at the start; all on this machine, over loopback. Ends: {ends}."
    )


def _command() -> str:
    return shlex.join(["python", "-m", "bench.run", *sys.argv[1:]])


def _fsync_ms(directory: Path) -> float:
    times = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    sys.exit(main())
