"""The page's own files: what a browser asks for by name, and the templates, made ready.

All are read once: an upgrade changes none under a relay that runs.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

from relay.web.shown import FILTERS, visible

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["load_templates", "static_files"]

_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def load_templates() -> Environment:
    """Make all of them ready: to load jinja2 and to compile takes a while, which a start has not."""
    import jinja2

    files = _template_files()
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(files),
        auto_reload=False,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters.update(FILTERS)
    for name in files:
        environment.get_template(name)
    return environment


def _template_files() -> dict[str, str]:
    """Return the templates by name."""
    found = (resources.files("relay.web") / "templates").iterdir()
    return {each.name: each.read_text("utf-8") for each in found}


def static_files() -> dict[str, tuple[bytes, str]]:
    """Return the package's own files: content and type, by name."""
    root = resources.files("relay.web") / "static"
    names = ("style.css", "page.js", "favicon.svg", "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")
    return {name: ((root / name).read_bytes(), _TYPES[name.rpartition(".")[2]]) for name in names}
