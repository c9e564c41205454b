"""What is shipped: locks, wheel and units, as far as looking at them tells; tests/interop runs them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from relay import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKED = {name: (ROOT / name).read_text() for name in ("requirements.lock", "requirements-build.lock")}


def pins(text: str) -> dict[str, str]:
    """Return name -> version of a requirements file, of what is meant for this platform."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith((" ", "#")):
            requirement = Requirement(line.removesuffix("\\"))
            if requirement.marker is None or requirement.marker.evaluate():
                (pin,) = requirement.specifier
                assert pin.operator == "=="
                found[canonicalize_name(requirement.name)] = pin.version
    return found


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text())


def needed(requirements: list[str], extras: frozenset[str] = frozenset()) -> set[str]:
    """Return the names of these requirements and all that they need, as it is installed here."""
    found: set[str] = set()
    todo = [(Requirement(each), extras) for each in requirements]
    while todo:
        requirement, wanted = todo.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in wanted or {""}
        ):
            continue
        name = canonicalize_name(requirement.name)
        inner = frozenset(requirement.extras)
        if name not in found or inner:
            found.add(name)
            requires = importlib.metadata.requires(name) or []
            todo += [(Requirement(each), inner) for each in requires]
    return found


# ----------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("lock", LOCKED)
def test_the_lock_has_the_versions_of_the_constraints(lock: str) -> None:
    locked = pins(LOCKED[lock])
    assert locked
    assert {name: CONSTRAINTS.get(name) for name in locked} == locked, "run: make lock"


def test_the_lock_is_what_the_package_needs() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    runtime = PROJECT["project"]["dependencies"] + extras.get("postgres", [])
    assert needed(runtime) == pins(LOCKED["requirements.lock"]).keys(), "run: make lock"
    building = PROJECT["build-system"]["requires"]
    assert needed(building) == pins(LOCKED["requirements-build.lock"]).keys(), "run: make lock"


@pytest.mark.parametrize("lock", LOCKED)
def test_every_line_of_the_lock_has_its_hashes_and_names_no_registry(lock: str) -> None:
    entries = re.split(r"\n(?=\S)", LOCKED[lock].strip())
    assert entries
    for entry in entries:
        first, *hashes = entry.replace("\\\n", "\n").splitlines()
        assert re.match(r"[a-z0-9-]+==\S+", first)
        assert hashes
        assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64} *", line) for line in hashes)
    assert "://" not in LOCKED[lock]


def test_everything_that_is_installed_for_development_is_pinned() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    everything = PROJECT["project"]["dependencies"] + [each for extra in extras.values() for each in extra]
    installed = {name: importlib.metadata.version(name) for name in needed(everything)}
    assert {name: CONSTRAINTS.get(name) for name in installed} == installed


# ----------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    # What is compiled has tests of its own: tests/interop/test_compiled.py.
    environ = os.environ | {"RELAY_COMPILE": "never"}
    subprocess.run(build, cwd=ROOT, check=True, timeout=60, capture_output=True, env=environ)
    (found,) = directory.glob("*.whl")
    return found


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        (entry_points,) = (
            archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")
        )
    assert "relay/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"relay", f"smtp_relay_record-{__version__}.dist-info"}
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "relay").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("relay/")} == shipped
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "relay = relay.cli:main" in entry_points


def test_the_installed_wheel_is_the_command(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has nothing of this checkout; the libraries are those of this environment."""
    place = tmp_path / "env"
    venv.create(place, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(place / "bin/python")]
    install = [*pip, "install", "-q", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=120, cwd=tmp_path)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    (source,) = {path for path in map(Path, sys.path) if path.name == "site-packages" and path.exists()}
    for path in source.iterdir():
        if "smtp_relay_record" not in path.name:
            (libraries / path.name).symlink_to(path)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("RELAY", "PYTHON"))}
    where = [str(place / "bin/python"), "-c", "import relay; print(relay.__file__)"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert Path(found.stdout.strip()).is_relative_to(place)
    said = subprocess.run(
        [place / "bin/relay", "--help"], check=True, capture_output=True, text=True, cwd=tmp_path, env=environ
    )
    assert "serve" in said.stdout


# ----------------------------------------------------------------------------------------------- units

UNITS = ROOT / "config/systemd"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they are, but for the programs that are not installed here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    place = tmp_path / "units"
    shutil.copytree(UNITS, place)
    for unit in place.glob("*.service"):
        unit.write_text(unit.read_text().replace("/opt/relay/bin/relay", "/bin/true"))
    return place


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=50
    )


@pytest.mark.interop
@pytest.mark.parametrize("unit", ["relay.service", "relay.socket", "relay@1.service"])
def test_systemd_takes_the_unit(units: Path, unit: str) -> None:
    done = analyze("verify", "--man=no", "--recursive-errors=no", str(units / unit))
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "relay" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.interop
@pytest.mark.parametrize("unit", ["relay.service", "relay@1.service"])
def test_systemd_finds_little_exposed(units: Path, unit: str) -> None:
    """Of 10: a service with no hardening at all has 9.6."""
    (units / "relay@1.service").write_text((units / "relay@.service").read_text())
    done = analyze("security", "--offline=true", "--threshold=20", "--no-pager", str(units / unit))
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level" in done.stdout


def test_both_services_are_hardened_alike() -> None:
    one, many = ((UNITS / name).read_text() for name in ("relay.service", "relay@.service"))
    hardening = one[one.index("# A user that exists only while") : one.index("[Install]")]
    assert hardening in many


@pytest.mark.parametrize("unit", ["relay.service", "relay@.service"])
def test_a_start_may_take_its_time(unit: str) -> None:
    """Ended after systemd's 90 seconds, the migration of a big store would begin anew, again and again."""
    assert "\nTimeoutStartSec=infinity\n" in (UNITS / unit).read_text()


def test_the_socket_is_that_of_the_default_listener() -> None:
    assert "ListenStream=127.0.0.1:2525\n" in (UNITS / "relay.socket").read_text()


# ----------------------------------------------------------------------------------------- contributing


def test_the_hooks_run_tools_that_are_there() -> None:
    """pre-commit reads the file, and each hook is a tool of the environment."""
    directory = Path(sys.executable).parent
    check = [directory / "pre-commit", "validate-config", ROOT / ".pre-commit-config.yaml"]
    done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stdout
    entries = re.findall(r"^ +entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert entries
    for entry in entries:
        assert entry.startswith(".venv/bin/")
        assert (directory / entry.removeprefix(".venv/bin/")).exists()


def test_ci_runs_what_make_sure_runs() -> None:
    """And nothing that it does not: the rest of the script installs peers."""
    script = (ROOT / ".ci/run").read_text()
    assert re.findall(r"^make .*$", script, re.MULTILINE) == ["make sure"]
    assert not re.search(r"\b(pytest|ruff|mypy)\b", script)
    assert re.search(r"^sure: lint docs test\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_licence_is_the_one_that_is_stated() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert 'licenses="Apache-2.0"' in (ROOT / "Dockerfile").read_text()
