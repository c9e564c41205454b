"""Passwords as argon2id hashes (RFC 9106), and the only importer of the library that makes them.

Rules: a hash says by itself what it costs, so the cost may change and older hashes go on. What a check may
cost is bounded, since its memory is the relay's. A password is hashed in Unicode's form NFC (RFC 8265 section
4.2), so that it does not matter which keyboard it came from.
"""

from __future__ import annotations

import re
import unicodedata

import argon2

__all__ = ["MAX_MEMORY_KIB", "HashError", "Hasher", "problem"]

MEMORY_KIB = 32 * 1024
PASSES = 3
LANES = 1
MAX_MEMORY_KIB = 256 * 1024
"""The most that a hash from elsewhere may ask for."""
MAX_PASSES = 100

# PHC string format; at least 8 octets of salt and 16 of hash, at most 64.
_HASH = re.compile(
    r"\$argon2id\$v=19\$m=([1-9][0-9]{0,9}),t=([1-9][0-9]{0,9}),p=([1-9][0-9]{0,2})"
    r"\$[A-Za-z0-9+/]{11,86}\$[A-Za-z0-9+/]{22,86}"
)


class HashError(Exception):
    """A password could not be held against a hash: the hash is damaged, or memory is short."""


def problem(hashed: str) -> str | None:
    """Return why `hashed` cannot be used, None if it can as far as its form tells. Never shows the hash."""
    match = _HASH.fullmatch(hashed)
    if match is None:
        return "is no argon2id hash: relay user add makes one"
    memory, passes, lanes = map(int, match.groups())
    if memory > MAX_MEMORY_KIB:
        return f"needs more than {MAX_MEMORY_KIB // 1024} MiB for each login"
    if passes > MAX_PASSES:
        return f"needs more than {MAX_PASSES} passes for each login"
    if memory < 8 * lanes:
        return "is no argon2id hash: it has too little memory for its lanes (RFC 9106 3.1)"
    return None


class Hasher:
    """Makes and checks hashes; both take tens of milliseconds, and other threads run meanwhile."""

    def __init__(self, memory_kib: int = MEMORY_KIB, passes: int = PASSES, lanes: int = LANES) -> None:
        """Set what new hashes cost. The default takes 32 MiB and about 60 ms."""
        self._library = argon2.PasswordHasher(passes, memory_kib, lanes, type=argon2.Type.ID)

    def hash(self, password: str) -> str:
        """Return a new hash, with a salt of its own."""
        return self._library.hash(_octets(password))

    def matches(self, hashed: str, password: str) -> bool:
        """Whether `hashed` is a hash of `password`; raises HashError if that cannot be told."""
        try:
            return self._library.verify(hashed, _octets(password))
        except argon2.exceptions.VerifyMismatchError:
            return False
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError) as error:
            raise HashError(str(error)) from error


def _octets(password: str) -> bytes:
    return unicodedata.normalize("NFC", password).encode()
