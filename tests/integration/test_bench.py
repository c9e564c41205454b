"""The scripts of `bench` run: in short here, in full by hand. Nothing here depends on how fast they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str) -> str:
    """Run a script; return what it printed. It must end with status 0, which says that its counts agree."""
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@pytest.mark.timeout(120)
def test_a_short_soak(tmp_path: Path) -> None:
    shown = run("soak", "--messages", "3000", "--every", "0.3", "--directory", str(tmp_path))
    assert "the counts agree" in shown
    assert "memory, MiB" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_expiry_to_the_end_of_a_small_backlog(tmp_path: Path) -> None:
    sizes = ["--rows", "3000", "--recipients", "1", "300", "--seconds", "0.3", "--rounds", "1"]
    shown = run("expiry", *sizes, "--to-the-end", "--directory", str(tmp_path))
    assert shown.count("0 expired ones left: ok") == 2
