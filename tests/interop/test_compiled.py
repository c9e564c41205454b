"""The compiled message path: made as for a wheel, put into a copy of the sources, and held to their tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.process import ROOT

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not shutil.which("cc"), reason="cc is not installed: apt-get install gcc"),
    pytest.mark.skipif(
        not Path(sysconfig.get_path("include"), "Python.h").exists(),
        reason="this Python has no Python.h: apt-get install python3-dev",
    ),
]

HELD_TO = [
    *("tests/vectors", "tests/unit/test_classify.py", "tests/unit/test_commands.py"),
    *("tests/unit/test_body.py", "tests/unit/test_recorder.py", "tests/unit/test_maillog.py"),
    *("tests/integration/test_end_to_end.py", "tests/integration/test_dialogs.py"),
    *("tests/integration/test_chunking.py", "tests/integration/test_limits.py"),
    *("tests/integration/test_in_doubt.py", "tests/integration/test_memory.py"),
    *("tests/integration/test_reload.py", "tests/integration/test_several_upstreams.py"),
]
"""What goes through every module that is compiled; processes of the relay among them."""
PATCHED = (
    "test_every_event_is_tried_here",
    "test_a_doubt_that_cannot_be_kept_changes_nothing_for_the_client",
    "test_what_the_store_has_already_makes_no_entry",
    "test_what_the_spool_has_already_makes_no_entry",
    "test_more_recipients_than_a_slot_holds",
    "test_a_write_that_never_ends_is_cancelled_in_the_end",
    "test_a_disk_that_does_not_answer",
)
"""Tests among them that put something else in the place of a method, look into a function, or shorten a wait
that is a constant there."""


def wheel(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    return subprocess.run(
        command,
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | environment,
    )


def test_it_is_held_to_the_tests_of_the_sources(tmp_path: Path) -> None:
    done = wheel(tmp_path, RELAY_COMPILE="always")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = tmp_path.glob("*.whl")
    copy = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "data", "node_modules", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    with zipfile.ZipFile(found) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(copy, modules)
    assert any(name.startswith("relay/transaction.") for name in modules)
    which = [sys.executable, "-c", "import relay.transaction; print(relay.transaction.__file__)"]
    what_runs = subprocess.run(which, cwd=copy, check=True, capture_output=True, text=True, timeout=60).stdout
    assert what_runs.startswith(str(copy))
    assert what_runs.strip().endswith(".so")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *HELD_TO]
    command += ["-k", " and ".join(f"not {name}" for name in PATCHED)]
    tests = subprocess.run(
        command, cwd=copy, check=False, capture_output=True, text=True, timeout=3000, env=os.environ
    )
    assert tests.returncode == 0, tests.stdout[-6000:]
    assert " passed" in tests.stdout


def test_without_a_compiler_the_sources_are_the_wheel(tmp_path: Path) -> None:
    nothing = tmp_path / "bin"
    nothing.mkdir()
    done = wheel(tmp_path, PATH=str(nothing))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tmp_path.glob("*.whl")
    assert found.name.endswith("-py3-none-any.whl")
    assert "there is no C compiler" in done.stdout + done.stderr
    refused = wheel(tmp_path, PATH=str(nothing), RELAY_COMPILE="always")
    assert refused.returncode != 0
    assert "there is no C compiler" in refused.stderr


def test_nobody_who_does_not_want_it_gets_it(tmp_path: Path) -> None:
    assert wheel(tmp_path, RELAY_COMPILE="never").returncode == 0
    (found,) = tmp_path.glob("*.whl")
    assert found.name.endswith("-py3-none-any.whl")


def test_another_wish_is_refused(tmp_path: Path) -> None:
    done = wheel(tmp_path, RELAY_COMPILE="perhaps")
    assert done.returncode != 0
    assert "it can be auto, always, never" in done.stderr
    assert not list(tmp_path.glob("*.whl"))
