"""`relay user`."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.auth.hashing import Hasher
from relay.auth.userfile import read
from relay.cli import main

COMMAND = [sys.executable, "-m", "relay", "user"]
HASH = Hasher(memory_kib=8, passes=1).hash("orchid")
SHOP = f'[users.shop]\npassword = "{HASH}"\nsenders = ["*@example.com", "<>"]\n'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)


@pytest.fixture
def file() -> Path:
    path = Path("users.toml")
    path.write_text(SHOP)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with `password` on standard input; returns its status and what it wrote."""

    def run(*arguments: str, password: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(password)))
        status = main(["user", *arguments])
        return status, *capsys.readouterr()

    return run


ON_THIS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A program that makes its standard input the terminal of its session, so that Ctrl-C reaches it."""


def type_in(arguments: list[str], typed: list[tuple[str, str]]) -> tuple[int, str]:
    """Run the command on a terminal; answer each prompt. Return its status and what the terminal showed."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_THIS_TERMINAL, *COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown, seen, answer = "", 0, ""
    try:
        for prompt, answer in typed:
            while prompt not in shown[seen:]:
                shown += os.read(terminal, 1024).decode()
            seen = len(shown)
            os.write(terminal, answer.encode())
        while octets := read_rest(terminal, answer):
            shown += octets.decode()
        return process.wait(50), shown
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def read_rest(terminal: int, answer: str) -> bytes:
    """Read on; a single key is typed again, as a person would: Python can miss it on the way to a read."""
    try:
        while not select.select([terminal], [], [], 1)[0]:
            if len(answer) == 1:
                os.write(terminal, answer.encode())
        return os.read(terminal, 1024)
    except OSError:  # how Linux says that nobody is at the other end
        return b""


def test_a_password_from_standard_input(run: Run, file: Path) -> None:
    added = run("add", "app", "--file", "users.toml", password=b"sesame \r\nnext line\n")

    assert added == (0, "app added to users.toml\n", "")
    users = read(file)
    assert Hasher().matches(users["app"].hashed, "sesame ")
    assert users["app"].senders is None
    assert users["shop"].hashed == HASH


def test_the_first_user(run: Run, tmp_path: Path) -> None:
    assert run("add", "app", "--file", "new.toml", "--sender", "a@example.com", password=b"x")[0] == 0
    assert read(tmp_path / "new.toml")["app"].senders == ("a@example.com",)


def test_a_password_on_a_terminal_is_asked_for_twice_and_not_shown(file: Path) -> None:
    typed = [("Password for app: ", "sesame\n"), ("Once more: ", "sesam\n")]
    typed += [("Password for app: ", "sesame\n"), ("Once more: ", "sesame\n")]
    status, shown = type_in(["add", "app", "--file", "users.toml"], typed)

    assert status == 0
    assert "do not match" in shown
    assert shown.endswith("app added to users.toml\r\n")
    assert "sesam" not in shown
    assert Hasher().matches(read(file)["app"].hashed, "sesame")


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_a_password_that_nobody_types(file: Path, key: str) -> None:
    status, shown = type_in(["add", "app", "--file", "users.toml"], [("Password for app: ", key)])

    assert status == 130
    assert shown.split() == ["Password", "for", "app:"]
    assert file.read_text() == SHOP


def test_an_existing_user(run: Run, file: Path) -> None:
    refused = run("add", "shop", "--file", "users.toml", password=b"sesame\n")
    assert refused == (1, "", "relay: shop exists already: --force gives it a new password\n")
    assert file.read_text() == SHOP

    changed = run("add", "shop", "--force", "--file", "users.toml", password=b"sesame\n")
    assert changed == (0, "shop changed in users.toml\n", "")
    assert Hasher().matches(read(file)["shop"].hashed, "sesame")
    assert read(file)["shop"].senders == ("*@example.com", "<>")


def test_remove(run: Run, file: Path) -> None:
    assert run("remove", "shop", "--file", "users.toml") == (0, "shop removed from users.toml\n", "")
    assert read(file) == {}
    assert run("remove", "shop", "--file", "users.toml") == (
        1,
        "",
        "relay: shop is no user in users.toml\n",
    )


def test_list(run: Run, file: Path) -> None:
    file.write_text(SHOP + f'[users."ü@example.com"]\npassword = "{HASH}"\n')
    assert run("list", "--file", "users.toml") == (
        0,
        "USER           SENDERS\nshop           *@example.com, <>\nü@example.com  any\n",
        "",
    )
    status, out, _ = run("list", "--file", "users.toml", "--format", "json")
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"user": "shop", "senders": ["*@example.com", "<>"]},
        {"user": "ü@example.com", "senders": None},
    ]
    status, out, _ = run("list", "--file", "users.toml", "--format", "csv")
    assert status == 0
    assert out == "user,senders\nshop,*@example.com <>\nü@example.com,\n"


@pytest.mark.parametrize("output", ["table", "json", "csv"])
def test_an_output_that_claims_to_know_ascii_alone(
    file: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    file.write_text(f'[users."ü"]\npassword = "{HASH}"\n')
    arguments = ["list", "--file", "users.toml", "--format", output]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "ü".encode() in done.stdout or b"\\u00fc" in done.stdout


def test_a_list_of_nobody(run: Run, file: Path) -> None:
    file.write_text("")
    assert run("list", "--file", "users.toml") == (0, "", "relay: no users found\n")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "relay: missing command; see relay --help"),
        (["add"], 2, "relay: missing argument 'NAME'; see relay --help"),
        (["add", "a b"], 2, "relay: invalid value for 'NAME': a user name has no blanks"),
        (["add", "a", "--sender", "*"], 2, "relay: invalid value for '--sender': must be an address"),
        (["list", "--config", "a", "--file", "b"], 2, "relay: invalid value for '--file': takes the place"),
        (["list"], 2, "relay: config/relay.toml: no such file: "),
        (["list", "--config", "relay.toml"], 2, "relay: relay.toml: clients.users_file: not set: name"),
        (["list", "--file", "none"], 1, "relay: none: no such file: relay user add makes it"),
        (["remove", "a", "--file", "none"], 1, "relay: none: no such file"),
        (["add", "a", "--file", "no/where"], 1, "relay: no/where: no such directory"),
        (["add", "a", "--file", "bad"], 1, "relay: bad: users: must be tables [users.NAME]"),
        (["remove", "a", "--file", "bad"], 1, "relay: bad: users: must be tables [users.NAME]"),
        (["remove", "a", "--file", "."], 1, "relay: .: cannot be changed: Is a directory"),
        (["add", "a", "--file", "bad/x"], 1, "relay: bad/x: cannot be changed: Not a directory"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_a_line(run: Run, arguments: list[str], status: int, message: str) -> None:
    Path("relay.toml").write_text('[[upstreams]]\naddress = "smtp.example.com:587"\n')
    Path("bad").write_text("users = 1\n")

    found, out, error = run(*arguments, password=b"sesame\n")
    assert (found, out) == (status, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("password", [b"", b"\n", b"\r\n", b"\xff\n", b"a\0b\n"])
def test_what_is_no_password(run: Run, file: Path, password: bytes) -> None:
    status, out, error = run("add", "app", "--file", "users.toml", password=password)
    assert (status, out) == (1, "")
    assert error.startswith(("relay: a password is needed", "relay: the password on standard input is not"))
    assert error.count("\n") == 1
    assert file.read_text() == SHOP


def test_the_file_that_the_configuration_names(run: Run, file: Path) -> None:
    Path("relay.toml").write_text(
        '[clients]\nauth = "users"\nauth_without_tls = true\nusers_file = "users.toml"\n'
        '[[upstreams]]\naddress = "smtp.example.com:587"\n'
    )
    added = run("add", "app", "--config", "relay.toml", password=b"sesame\n")
    assert added == (0, "app added to users.toml\n", "")
    assert run("list", "--config", "relay.toml")[1].splitlines()[1].split()[0] == "shop"
    assert set(read(file)) == {"shop", "app"}


def test_an_upstreams_password_is_not_asked_for(run: Run, file: Path) -> None:
    """Under systemd the service alone has it."""
    Path("relay.toml").write_text(
        '[clients]\nauth = "users"\nauth_without_tls = true\nusers_file = "users.toml"\n'
        '[[upstreams]]\naddress = "smtp.example.com:587"\nusername = "relay"\n'
    )
    assert run("list", "--config", "relay.toml")[0] == 0


def test_a_configuration_without_users(run: Run) -> None:
    Path("relay.toml").write_text(
        '[clients]\nauth = "passthrough"\nauth_without_tls = true\npassthrough_to = "primary"\n'
        '[[upstreams]]\nname = "primary"\naddress = "smtp.example.com:587"\n'
    )
    status, _, error = run("list", "--config", "relay.toml")
    assert (status, error) == (
        2,
        "relay: relay.toml: clients.users_file: not set: name the file there, or give --file FILE\n",
    )
