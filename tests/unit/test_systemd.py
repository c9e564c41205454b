"""The variables of sd_listen_fds(3) and sd_notify(3): what they say, and that they are gone afterwards.

What is passed to a process that really starts is shown in tests/crash/test_activation.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay import systemd
from relay.systemd import ActivationError, Inherited, Supervisor, inherited


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Two sockets at descriptors one after the other, the first of which is the first that is passed."""
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    # A block of descriptors of its own, as 3 and 4 belong to somebody here.
    for place, each in enumerate(found, 200):
        os.dup2(each.fileno(), place, inheritable=True)
    monkeypatch.setattr(systemd, "FIRST", 200)
    yield found
    for each in found:
        each.close()
    for place in (200, 201):
        try:
            os.close(place)
        except OSError:
            continue


def environment(**over: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "smtp:local"} | over


def close(found: tuple[Inherited, ...]) -> None:
    for each in found:
        each.socket.close()


def test_sockets_are_taken_by_name_and_the_variables_are_gone(passed: list[socket.socket]) -> None:
    environ = environment(OTHER="stays")
    found = inherited(environ)
    assert [each.name for each in found] == ["smtp", "local"]
    for mine, theirs in zip(found, passed, strict=True):
        assert mine.socket.getsockname() == theirs.getsockname()
        assert not mine.socket.get_inheritable()
    assert environ == {"OTHER": "stays"}
    close(found)


@pytest.mark.parametrize("names", ["", "smtp"])
def test_a_socket_without_a_name(names: str, passed: list[socket.socket]) -> None:
    found = inherited(environment(LISTEN_FDNAMES=names))
    assert found[1].name == "unknown"
    close(found)


@pytest.mark.parametrize("process", ["1", "", "none"])
def test_sockets_of_another_process_are_left_alone(process: str, passed: list[socket.socket]) -> None:
    environ = environment(LISTEN_PID=process)
    assert inherited(environ) == ()
    assert environ == {}


def test_without_variables_there_is_nothing() -> None:
    assert inherited({}) == ()


@pytest.mark.parametrize("count", ["", "two", "-1", "²"])
def test_a_number_that_is_none(count: str) -> None:
    with pytest.raises(ActivationError, match="LISTEN_FDS"):
        inherited(environment(LISTEN_FDS=count))


def test_what_is_no_socket_is_named(passed: list[socket.socket], tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        os.dup2(file.fileno(), 201)
    with pytest.raises(ActivationError, match=r"descriptor 201 \(local\) .* is no socket"):
        inherited(environment())


def test_what_is_not_open_is_named(passed: list[socket.socket]) -> None:
    os.close(201)
    with pytest.raises(ActivationError, match=r"descriptor 201 \(local\) .* is no socket: Bad file"):
        inherited(environment())


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_does_not_listen_is_named(kind: int, passed: list[socket.socket]) -> None:
    with socket.socket(socket.AF_INET, kind) as wrong:
        os.dup2(wrong.fileno(), 201)
    with pytest.raises(ActivationError, match=r"descriptor 201 \(local\) .* no listening stream socket"):
        inherited(environment())


# ----------------------------------------------------------------------------------------- sd_notify


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and its address as NOTIFY_SOCKET has it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@relay-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        heard.settimeout(10)
        yield heard, name


def test_what_the_manager_hears(manager: tuple[socket.socket, str]) -> None:
    heard, name = manager
    environ = {"NOTIFY_SOCKET": name, "HOME": "/"}
    supervisor = Supervisor.of(environ)
    assert environ == {"HOME": "/"}
    supervisor.ready("listening on 127.0.0.1:2525")
    assert heard.recv(100) == b"READY=1\nSTATUS=listening on 127.0.0.1:2525"
    supervisor.reloading()
    state, since = heard.recv(100).split(b"\n")
    assert state == b"RELOADING=1"
    assert since.removeprefix(b"MONOTONIC_USEC=").isdigit()
    supervisor.stopping()
    assert heard.recv(100).startswith(b"STOPPING=1\n")
    supervisor.close()
    supervisor.ready("nobody hears this")


@pytest.mark.parametrize("process", ["", str(os.getpid())], ids=["anybody", "this process"])
def test_the_watchdog_hears_of_us_at_half_its_time(process: str, manager: tuple[socket.socket, str]) -> None:
    heard, name = manager
    supervisor = Supervisor.of({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": process})
    assert supervisor.watchdog_s == 4.0
    for now in (10.0, 11.0, 11.9, 12.0, 13.0, 14.5):
        supervisor.alive(now)
    supervisor.stopping()
    told = [heard.recv(100) for _ in range(4)]
    assert told[:3] == [b"WATCHDOG=1"] * 3  # at 10, 12 and 14.5
    assert told[3].startswith(b"STOPPING")
    supervisor.close()


@pytest.mark.parametrize(
    "environ",
    [
        {"WATCHDOG_USEC": "4000000"},
        {"NOTIFY_SOCKET": "/nobody", "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "/nobody", "WATCHDOG_USEC": "soon"},
    ],
)
def test_no_watchdog(environ: dict[str, str]) -> None:
    supervisor = Supervisor.of(environ)
    assert supervisor.watchdog_s == 0.0
    supervisor.alive(10.0)
    supervisor.close()
    assert environ == {}


def test_a_manager_that_does_not_read_holds_nobody_up(manager: tuple[socket.socket, str]) -> None:
    heard, name = manager
    supervisor = Supervisor(notify=name)
    for _ in range(5000):  # far more than a queue of datagrams holds
        supervisor.ready("again")
    heard.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            heard.recv(100)
    supervisor.ready("now it reads")
    assert heard.recv(100).endswith(b"now it reads")
    supervisor.close()


def test_a_manager_that_is_gone_is_reported_once(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    supervisor = Supervisor(notify=str(tmp_path / "nobody"))
    supervisor.ready("one")
    supervisor.ready("two")
    out = capfdbinary.readouterr().out
    assert out.count(b"the service manager cannot be told: No such file or directory") == 1
