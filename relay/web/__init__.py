"""The HTTP side: metrics, health, page and API. With the upstream's tokens the only importer of aiohttp.

What is imported here has no need of it; the rest, which takes long to load, is imported as `site.py` is.
`door.py` is where HTTP is listened on, `server.py` the routes that every relay has, `crowd.py` how many may
be connected; `site.py` is what else there is, and `access.py` says who gets it. `page.py` is for people,
with `box.py` (the search), `shown.py` (the words), `figures.py` (the charts), `standing.py` (what stands
now), `files.py` and `kept.py`; `api.py` is for programs, with `openapi.py` and `problem.py`. Both read with
`reading.py` and `overview.py`, and show a `row.py` and a `cursor.py`.
"""

from relay.web.door import BindError, Web
from relay.web.overview import Overview
from relay.web.reading import Reading

__all__ = ["BindError", "Overview", "Reading", "Web"]
