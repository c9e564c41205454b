"""Changes to the file of users."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.auth.edit import UserError, put, remove
from relay.auth.hashing import Hasher
from relay.auth.userfile import User, UsersError, name_problem, read

ONE, OTHER = (Hasher(memory_kib=8, passes=1).hash("sesame") for _ in range(2))

WRITTEN = f"""\
# Our users.  \x20
[users.app]   # the shop
password = '{ONE}' # of 2026
# mail only from us
senders = [
    "*@example.com",  # all of it
]

[users."a.b@example.com"]
password = "{ONE}"
# the end
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "users.toml"


def test_the_first_user_makes_the_file_for_its_owner_alone(file: Path) -> None:
    assert put(file, "app", ONE, (), replace=False)

    assert read(file) == {"app": User(ONE, None)}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().startswith("# Users of the relay.")


def test_what_is_there_stays_as_it_was_written(file: Path) -> None:
    file.write_text(WRITTEN)
    assert put(file, "new", OTHER, ("<>", "a@example.com"), replace=False)
    assert file.read_text().startswith(WRITTEN)
    assert read(file)["new"] == User(OTHER, ("<>", "a@example.com"))

    remove(file, "new")
    assert file.read_text().rstrip() == WRITTEN.rstrip()


def test_a_byte_order_mark_does_not_count(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + WRITTEN.encode())
    assert set(read(file)) == {"app", "a.b@example.com"}
    assert put(file, "new", OTHER, (), replace=False)
    assert file.read_text().startswith(WRITTEN)


def test_a_new_password_leaves_the_senders(file: Path) -> None:
    file.write_text(WRITTEN)
    assert not put(file, "app", OTHER, (), replace=True)
    assert read(file)["app"] == User(OTHER, ("*@example.com",))
    assert "# of 2026\n# mail only from us\n" in file.read_text()

    assert not put(file, "app", OTHER, ("<>",), replace=True)
    assert read(file)["app"] == User(OTHER, ("<>",))


def test_a_user_that_exists_is_not_replaced_by_accident(file: Path) -> None:
    file.write_text(WRITTEN)
    with pytest.raises(UserError, match="app exists already"):
        put(file, "app", OTHER, (), replace=False)
    with pytest.raises(UserError, match="nobody is no user in "):
        remove(file, "nobody")
    assert file.read_text() == WRITTEN


def test_a_file_with_mistakes_is_not_touched(file: Path) -> None:
    text = WRITTEN + "[users.bad]\n"
    file.write_text(text)
    for change in (lambda: put(file, "app", OTHER, (), replace=True), lambda: remove(file, "bad")):
        with pytest.raises(UsersError, match="bad: password: missing"):
            change()
    assert file.read_text() == text


def test_what_would_not_be_read_as_it_was_meant_is_not_written(file: Path) -> None:
    for text, name in (
        (f'users.a.password = "{ONE}"\nusers.b.password = "{ONE}"\n', "new"),
        (WRITTEN, "a b"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="edit it by hand"):
            put(file, name, OTHER, (), replace=False)
        assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "text",
    [
        f'users = {{ app = {{ password = "{ONE}" }} }} # all\n',
        f'[users]\napp.password = "{ONE}"\n',
        f'[users]\napp = {{ password = "{ONE}" }}\n',
        f'["users"."app"]\r\npassword = "{ONE}"\r\n',
        f'[users.app]\npassword = "{ONE}"',
    ],
)
def test_other_ways_to_write_it(file: Path, text: str) -> None:
    file.write_text(text)
    put(file, "new", OTHER, ("<>",), replace=False)
    put(file, "app", OTHER, (), replace=True)
    assert read(file) == {"app": User(OTHER, None), "new": User(OTHER, ("<>",))}
    remove(file, "app")
    remove(file, "new")
    assert read(file) == {}


def test_mode_and_owner_stay(file: Path) -> None:
    file.write_text(WRITTEN)
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 12345, 12346)
    before = file.stat()
    remove(file, "app")

    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file.symlink_to("real/users.toml")
    put(file, "app", ONE, (), replace=False)
    put(file, "new", ONE, (), replace=False)
    assert file.is_symlink()
    assert set(read(tmp_path / "real/users.toml")) == {"app", "new"}


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(file: Path) -> None:
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        put(file, "app", ONE, (), replace=False)
    with pytest.raises(FileNotFoundError):
        put(file.parent / "missing/users.toml", "app", ONE, (), replace=False)
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_file(file: Path) -> None:
    file.write_text(WRITTEN)
    program = (
        "import resource, signal, sys; from pathlib import Path; from relay.auth.edit import put\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(WRITTEN)}, {len(WRITTEN)}))\n"
        "put(Path(sys.argv[1]), 'new', sys.argv[2], (), replace=False)"
    )
    done = subprocess.run([sys.executable, "-c", program, file, ONE], capture_output=True, text=True)

    assert "OSError: [Errno 27] File too large" in done.stderr
    assert file.read_text() == WRITTEN
    assert list(file.parent.iterdir()) == [file]


def test_two_at_a_time_lose_nothing(file: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from relay.auth.edit import put\n"
        "for n in range(20): put(Path(sys.argv[1]), f'{sys.argv[2]}-{n}', sys.argv[3], (), replace=False)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, file, f"writer-{each}", ONE]) for each in range(3)
    ]
    assert [writer.wait(50) for writer in writers] == [0, 0, 0]
    assert len(read(file)) == 60


NAMES = st.sampled_from(
    ["app", "a.b", "a@example.com", '"', "'", "\\", "#", "users", "ü", "1", "=", "[x]"]
) | (st.text(min_size=1, max_size=20).filter(lambda name: name_problem(name) is None))
CHANGES = st.tuples(NAMES, st.sampled_from([ONE, OTHER]), st.sampled_from([(), ("<>",), ("*@ü.example",)]))


@given(st.lists(CHANGES | NAMES, max_size=8))
def test_any_changes_end_in_the_users_that_were_meant(
    changes: list[str | tuple[str, str, tuple[str, ...]]],
) -> None:
    with TemporaryDirectory() as directory:
        file = Path(directory) / "users.toml"
        file.write_text(WRITTEN)
        users = read(file)
        for change in changes:
            if isinstance(change, tuple):
                name, hashed, senders = change
                kept = users[name].senders if name in users else None
                put(file, name, hashed, senders, replace=True)
                users[name] = User(hashed, senders or kept)
            elif change in users:
                remove(file, change)
                del users[change]
            assert read(file) == users
