"""Which index leads, said to SQLite: SQLAlchemy keeps `with_hint`, and its SQLite dialect leaves it out."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler

__all__ = ["heed_hints"]


class _Compiler(SQLiteCompiler):
    def get_from_hint_text(self, table: sa.FromClause, text: str | None) -> str | None:  # noqa: ARG002
        return text


def heed_hints(dialect: Any) -> Any:
    """Make this SQLite dialect write the hints of a statement behind its tables; return it."""
    dialect.statement_compiler = _Compiler
    return dialect
