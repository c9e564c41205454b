"""Logins against a file of users that the operator keeps; the file may change at any time.

Rules: whoever fails hears the same words after the same work, whether the user exists or not. Hashing runs
beside the event loop in two threads; what may wait for them is bounded, and so is the memory that they take.
A success is remembered as a keyed hash until the user's own entry changes, since applications that connect
for every message would else cost as much CPU in hashing as in all the rest. A file with a mistake leaves the
users that were: a slip of an editor must not stop the mail. One that cannot be read is tried again: it may
say that somebody is a user no more.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relay import maillog
from relay.auth.hashing import Hasher, HashError
from relay.auth.userfile import User, UsersError, read
from relay.auth.verdict import Verdict
from relay.credentials import PASSWORD_MECHANISMS, Credentials, Password
from relay.reply import Reply

__all__ = ["Users"]

THREADS = 2
"""Checks at a time; each takes the memory that its hash asks for, usually 32 MiB."""
MAX_CHECKS = 64
"""Checks that run or wait; with 60 ms for each the last one waits two seconds."""

_LOGGED_IN = Reply.own(235, "7.0", "Logged in")
_REFUSED = Verdict(Reply.own(535, "7.8", "User name or password are not right"), "failed")
_BUSY = Verdict(Reply.own(454, "7.0", "Logins cannot be checked now, try again later"), "unavailable")

_Signature = tuple[int, int, int, int]


class Users:
    """An authenticator: the users of one file."""

    def __init__(self, path: Path, hasher: Hasher | None = None) -> None:
        """Read the file; raises UsersError if it cannot be used. `hasher` by default is one of usual cost."""
        self._path = path
        self._hasher = hasher or Hasher()
        self._key = secrets.token_bytes(32)
        self._signature = _signature(path)
        self._refused: tuple[_Signature | None, list[str]] | None = None
        self._users = read(path)
        self._hashes = [user.hashed for user in self._users.values()]
        # The fingerprint of what each user logged in with; bounded, as only users of the file can succeed.
        self._succeeded: dict[str, bytes] = {}
        self._checks: dict[tuple[bytes, str], asyncio.Future[bool | HashError]] = {}
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="login")

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The SASL mechanisms that can be offered now."""
        return PASSWORD_MECHANISMS

    def refresh(self) -> bool:
        """Read the file again if it has changed; whether other users are in force now.

        Costs a system call when it has not. Every login does this by itself; called in between it tells the
        operator sooner what is wrong with a new file.
        """
        signature = _signature(self._path)
        if signature == self._signature:
            return False
        try:
            users = read(self._path)
        except UsersError as error:
            if (signature, error.problems) != self._refused:
                self._refused = signature, error.problems
                maillog.users_not_read(str(self._path), error.problems)
            if not error.unread:
                self._signature = signature
            return False
        self._signature, self._refused = signature, None
        if users == self._users:
            return False
        before, self._users = self._users, users
        self._hashes = [user.hashed for user in users.values()]
        self._succeeded = {
            name: fingerprint
            for name, fingerprint in self._succeeded.items()
            if name in users and users[name].hashed == before[name].hashed
        }
        maillog.users_read(str(self._path), len(users))
        return True

    async def login(self, credentials: Credentials) -> Verdict:
        """Say whether somebody is who it claims to be, and what follows from it."""
        self.refresh()
        if not isinstance(credentials, Password) or not credentials.password:
            return _REFUSED
        name = credentials.user
        user = self._users.get(name)
        fingerprint = Password(name, credentials.password).fingerprint(self._key)
        if not hmac.compare_digest(self._succeeded.get(name, b""), fingerprint):
            refusal = await self._check(name, user, credentials.password, fingerprint)
            if refusal is not None:
                return refusal
            if self._users.get(name) != user:  # the file has changed meanwhile
                return _BUSY
            self._succeeded[name] = fingerprint
        # RFC 4616 section 2: nobody may act as another here.
        if user is None or credentials.authorization not in ("", name):
            return _REFUSED
        return Verdict(_LOGGED_IN, "ok", name, user.senders, entry=user)

    def stands(self, verdict: Verdict) -> bool:
        """Whether the user who has logged in is still in the file, as it was."""
        return verdict.entry is not None and self._users.get(verdict.user) == verdict.entry

    async def _check(self, name: str, user: User | None, password: str, fingerprint: bytes) -> Verdict | None:
        """Hold a password against the user's hash; None if it is right.

        Someone unknown is held against another user's hash, always the same one, for the time that it takes.
        """
        if not self._hashes:
            return _REFUSED
        hashed = user.hashed if user is not None else self._decoy(name)
        # Many sessions of one application begin together after a restart: they share one check.
        check = self._checks.get((fingerprint, hashed))
        if check is None:
            if len(self._checks) >= MAX_CHECKS:
                return _BUSY
            check = self._begin(hashed, password, fingerprint)
        found = await asyncio.shield(check)  # a session that ends must not end the check of another
        if user is None or found is False:
            return _REFUSED
        if found is True:
            return None
        maillog.user_not_checked(str(self._path), name, str(found))
        return _BUSY

    def _begin(self, hashed: str, password: str, fingerprint: bytes) -> asyncio.Future[bool | HashError]:
        key = (fingerprint, hashed)
        loop = asyncio.get_running_loop()
        check = loop.run_in_executor(self._executor, _matches, self._hasher, hashed, password)
        check.add_done_callback(lambda _: self._checks.pop(key))
        self._checks[key] = check
        return check

    def _decoy(self, name: str) -> str:
        place = hmac.digest(self._key, name.encode(), "sha256")
        return self._hashes[int.from_bytes(place) % len(self._hashes)]

    def retire(self) -> None:
        """Finish the checks that have begun or wait; there are no more logins to come."""
        self._executor.shutdown(wait=False)

    def close(self) -> None:
        """Begin no more checks; those that wait are given up."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _matches(hasher: Hasher, hashed: str, password: str) -> bool | HashError:
    """Runs in a thread. An error is a value here: whoever waited for it may have gone."""
    try:
        return hasher.matches(hashed, password)
    except HashError as error:
        return error


def _signature(path: Path) -> _Signature | None:
    """What changes when the file does; None while there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
