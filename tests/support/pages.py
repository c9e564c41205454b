"""The parts of the documents that follow from the code: every setting, every command.

`python -m tests.support.pages` writes them; a test compares what is written with what would be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import typer.main
from pydantic import BaseModel

from relay.cli.commands import app
from relay.settings import Settings, schema

__all__ = ["SCHEMA", "commands_page", "default", "form", "key_tables", "settings_page", "write"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCHEMA: dict[str, Any] = schema()


# ------------------------------------------------------------------------------------------- settings


def key_tables() -> dict[str, type[BaseModel] | None]:
    """Return the model of each section, by the title that it has in the document."""
    found: dict[str, type[BaseModel] | None] = {}
    for name, field in Settings.model_fields.items():
        model = next(
            (kind for kind in (field.annotation, *get_args(field.annotation)) if is_model(kind)), None
        )
        found[f"[[{name}]]" if get_args(field.annotation) else f"[{name}]"] = model
        for inner, inner_field in model.model_fields.items() if model else ():
            for kind in get_args(inner_field.annotation):
                if is_model(kind):
                    single = NoneType in get_args(inner_field.annotation)
                    found[f"[{name}.{inner}]" if single else f"[[{name}.{inner}]]"] = kind
    return found


def is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def form(schema: dict[str, Any]) -> str:
    """Say how a value is written, from its JSON Schema."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) == 1:
        return form(kinds[0])
    if any(kind.get("type") == "array" for kind in kinds):
        return "text or list"
    if kinds:
        return "size"
    if "$ref" in schema:
        return "table"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    pattern = schema.get("pattern", "")
    if "(ms|s|m|h|d)" in pattern:
        return "duration or `never`" if "never" in pattern else "duration"
    if pattern:
        return "address"
    if schema["type"] == "string":
        return {"password": "secret", "path": "file"}.get(schema.get("format", ""), "text")
    return {"boolean": "true or false", "integer": "number", "array": "list", "object": "table"}[
        schema["type"]
    ]


def default(model: type[BaseModel], key: str) -> str:
    field = model.model_fields[key]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "not set"
    if (not value and isinstance(value, str)) or (field.default_factory and isinstance(value, str)):
        return "see meaning"
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value)}`"


def rows(model: type[BaseModel]) -> list[list[str]]:
    properties = SCHEMA["$defs"][model.__name__]["properties"]
    return [
        [f"`{key}`", default(model, key), form(properties[key]), properties[key]["description"]]
        for key in model.model_fields
    ]


def table(heading: list[str], lines: list[list[str]]) -> str:
    """Write a table."""
    cells = [heading, ["---"] * len(heading), *lines]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def settings_page(page: str) -> str:
    """Return the page with the tables of keys as the code has them; what stands around them stays."""
    for title, model in key_tables().items():
        if model is None:
            continue
        section = re.compile(rf"^(### `{re.escape(title)}`\n.*?)^\|.*?\|$(?!\n\|)", re.MULTILINE | re.DOTALL)
        fresh = table(["key", "default", "written as", "meaning"], rows(model))
        page, count = section.subn(lambda found, fresh=fresh: found[1] + fresh, page, count=1)
        assert count == 1, f"settings.md needs a heading ### `{title}` and the beginning of a table under it"
    return page


# ------------------------------------------------------------------------------------------- commands

HEAD = """# Commands

Every command, as `relay COMMAND --help` tells it too.
Each takes `--help`; [exit statuses](operations.md#exit-statuses) are the same for all.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Return each command that does something, by its whole name."""
    todo = [("relay", typer.main.get_command(app))]
    while todo:
        name, command = todo.pop(0)
        inner = getattr(command, "commands", None)
        if inner:
            if getattr(command, "invoke_without_command", False):
                yield name, command
            todo[:0] = [(f"{name} {each}", inner[each]) for each in inner]
        else:
            yield name, command


def commands_page() -> str:
    """Return the page of commands."""
    parts = [HEAD]
    for name, command in commands():
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([name, *((each.metavar or each.name).upper() for each in arguments)])
        parts.append(f"## `{usage}`\n\n{_text(command.help)}\n")
        options = [each for each in command.params if each.param_type_name == "option"]
        lines = [[_option(each), _text(each.help)] for each in options if "--help" not in each.opts]
        if lines:
            parts.append(table(["option", "meaning"], lines) + "\n")
    return "\n".join(parts)


def _option(option: Any) -> str:
    names = ", ".join(option.opts + option.secondary_opts)
    return f"`{names}`" if option.is_flag else f"`{names} {option.metavar or _values(option)}`"


def _values(option: Any) -> str:
    kind = option.type_descriptor.annotation
    is_choice = isinstance(kind, type) and issubclass(kind, Enum)
    return "|".join(str(each.value) for each in kind) if is_choice else kind.__name__.upper()


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def write() -> None:
    """Write what follows from the code."""
    settings = DOCS / "settings.md"
    settings.write_text(settings_page(settings.read_text()))
    (DOCS / "commands.md").write_text(commands_page())


if __name__ == "__main__":
    write()
