"""The architecture as the documentation draws it: who may import whom, and who alone knows a library."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "relay"

LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"process"},
    {"reload"},
    {"app", "probe", "selftest"},
    {"bookkeeping"},
    {"parts"},
    {"session", "web", "dev", "systemd", "descriptors"},
    {"limited"},
    {"transaction", "auth", "asking"},
    {"settlement"},
    {"lease"},
    {"course", "services"},
    {"limits"},
    {"upstream", "records", "account", "history"},
    {"answers", "metrics", "maillog", "body", "chunks", "classify", "policy", "settings", "pseudonyms"},
    {"late"},
    {"limits.rule"},
    {"records.bound", "records.identity", "records.line", "records.model", "envelope", "content"},
    {"reply", "outcome", "credentials", "escaping", "exhausted", "provider", "series"},
]
"""From the top: a module may import from layers below its own, and from its own package."""

DOORS = {
    "aiosmtpd": {"session", "dev"},
    "aiosmtplib": {"upstream"},
    "aiosqlite": {"records"},
    "sqlite3": {"records"},
    "asyncpg": {"records"},
    "sqlalchemy": {"records"},
    "alembic": {"records"},
    "prometheus_client": {"metrics", "series"},
    "aiohttp": {"web", "upstream"},
    "argon2": {"auth"},
    "cryptography": {"session"},
    "tomlkit": {"auth"},
    "jinja2": {"web"},
    "markupsafe": {"web"},
    "pydantic": {"settings"},
    "typer": {"cli"},
}
"""Libraries that one package alone may import."""

MAPPED = [
    "auth",
    "limits",
    "records",
    "records/postgres",
    "records/sqlite",
    "session",
    "upstream",
    "web",
]
"""Packages of many jobs. In `cli` and `settings` a module is named after its command or its section."""

FILES = sorted(PACKAGE.rglob("*.py"))

_WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
COMPILED: list[str] = _WHEEL["hooks"]["custom"]["modules"]

SHORTENED = {"DATA_RATE_GRACE", "ERROR_WAIT", "PROVEN"}
"""Waits that tests shorten, of what is compiled too: a constant that is Final stands in the machine code."""


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file and for whatever reason."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def layer_of(module: str) -> int | None:
    """The layer of a module, by the longest part of its name that is listed."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for depth, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return depth
    return None


@pytest.mark.parametrize("path", FILES, ids=[name_of(path) or "relay" for path in FILES])
def test_imports_point_down(path: Path) -> None:
    module = name_of(path)
    if not module:
        assert not [name for name in imports_of(path) if name.startswith("relay")]
        return
    own = layer_of(module)
    assert own is not None, f"{module} has no layer"
    for imported in imports_of(path):
        other = imported.removeprefix("relay.")
        if other == imported or other.partition(".")[0] == module.partition(".")[0]:
            continue
        depth = layer_of(other)
        assert depth is None or depth > own, f"{module} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=[name_of(path) or "relay" for path in FILES])
def test_each_library_has_one_door(path: Path) -> None:
    package = name_of(path).partition(".")[0]
    for imported in imports_of(path):
        library = imported.partition(".")[0]
        assert package in DOORS.get(library, {package}), f"{name_of(path)} imports {library}"


def test_the_documentation_draws_these_layers() -> None:
    page = (ROOT / "docs/flow.md").read_text()
    chapter = page.partition("## Who may import whom")[2].partition("\n## ")[0]
    drawn = [set(re.findall(r"`([^`]+)`", line)) for line in chapter.splitlines() if line.startswith("- ")]
    assert drawn == LAYERS


@pytest.mark.parametrize("package", MAPPED)
def test_a_large_package_says_what_is_where(package: str) -> None:
    """A map that leaves a module out, or shows one that is gone, leads astray."""
    directory = PACKAGE / package
    text = ast.get_docstring(ast.parse((directory / "__init__.py").read_text())) or ""
    named = set(re.findall(r"`(\w+)\.py`", text)) | set(re.findall(r"`(\w+)`", text)) & packages_in(directory)
    modules = {path.stem for path in directory.glob("*.py")} - {"__init__"}
    assert named == modules | packages_in(directory)


def packages_in(directory: Path) -> set[str]:
    return {path.parent.name for path in directory.glob("*/__init__.py")}


def test_the_databases_know_nothing_of_each_other() -> None:
    """And of both only the doors: who opens a store, its readers and its erasers by a URL."""
    doors = {"records.store", "records.queries", "records.forgetting", "records.migrations"}
    for path in FILES:
        module = name_of(path)
        for database in ("sqlite", "postgres"):
            package = f"records.{database}"
            if not module.startswith(package) and module not in doors:
                assert not [each for each in imports_of(path) if each.startswith(f"relay.{package}")], module


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "helpers", "common", "misc", "base"}


def test_no_group_of_a_pattern_is_possessive() -> None:
    """CPython before 3.11.5, Debian 12's among them, matches those wrongly (gh-100061, gh-106052)."""
    group = re.compile(r"\)(?:[*+?]|\{[0-9,]+\})\+")
    assert group.search(r"(?:\r(?!\n))*+")
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
                assert not group.search(text), f"{name_of(path)}: {text}"


def test_the_message_path_is_compiled() -> None:
    assert "relay/transaction.py" in COMPILED
    assert all((ROOT / module).is_file() for module in COMPILED)


@pytest.mark.parametrize("module", COMPILED)
def test_constants_of_what_is_compiled_are_final(module: str) -> None:
    """Every other name of a module is looked up in a dict, 117 times a message when they were not."""
    constant = re.compile(r"_?[A-Z][A-Z0-9_]*")
    for node in ast.parse((ROOT / module).read_text()).body:
        if isinstance(node, ast.Assign):
            names = {
                each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)
            }
            assert not {name for name in names - SHORTENED if constant.fullmatch(name)}, f"line {node.lineno}"


@pytest.mark.parametrize("module", COMPILED)
def test_nothing_that_is_compiled_awaits_within_a_handler(module: str) -> None:
    """The compiler keeps no exceptions by coroutine: what is handled here would be handled elsewhere too."""
    nodes = list(ast.walk(ast.parse((ROOT / module).read_text())))
    within = [handler for node in nodes if isinstance(node, ast.Try) for handler in node.handlers]
    within += [statement for node in nodes if isinstance(node, ast.Try) for statement in node.finalbody]
    lines = [each.lineno for part in within for each in ast.walk(part) if isinstance(each, ast.Await)]
    lines += [node.lineno for node in nodes if isinstance(node, ast.AsyncWith)]
    assert not lines, "take the exception out of its handler, then await"


def test_nothing_that_is_compiled_inherits_from_a_library() -> None:
    """Libraries are not there when it is compiled: the layout of such a class would be a guess."""
    for module in COMPILED:
        tree = ast.parse((ROOT / module).read_text())
        foreign = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
            not in sys.stdlib_module_names | {"relay"}
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = {
                    name.id for base in node.bases for name in ast.walk(base) if isinstance(name, ast.Name)
                }
                assert not bases & foreign, f"{module}: {node.name}"
