"""The style sheet and the scripts, with the hash of their content in their URLs."""

from __future__ import annotations

import gzip
import hashlib
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Request, Response

_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_YEAR = 365 * 24 * 3600


class Asset(NamedTuple):
    """A file as it is sent."""

    content: bytes
    packed: bytes
    version: str
    type: str


@lru_cache(maxsize=64)
def asset(name: str) -> Asset | None:
    """Return a file; None if there is none of this name that browsers load."""
    kind = _TYPES.get(name.rpartition(".")[2])
    folder = resources.files("taskx.programs.dashboard") / "static"
    if kind is None or name not in (file.name for file in folder.iterdir()):
        return None
    content = (folder / name).read_bytes()
    version = hashlib.sha256(content).hexdigest()[:12]
    return Asset(content, gzip.compress(content, 9, mtime=0), version, kind)


def version(name: str) -> str:
    """Return the part of a file's URL that changes with its content."""
    found = asset(name)
    if found is None:
        raise LookupError(f"the dashboard has no file {name!r}")
    return found.version


def send(request: Request, name: str) -> Response:
    """Return the response with a file.

    Raises:
        NotFound: there is no such file.
    """
    found = asset(name)
    if found is None:
        raise NotFound
    response = Response(found.content, content_type=f"{found.type}; charset=utf-8")
    response.vary.add("Accept-Encoding")
    response.set_etag(found.version)
    if request.accept_encodings["gzip"] > 0:
        response.set_data(found.packed)
        response.headers["Content-Encoding"] = "gzip"
        response.set_etag(f"{found.version}-gzip")  # an ETag names the bytes that are sent
    if request.args.get("v") == found.version:
        response.cache_control.public = True
        response.cache_control.max_age = _YEAR
        response.cache_control.immutable = True
    else:
        response.cache_control.no_cache = True
    return response.make_conditional(request)
