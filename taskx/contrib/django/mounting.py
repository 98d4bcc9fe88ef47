"""A WSGI app inside a Django view: the request becomes a WSGI environment, the answer a response."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from http.cookies import SimpleCookie
from io import BytesIO
from typing import TYPE_CHECKING, Any

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

# Statuses of answers without a body.
_BARE = frozenset({204, 304})


def answer(app: WSGIApplication, request: HttpRequest, environ: dict[str, Any]) -> HttpResponseBase:
    """Call a WSGI app for a request, and return its answer. A body without a length is streamed.

    Args:
        app: the app.
        request: the request, under WSGI or ASGI.
        environ: its WSGI environment: :func:`environ_of`, and what the app is to know.
    """
    started: list[Any] = []

    def start_response(*given: Any) -> Callable[[bytes], object]:
        started[:] = given
        return _unsupported

    body = app(environ, start_response)
    status, headers = started[:2]
    code, _, reason = status.partition(" ")
    about: dict[str, Any] = {"status": int(code), "reason": reason}
    response: HttpResponseBase
    if request.method == "HEAD" or int(code) in _BARE:
        response = HttpResponse(**about)
        _close(body)
    elif "Content-Length" in dict(headers):
        response = HttpResponse(b"".join(body), **about)
        _close(body)
    elif hasattr(request, "scope"):  # ASGI: Django would read an ordinary iterator to its end first
        response = StreamingHttpResponse(_Parts(body).sent(), **about)
    else:
        response = StreamingHttpResponse(body, **about)
    _set_headers(response, headers)
    return response


def _unsupported(data: bytes) -> object:
    raise NotImplementedError("write() of WSGI")


def _set_headers(response: HttpResponseBase, headers: Iterable[tuple[str, str]]) -> None:
    del response["Content-Type"]
    for name, value in headers:
        if name.lower() == "set-cookie":
            response.cookies.update(SimpleCookie(value))
        else:
            response[name] = f"{response[name]}, {value}" if name in response else value


def environ_of(request: HttpRequest, path: str) -> dict[str, Any]:
    """Return the WSGI environment of a request for an app that is mounted where ``path`` begins.

    It reads the body. Django then gives the body to others, too, also to those that come later.
    """
    return {
        **request.META,
        "wsgi.version": (1, 0),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.input": BytesIO(request.body),
        # As the settings understand the headers of a proxy.
        "wsgi.url_scheme": request.scheme,
        "HTTP_HOST": request.get_host(),
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": _as_wsgi(request.path.removesuffix(path)).rstrip("/"),
        "PATH_INFO": f"/{_as_wsgi(path)}",
    }


def _as_wsgi(path: str) -> str:
    """Return a path as WSGI wants it: one character for each byte."""
    return path.encode("utf-8", "surrogateescape").decode("latin-1")


def _close(body: Iterable[bytes]) -> None:
    close: Callable[[], object] | None = getattr(body, "close", None)
    if close is not None:
        close()


class _Parts:
    """The parts of a body, for an event loop: each is waited for on another thread."""

    def __init__(self, body: Iterable[bytes]) -> None:
        self._body = body
        self._iterator = iter(body)
        self._lock = threading.Lock()

    async def sent(self) -> AsyncIterator[bytes]:
        """Yield the parts as they come."""
        loop = asyncio.get_running_loop()
        try:
            while (part := await loop.run_in_executor(None, self._next)) is not None:
                yield part
        finally:
            # Not waited for: if the client has gone, a thread may still wait for the next part.
            loop.run_in_executor(None, self._close)

    def _next(self) -> bytes | None:
        with self._lock:
            return next(self._iterator, None)

    def _close(self) -> None:
        with self._lock:
            _close(self._body)
