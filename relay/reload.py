"""What comes before a configuration that was read again is in force: files are read, parts made ready.

Rules: everything that can fail is read, made and opened first, beside what runs; only when nothing has failed
are parts exchanged, which the composition root does. What differs at all `settings.changes` tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from relay import parts
from relay.auth import userfile
from relay.auth.userfile import UsersError
from relay.auth.users import Users
from relay.session.tls import Certificate, CertificateError
from relay.settings import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from relay.session.reception import Bound
    from relay.settings import Settings
    from relay.web import Web

__all__ = ["REFUSALS", "Files", "Fresh", "read_files", "reasons"]

REFUSALS: Final = (SettingsError, UsersError, CertificateError, OSError)
"""What says that a configuration cannot be used, here and now."""


def reasons(error: BaseException) -> list[str]:
    """Return one line for each mistake that one of REFUSALS tells of."""
    return error.problems if isinstance(error, SettingsError | UsersError) else [str(error)]


@dataclass(frozen=True, slots=True)
class Files:
    """What the files that the configuration names hold, read and found good."""

    certificate: Certificate | None
    users: Users | None
    """Of a file that was not in use; None: the file that is will be read again, or there is none."""


def read_files(settings: Settings, users_in_use: Path | None) -> Files:
    """Read the files that `settings` name (it blocks); raises one of REFUSALS."""
    certificate, users = parts.certificate(settings), None
    if (path := settings.clients.users_file) is not None:
        if path == users_in_use:
            userfile.read(path)  # a mistake refuses the whole; without one the users take it at `refresh`
        else:
            users = Users(path)
    return Files(certificate, users)


@dataclass(slots=True)
class Fresh:
    """The parts that are ready to be exchanged."""

    files: Files
    web: Web | None = None
    """Answers already, where the address of the HTTP side changes."""
    bound: Bound | None = None

    async def discard(self) -> None:
        """Close what was opened: the old parts stay."""
        if self.files.users is not None:
            self.files.users.close()
        if self.bound is not None:
            self.bound.discard()
        if self.web is not None:
            await self.web.stop()
