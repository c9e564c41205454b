"""The image, built from the Dockerfile without a Docker engine, and its root as containers have it.

Rules: the base is made of Debian's packages by debootstrap and tagged as what the Dockerfile names in FROM.
What pip installs is downloaded out here, by whatever way pip is configured on this machine, checked by its
hashes, and handed in as a directory: the build itself reaches no network. Everything lies in one directory,
and mounts live in namespaces of their own, so that nothing is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

__all__ = ["NEEDED", "CannotBuildError", "Container", "Image", "base", "remove"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "python3,python3-venv,systemd"
"""What the base has beside the essential: systemd for the tests of the units."""
COMPILER = "gcc,libc6-dev,python3-dev"
"""What the base that builds has beside that."""
_KEPT_S = 7 * 24 * 3600
"""How long a base that was made once is good for the next run."""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# The root is read-only, as under `docker run --read-only`; /data is the volume; the entry point is process 1.
_CONTAIN = """
set -e
root=$1 data=$2 config=$3 user=$4; shift 4
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --bind "$data" "$root/data"
if [ -n "$config" ]; then mount --bind "$config" "$root/etc/relay/relay.toml"; fi
mount -t proc proc "$root/proc"
exec chroot --userspec="$user" "$root" /usr/bin/env -i "$@"
"""


def _missing() -> str:
    """Say why no image can be built here; empty if it can."""
    if os.geteuid() != 0:
        return "chroot and mounts are root's"
    missing = [name for name in ("buildah", "debootstrap", "unshare") if not shutil.which(name, path=_PATH)]
    return f"{missing[0]} is not installed: apt-get install {missing[0]}" if missing else ""


NEEDED = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(_missing()), reason=_missing() or "it can"),
    pytest.mark.timeout(3600),
]
"""The marks of a test that uses the image."""


class CannotBuildError(Exception):
    """What the build needs cannot be had on this machine now; the text says what."""


def base(directory: Path, packages: str = PACKAGES) -> Path:
    """Return a tar archive of Debian with Python, the release that runs here; made anew once a week."""
    release = _release()
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smtp-relay-record"
    archive = kept / f"base-{release}-{packages}.tar"
    if archive.exists() and time.time() - archive.stat().st_mtime < _KEPT_S:
        return archive
    root = directory / f"base-{packages}"
    bootstrap = ["unshare", "--mount", "debootstrap", "--variant=minbase"]
    _get([*bootstrap, f"--include={packages}", release, str(root), _mirror(release)], 1500)
    for leftover in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")):
        leftover.unlink()
    kept.mkdir(parents=True, exist_ok=True)
    fresh = archive.with_suffix(f".{os.getpid()}")
    _run(["tar", "--one-file-system", "-C", str(root), "-cf", str(fresh), "."], 60)
    fresh.replace(archive)
    return archive


def _release() -> str:
    names = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    if names.get("ID", "").strip('"') != "debian":
        raise CannotBuildError("this machine is no Debian, whose release the base could be made of")
    return names["VERSION_CODENAME"].strip('"')


def _mirror(release: str) -> str:
    """Return where apt gets this release from."""
    wanted = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]
    for line in _run([*wanted, "Created-By: Packages"], 30).splitlines():
        where, name, component = line.split()
        if (name, component) == (release, "main"):
            return where
    raise CannotBuildError(f"apt knows no place for {release}")


def _get(command: list[str], timeout_s: float) -> None:
    """Run what needs the network; CannotBuildError if that does not work."""
    try:
        _run(command, timeout_s)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise CannotBuildError(f"{command[0]}: {str(error)[-300:]}") from None


def _run(command: list[str], timeout_s: float) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env=os.environ | {"PATH": _PATH},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


class Image:
    """The image of the Dockerfile in this checkout, and the base that it was built on."""

    def __init__(self, directory: Path) -> None:
        """Build it in `directory`."""
        layered = _run(["stat", "--file-system", "--format", "%T", str(directory)], 30).strip() == "overlayfs"
        self._storage = [
            *("buildah", "--root", str(directory / "storage"), "--runroot", str(directory / "run")),
            *("--storage-driver", "vfs" if layered else "overlay"),  # overlay on overlay cannot be mounted
        ]
        named = re.findall(r"^FROM (python:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        self.named, building = named
        self._tag_base(self.named, base(directory))
        self._tag_base(building, base(directory, f"{PACKAGES},{COMPILER}"))
        self._build(directory)
        self.base_root = self._root(f"docker.io/library/{self.named}")
        self.root = self._root("relay-test")
        inspected = json.loads(self._buildah("inspect", "--type", "image", "relay-test"))
        self.config: dict[str, Any] = inspected["Docker"]["config"]

    def _tag_base(self, named: str, archive: Path) -> None:
        container = self._buildah("from", "scratch").strip()
        self._buildah("add", "-q", container, str(archive), "/")
        self._buildah("commit", "-q", "--rm", container, f"docker.io/library/{named}")

    def _build(self, directory: Path) -> None:
        wheels = directory / "wheels"
        locks = [name for lock in ROOT.glob("requirements*.lock") for name in ("-r", str(lock))]
        version = _version_of_python(Path(self._root(f"docker.io/library/{self.named}")))
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--require-hashes",
            "--only-binary",
            ":all:",
        ]
        _get([*download, "--python-version", version, "--dest", str(wheels), *locks], 1500)
        configuration = directory / "pip.conf"
        configuration.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        self._buildah(
            *("bud", "--isolation", "chroot", "--pull-never", "--layers=false", "--format", "docker"),
            *("--volume", f"{wheels}:/wheels:ro", "--volume", f"{configuration}:/etc/pip.conf:ro"),
            *("--tag", "relay-test", str(ROOT)),
        )

    def _root(self, image: str) -> Path:
        container = self._buildah("from", "--pull-never", image).strip()
        return Path(self._buildah("mount", container).strip())

    def _buildah(self, *arguments: str) -> str:
        return _run([*self._storage, *arguments], 1500)

    def another_root(self) -> Path:
        """Return a root file system of the image that may be changed."""
        return self._root("relay-test")

    def added(self) -> int:
        """Return by how many octets the image's files exceed the base's."""
        return _octets(self.root) - _octets(self.base_root)

    @property
    def environment(self) -> dict[str, str]:
        """What the image sets."""
        return dict(each.split("=", 1) for each in self.config["Env"])

    @contextmanager
    def container(
        self, data: Path, environment: Mapping[str, str], *arguments: str, config: Path | None = None
    ) -> Iterator[Container]:
        """Run the image's entry point with its command, or with `arguments`; end it at the end."""
        command = [*self.config["Entrypoint"], *(arguments or self.config["Cmd"])]
        with Container(self._contained(data, environment, command, config), data / "log") as container:
            yield container

    def run(
        self, data: Path, environment: Mapping[str, str], command: list[str], *, user: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run any command in a container of its own, to its end."""
        return subprocess.run(
            self._contained(data, environment, command, None, user),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def _contained(
        self,
        data: Path,
        environment: Mapping[str, str],
        command: list[str],
        config: Path | None,
        user: str = "",
    ) -> list[str]:
        variables = [f"{name}={value}" for name, value in {**self.environment, **environment}.items()]
        return [
            *("unshare", "--mount", "--pid", "--fork", "sh", "-c", _CONTAIN, "contain"),
            *(str(self.root), str(data), str(config or ""), user or self.config["User"]),
            *(*variables, *command),
        ]


class Container:
    """A process 1 in a namespace of its own, and what it writes."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        return self

    def __exit__(self, *_: object) -> None:
        # Process 1, and with it its namespace. It has another user, which undoes unshare's --kill-child.
        while self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)

    def said(self) -> str:
        """Everything that it wrote so far."""
        return self._log.read_text()

    def event(self, name: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Return the first line of its log with this event, once it is there."""
        end = time.monotonic() + timeout_s
        while True:
            for line in self.said().splitlines():
                if line.startswith("{") and (found := json.loads(line))["event"] == name:
                    return dict(found)
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no {name!r} in the log: {self.said()}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Process 1 of the container, by its id out here."""
        supervisor = self._process.pid
        (child,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return int(child)

    def signal(self, name: str) -> None:
        """Send a signal to process 1, as `docker stop` does."""
        os.kill(self.pid, signal.Signals[name])

    def ended(self, timeout_s: float = 60.0) -> int:
        """Return the exit status."""
        return self._process.wait(timeout_s)


def _version_of_python(root: Path) -> str:
    names = sorted(path.name.removeprefix("python") for path in root.glob("usr/*bin/python3.*"))
    return next(name for name in names if re.fullmatch(r"3\.[0-9]+", name))


def _octets(root: Path) -> int:
    said = _run(
        ["du", "--summarize", "--apparent-size", "--block-size=1", "--one-file-system", str(root)], 60
    )
    return int(said.split()[0])


def remove(directory: Path) -> None:
    """Unmount what is mounted there, and give the disk space back."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=False, timeout=30)
    shutil.rmtree(directory, ignore_errors=True)
