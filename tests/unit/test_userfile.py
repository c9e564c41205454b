"""The file of users."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.auth.hashing import Hasher
from relay.auth.userfile import User, UsersError, name_problem, parse, read, sender_problem

HASH = Hasher(memory_kib=8, passes=1).hash("sesame")
FILE = Path("users.toml")


def test_users_with_and_without_senders() -> None:
    text = f"""
        [users.app]
        password = "{HASH}"
        [users."shop@example.com"]
        password = "{HASH}"
        senders = ["*@example.com", "<>"]
    """
    assert parse(text.encode(), FILE) == {
        "app": User(HASH, None),
        "shop@example.com": User(HASH, ("*@example.com", "<>")),
    }


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "[users]\n"])
def test_a_file_without_users_is_one(text: str) -> None:
    assert parse(text.encode(), FILE) == {}


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("users = 1", ["users: must be tables [users.NAME]"]),
        ("users = []", ["users: must be tables [users.NAME]"]),
        ("[app]\npassword = 'x'", ["app: unknown key; users stand in tables [users.NAME]"]),
        ("[users]\napp = 'x'", ["app: must be a table with a password"]),
        ("[users.app]", ["app: password: missing, or no text: relay user add makes it"]),
        ("[users.app]\npassword = 5", ["app: password: missing, or no text: relay user add makes it"]),
        (
            "[users.app]\npassword = 'sesame'",
            ["app: password: is no argon2id hash: relay user add makes one"],
        ),
        (
            f"[users.app]\npassword = '{HASH}'\nsender = []",
            ['app: sender: unknown key; a user has "password" and "senders"'],
        ),
        (
            f"[users.app]\npassword = '{HASH}'\nsenders = []",
            ["app: senders: must be a list of patterns; leave it out for any sender"],
        ),
        (
            f"[users.app]\npassword = '{HASH}'\nsenders = '*@example.com'",
            ["app: senders: must be a list of patterns; leave it out for any sender"],
        ),
        (
            f"[users.app]\npassword = '{HASH}'\nsenders = ['*@example.com', 'example.com', 5]",
            [
                (
                    "app: senders.1: must be an address, * in it for anything (*@example.com), "
                    "or <> for the null reverse-path"
                ),
                "app: senders.2: must be text",
            ],
        ),
        (
            f"[users.'a b']\npassword = '{HASH}'",
            ["a b: a user name has no blanks and no characters that do not print"],
        ),
        (
            f'[users."a\\u001b"]\npassword = "{HASH}"\n[users.""]\npassword = "{HASH}"',
            [
                "a\\x1b: a user name has no blanks and no characters that do not print",
                ": a user name is needed",
            ],
        ),
    ],
)
def test_all_mistakes_are_told_and_no_hash_is_shown(text: str, problems: list[str]) -> None:
    with pytest.raises(UsersError) as caught:
        parse(text.encode(), FILE)
    assert caught.value.problems == [f"users.toml: {problem}" for problem in problems]
    assert "$argon2id" not in str(caught.value)


@pytest.mark.parametrize(
    ("octets", "problem"),
    [
        (b"[users.app", "is not TOML: "),
        (b"[users.app]\n[users.app]\n", "is not TOML: "),
        (b"\xff", "is not UTF-8"),
        (b"a = " + b"[" * 5000, "is not TOML: "),
    ],
)
def test_what_is_no_file_of_users(octets: bytes, problem: str) -> None:
    with pytest.raises(UsersError) as caught:
        parse(octets, FILE)
    (line,) = caught.value.problems
    assert line.startswith(f"users.toml: {problem}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsersError) as caught:
        read(tmp_path / "users.toml")
    assert caught.value.problems == [f"{tmp_path}/users.toml: no such file: relay user add makes it"]
    with pytest.raises(UsersError) as caught:
        read(tmp_path)
    assert caught.value.problems == [f"{tmp_path}: cannot be read: Is a directory"]


def test_a_user_does_not_show_its_hash() -> None:
    assert HASH not in repr(User(HASH, None))


@pytest.mark.parametrize("name", ["a", "ü@example.com", "a" * 255, "ü" * 127])
def test_names(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", "a" * 256, "ü" * 128, "a b", "a\n", "a\u202eb", "\udcff"])
def test_what_is_no_name(name: str) -> None:
    assert name_problem(name)


@pytest.mark.parametrize("pattern", ["<>", "*@example.com", "a b@example.com", "app-[0-9]@*"])
def test_sender_patterns(pattern: str) -> None:
    assert sender_problem(pattern) is None


@pytest.mark.parametrize("pattern", ["", "*", "@example.com", "a@", "<a@b>", "a@b\n", '"a"@b'])
def test_what_is_no_sender_pattern(pattern: str) -> None:
    assert sender_problem(pattern)


@given(st.binary() | st.text().map(str.encode))
def test_any_octets_are_users_or_an_error_of_printable_lines(octets: bytes) -> None:
    try:
        users = parse(octets, FILE)
    except UsersError as error:
        problems = error.problems
    else:
        assert users == {}
        return
    assert all(problem.isprintable() for problem in problems)
