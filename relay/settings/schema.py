"""The JSON Schema of the configuration, in the forms in which people write it.

What a key means is the text under it in the source. It is read here: pydantic would read it for every start.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from relay.settings.model import Settings
from relay.settings.section import Section

__all__ = ["schema"]


def schema() -> dict[str, Any]:
    """Return it."""
    made: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Settings.model_json_schema(mode="validation"),
        "title": "relay.toml",
        "description": "Configuration of the SMTP relay",
    }
    sections = {model.__name__: model for model in _sections(Section)}
    for name, definition in {Settings.__name__: made, **made["$defs"]}.items():
        for key, meaning in _meanings(sections[name]):
            definition["properties"][key]["description"] = meaning
    return made


def _sections(model: type[Section]) -> Iterator[type[Section]]:
    """Yield all kinds of sections that there are."""
    for kind in model.__subclasses__():
        yield kind
        yield from _sections(kind)


def _meanings(model: type[Section]) -> Iterator[tuple[str, str]]:
    """Yield each key of a section with the text under it."""
    definition: Any = ast.parse(inspect.getsource(model)).body[0]
    for field, text in pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(key)), ast.Expr(ast.Constant(str(meaning))):
                yield key, inspect.cleandoc(meaning)
