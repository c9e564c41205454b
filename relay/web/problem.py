"""Errors for programs: problem documents (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from aiohttp import web

__all__ = ["problem"]


def problem(
    status: int, detail: str, *, field: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """Return an answer of this status whose document says in `detail` what to change.

    `field` names the parameter that is wrong.
    """
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if field is not None:
        document["field"] = field
    return web.Response(
        status=status,
        body=orjson.dumps(document),
        content_type="application/problem+json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )
