"""A real systemd as process 1 of a namespace, on a root of its own, with the units that are shipped.

Rules: nothing of this machine's own systemd is touched. The root is a copy of the image's, which has systemd
in its base; what would set up the machine (sysctl, modules, mounts) is masked. Its cgroups lie under one of
its own, which is removed at the end, and everything in it ends with process 1.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

__all__ = ["CGROUP", "Manager"]

ROOT = Path(__file__).resolve().parents[2]
CGROUP = Path("/sys/fs/cgroup/systemd")
"""The hierarchy in which systemd keeps its services, where that is one of version 1."""

_MASKED = (
    *("systemd-sysctl.service", "systemd-modules-load.service", "systemd-remount-fs.service"),
    *("systemd-update-utmp.service", "systemd-tmpfiles-setup-dev.service", "systemd-random-seed.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-fs-fuse-connections.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount"),
)
_TARGET = "[Unit]\nRequires=systemd-journald.service\nAfter=systemd-journald.service\nAllowIsolate=yes\n"

_ENTER = """
set -e
group=$1 root=$2
echo $$ >"$group/cgroup.procs"
exec unshare --cgroup --mount --pid --ipc --uts --fork sh -ec '
    root=$1
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/tmp"
    mount -t tmpfs cgroup "$root/sys/fs/cgroup"
    mkdir "$root/sys/fs/cgroup/systemd"
    mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
    mount -t tmpfs dev "$root/dev"
    for each in null zero full random urandom tty; do
        touch "$root/dev/$each"
        mount --bind "/dev/$each" "$root/dev/$each"
    done
    mkdir -p "$root/dev/shm" "$root/dev/pts" "$root/before"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    cd "$root"
    pivot_root . before
    umount -l /before
    mount --make-rshared /
    exec /usr/bin/env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --system --unit=test.target --log-target=journal
' boot "$root"
"""


class Manager:
    """systemd on `root`, which already has the relay in /opt/relay; `with` boots it and ends it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.units = root / "etc/systemd/system"
        for name in _MASKED:
            (self.units / name).unlink(missing_ok=True)
            (self.units / name).symlink_to("/dev/null")
        (self.units / "test.target").write_text(_TARGET)
        self._group = CGROUP / f"relay-test-{os.getpid()}"

    def install(self, unit: str, **replaced: str) -> None:
        """Install one of the units that are shipped; `replaced` is for addresses of the test."""
        text = (ROOT / "config/systemd" / unit).read_text()
        for old, new in replaced.items():
            text = text.replace(old.removeprefix("_"), new)
        place = self.units / unit
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)

    def forget(self) -> None:
        """Remove the relay's units, its configuration and its state."""
        for path in (
            *self.units.glob("relay*"),
            self.root / "etc/relay",
            *self.root.glob("var/lib/**/relay*"),
        ):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.root / "etc/relay").mkdir()

    def __enter__(self) -> Self:
        self._group.mkdir()
        self._process = subprocess.Popen(
            ["sh", "-c", _ENTER, "enter", str(self._group), str(self.root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.until(lambda: self.systemctl("is-active", "test.target", check=False) == "active")
        return self

    def __exit__(self, *_: object) -> None:
        while self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
        for group in sorted(self._group.rglob("*/"), reverse=True):
            group.rmdir()
        self._group.rmdir()

    @property
    def pid(self) -> int:
        """systemd itself, by its id out here; ValueError before it is there."""
        own = self._process.pid
        (child,) = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return int(child)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command beside systemd; return what it writes."""
        try:
            enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-i", "-u", "-r", "-w", "--"]
        except ValueError:
            return ""
        done = subprocess.run([*enter, *command], capture_output=True, text=True, check=False, timeout=90)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.journal()}"
        return done.stdout.strip()

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", *arguments, check=check)

    def journal(self, unit: str = "relay*") -> str:
        """Return what a unit has written."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, check=False)

    def show(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.systemctl("show", unit, "--property", name, "--value")

    def until(self, holds: object, timeout_s: float = 60.0) -> None:
        """Wait until `holds()`."""
        assert callable(holds)
        end = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end, self.journal()
            time.sleep(0.1)
