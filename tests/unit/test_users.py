"""Logins against a file of users."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay import maillog
from relay.auth.hashing import Hasher
from relay.auth.userfile import UsersError
from relay.auth.users import MAX_CHECKS, Users
from relay.auth.verdict import Verdict
from relay.credentials import Password, Token

ENTRY = '[users."{name}"]\npassword = "{hashed}"\n'


class Counting(Hasher):
    """A hasher that tells which checks were made, and waits in each for `gate`."""

    def __init__(self) -> None:
        super().__init__(memory_kib=8, passes=1)
        self.checks: list[tuple[str, str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def matches(self, hashed: str, password: str) -> bool:
        self.checks.append((hashed, password))
        assert self.gate.wait(30)
        return super().matches(hashed, password)


@pytest.fixture
def hasher() -> Counting:
    return Counting()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "users.toml"


@pytest.fixture
def write(file: Path, hasher: Counting) -> Callable[..., None]:
    """Writes a file of users, name and password each, as the command does: by an atomic replacement."""
    known: dict[tuple[str, str], str] = {}

    def write(_text: str = "", **passwords: str) -> None:
        for item in passwords.items():
            known.setdefault(item, hasher.hash(item[1]))
        entries = [ENTRY.format(name=item[0], hashed=known[item]) for item in passwords.items()]
        new = file.with_suffix(".new")
        new.write_text("".join(entries) + _text)
        new.replace(file)

    return write


@pytest.fixture
def opened(file: Path, hasher: Counting) -> Iterator[Callable[[], Users]]:
    with contextlib.ExitStack() as stack:

        def make() -> Users:
            users = Users(file, hasher)
            stack.callback(users.close)
            return users

        yield make


@pytest.fixture
def users(write: Callable[..., None], opened: Callable[[], Users]) -> Users:
    write(app="sesame", shop="orchid")
    return opened()


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    stream = io.BytesIO()
    maillog.configure("json", "info", stream)

    def lines() -> list[dict[str, Any]]:
        maillog.flush()
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield lines
    maillog.configure("json", "info")


def refused(verdict: Verdict) -> bool:
    assert verdict.user == ""
    assert verdict.senders is None
    assert verdict.credentials is None
    return verdict.outcome == "failed" and str(verdict.reply) == (
        "535 5.7.8 User name or password are not right"
    )


# --------------------------------------------------------------------------------------------- logins


async def test_the_right_password(users: Users) -> None:
    verdict = await users.login(Password("app", "sesame"))

    assert str(verdict.reply) == "235 2.7.0 Logged in"
    assert verdict[1:5] == ("ok", "app", None, None)
    assert users.mechanisms == ("PLAIN", "LOGIN")


async def test_the_usual_cost(file: Path) -> None:
    file.write_text(ENTRY.format(name="app", hashed=Hasher().hash("sesame")))
    users = Users(file)

    assert (await users.login(Password("app", "sesame"))).outcome == "ok"
    assert refused(await users.login(Password("app", "wrong")))
    users.close()


@pytest.mark.parametrize(
    "credentials",
    [
        Password("app", "wrong"),
        Password("app", "orchid"),
        Password("app", ""),
        Password("app", "sesame "),
        Password("App", "sesame"),
        Password("nobody", "sesame"),
        Password("*", "sesame"),
        Password("app", "sesame", "shop"),
        Password("app", "sesame", "root"),
        Password("shop", "sesame", "app"),
        Token("XOAUTH2", "app", b"user=app\x01auth=Bearer sesame\x01\x01"),
    ],
    ids=lambda credentials: f"{credentials.user}",
)
async def test_everybody_else_hears_the_same(users: Users, credentials: Password) -> None:
    assert refused(await users.login(credentials))
    for user, password in (("app", "sesame"), ("shop", "orchid")):
        assert (await users.login(Password(user, password))).outcome == "ok"
    assert refused(await users.login(credentials))


async def test_one_may_name_itself_as_the_one_to_act_as(users: Users) -> None:
    assert (await users.login(Password("app", "sesame", "app"))).user == "app"


async def test_an_unknown_user_costs_as_much_and_gets_nowhere(users: Users, hasher: Counting) -> None:
    for password in ("sesame", "orchid", "wrong"):
        assert refused(await users.login(Password("nobody", password)))

    hashes = {hashed for hashed, _ in hasher.checks}
    assert len(hasher.checks) == 3
    assert len(hashes) == 1
    assert hashes <= {user.hashed for user in users._users.values()}


async def test_a_file_without_users_lets_nobody_in(write: Callable[..., None], opened: Any) -> None:
    write()
    assert refused(await opened().login(Password("app", "sesame")))


async def test_senders(write: Callable[..., None], file: Path, opened: Any) -> None:
    write('senders = ["*@example.com", "<>"]\n', app="sesame")
    assert (await opened().login(Password("app", "sesame"))).senders == ("*@example.com", "<>")


async def test_a_damaged_hash_is_no_wrong_password(
    file: Path, opened: Any, hasher: Counting, log: Callable[[], list[dict[str, Any]]]
) -> None:
    damaged = f"$argon2id$v=19$m=8,t=1,p=1${'c29tZXNhbHRzb21lc2FsdB'}${'A' * 43}"
    file.write_text(ENTRY.format(name="app", hashed=damaged))
    users = opened()

    verdict = await users.login(Password("app", "sesame"))
    assert verdict.reply.code == 454
    assert verdict.outcome == "unavailable"
    assert refused(await users.login(Password("nobody", "sesame")))
    (line,) = log()
    assert (line["event"], line["user"]) == ("user not checked", "app")


# ------------------------------------------------------------------------------------ what is remembered


async def test_a_success_is_remembered(users: Users, hasher: Counting) -> None:
    for authorization in ("", "app", ""):
        assert (await users.login(Password("app", "sesame", authorization))).user == "app"

    assert len(hasher.checks) == 1


async def test_a_failure_is_not_remembered_and_does_not_ride_on_a_success(
    users: Users, hasher: Counting
) -> None:
    assert (await users.login(Password("app", "sesame"))).user == "app"
    for _ in range(3):
        assert refused(await users.login(Password("app", "wrong")))
        assert refused(await users.login(Password("shop", "sesame")))

    assert len(hasher.checks) == 7
    assert (await users.login(Password("app", "sesame"))).user == "app"
    assert len(hasher.checks) == 7


async def test_what_is_remembered_ends_with_the_password(
    users: Users, write: Callable[..., None], hasher: Counting
) -> None:
    assert (await users.login(Password("app", "sesame"))).outcome == "ok"
    assert (await users.login(Password("shop", "orchid"))).outcome == "ok"

    write(app="another", shop="orchid")
    assert refused(await users.login(Password("app", "sesame")))
    assert (await users.login(Password("app", "another"))).outcome == "ok"
    assert len(hasher.checks) == 4

    assert (await users.login(Password("shop", "orchid"))).outcome == "ok"
    assert len(hasher.checks) == 4  # the entry of this user is as it was


async def test_a_user_that_is_taken_out_is_out(users: Users, write: Callable[..., None]) -> None:
    assert (await users.login(Password("app", "sesame"))).outcome == "ok"
    write(shop="orchid")
    assert refused(await users.login(Password("app", "sesame")))
    write(app="sesame", shop="orchid")
    assert (await users.login(Password("app", "sesame"))).outcome == "ok"


async def test_senders_follow_the_file_though_the_password_is_remembered(
    users: Users, write: Callable[..., None], hasher: Counting
) -> None:
    assert (await users.login(Password("app", "sesame"))).senders is None
    write('senders = ["a@example.com"]\n', app="sesame")
    assert (await users.login(Password("app", "sesame"))).senders == ("a@example.com",)
    assert len(hasher.checks) == 1


async def test_a_password_that_changes_while_it_is_checked(
    users: Users, write: Callable[..., None], hasher: Counting
) -> None:
    hasher.gate.clear()
    login = asyncio.ensure_future(users.login(Password("app", "sesame")))
    while not hasher.checks:
        await asyncio.sleep(0.001)
    write(app="another")
    assert users.refresh()
    hasher.gate.set()

    assert (await login).outcome == "unavailable"
    assert refused(await users.login(Password("app", "sesame")))


# ------------------------------------------------------------------------------------------- many at once


async def test_the_same_login_at_the_same_time_is_checked_once(users: Users, hasher: Counting) -> None:
    verdicts = await asyncio.gather(*(users.login(Password("app", "sesame")) for _ in range(MAX_CHECKS * 2)))

    assert {verdict.outcome for verdict in verdicts} == {"ok"}
    assert len(hasher.checks) == 1


async def test_what_waits_is_bounded_and_remembered_logins_do_not_wait(
    users: Users, hasher: Counting
) -> None:
    assert (await users.login(Password("shop", "orchid"))).outcome == "ok"
    hasher.gate.clear()
    guesses = [
        asyncio.ensure_future(users.login(Password("app", f"guess {number}"))) for number in range(MAX_CHECKS)
    ]
    await asyncio.sleep(0)

    verdict = await users.login(Password("app", "sesame"))
    assert str(verdict.reply) == "454 4.7.0 Logins cannot be checked now, try again later"
    assert verdict.outcome == "unavailable"
    assert (await users.login(Password("shop", "orchid"))).outcome == "ok"

    hasher.gate.set()
    assert all(map(refused, await asyncio.gather(*guesses)))
    assert (await users.login(Password("app", "sesame"))).outcome == "ok"


async def test_a_session_that_ends_frees_its_place_only_when_its_check_ends(
    users: Users, hasher: Counting
) -> None:
    hasher.gate.clear()
    guesses = [
        asyncio.ensure_future(users.login(Password("app", f"guess {number}"))) for number in range(MAX_CHECKS)
    ]
    await asyncio.sleep(0)
    for guess in guesses:
        guess.cancel()
    await asyncio.gather(*guesses, return_exceptions=True)

    assert (await users.login(Password("app", "sesame"))).outcome == "unavailable"
    hasher.gate.set()
    while users._checks:
        await asyncio.sleep(0.001)
    assert (await users.login(Password("app", "sesame"))).outcome == "ok"


async def test_one_of_two_with_the_same_login_may_go(users: Users, hasher: Counting) -> None:
    hasher.gate.clear()
    gone, stays = (asyncio.ensure_future(users.login(Password("app", "sesame"))) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    hasher.gate.set()

    assert (await stays).outcome == "ok"
    assert gone.cancelled()


# --------------------------------------------------------------------------------------- the file changes


def test_a_file_with_a_mistake_is_refused_at_first(file: Path, opened: Any) -> None:
    file.write_text("[users.app]\n")
    with pytest.raises(UsersError, match="app: password: missing"):
        opened()


async def test_a_mistake_leaves_the_users_that_were_and_is_told_once(
    users: Users, file: Path, write: Callable[..., None], log: Callable[[], list[dict[str, Any]]]
) -> None:
    write("[users.shop]\n", app="another")
    for _ in range(3):
        assert users.refresh() is False
        assert (await users.login(Password("app", "sesame"))).outcome == "ok"
        assert (await users.login(Password("shop", "orchid"))).outcome == "ok"

    file.unlink()
    for _ in range(3):
        assert users.refresh() is False
        assert (await users.login(Password("app", "sesame"))).outcome == "ok"

    write(app="another")
    assert users.refresh() is True
    assert users.refresh() is False
    assert refused(await users.login(Password("shop", "orchid")))

    lines = [(line["event"], line.get("reasons") or line["users"]) for line in log()]
    assert lines == [
        ("users not read", [f"{file}: shop: password: missing, or no text: relay user add makes it"]),
        ("users not read", [f"{file}: no such file: relay user add makes it"]),
        ("users read", 1),
    ]


def test_the_same_users_in_a_new_file_are_no_change(users: Users, write: Callable[..., None]) -> None:
    write("# a comment\n", app="sesame", shop="orchid")
    assert users.refresh() is False
