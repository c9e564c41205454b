"""Runs the chaos of `tests/support/chaos.py` for as long as one likes, and prints what it came to.

    python -m bench.chaos [--rounds N] [--episodes N] [--seed S] [--directory DIR]

Rules: each round begins with empty files and a seed of its own, counted up from the first one; what it prints
is enough to begin the same round again. As root, where a small file system may be mounted, the disk is full
now and then. Applications and upstreams run in this process, the relay in one of its own.
Exit status: 0 no round had a finding, 1 some had, and their files are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.support.chaos import Chaos, Report, small_disk


def main() -> int:
    """Run the rounds, print each and the sum, return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--episodes", type=int, default=100, help="starts of the relay in a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where files go; a real disk")
    arguments = parser.parse_args()
    reports = []
    for number in range(arguments.rounds):
        seed = arguments.seed + number
        began = time.monotonic()
        report = _round(seed, arguments.episodes, arguments.directory)
        print(f"seed {seed}, {time.monotonic() - began:.0f} s\n{report}\n", flush=True)
        reports.append(report)
    kills = sum(report.figures.kills for report in reports)
    messages = sum(report.figures.messages for report in reports)
    tries = sum(report.figures.tries for report in reports)
    in_doubt = sum(report.figures.in_doubt for report in reports)
    faults = sum(report.faults.total() for report in reports)
    findings = sum(len(report.findings) for report in reports)
    print(
        f"{messages:,} messages in {tries:,} tries, {kills:,} kills, {faults:,} faults of connections, "
        f"{in_doubt:,} tries in doubt: {findings} findings"
    )
    return 1 if findings else 0


def _round(seed: int, episodes: int, parent: Path | None) -> Report:
    directory = Path(tempfile.mkdtemp(prefix=f"bench-chaos-{seed}-", dir=parent))
    with small_disk(directory / "data", 32 + episodes) as disk:
        report = asyncio.run(Chaos(directory, seed=seed, disk=disk).run(episodes))
        if report.findings and disk:
            shutil.copytree(directory / "data", directory / "data-kept")
    if not report.findings:
        shutil.rmtree(directory)
    return report


if __name__ == "__main__":
    sys.exit(main())
