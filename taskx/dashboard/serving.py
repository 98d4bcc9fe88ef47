"""The dashboard served alone, for ``taskx dashboard``."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from taskx.core.errors import ConfigurationError
from taskx.dashboard.app import Dashboard
from taskx.dashboard.security import LOCAL, Check, is_loopback
from taskx.queue import Queue

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_log = logging.getLogger("taskx")

#: The port of ``taskx dashboard``, unless another one is given.
PORT = 8642


class _QuietHandler(WSGIRequestHandler):
    """Sends no version of Python in its answers, and logs requests at level DEBUG."""

    server_version = "TaskX"
    sys_version = ""
    timeout = 60  # seconds that a client may take to send its request

    def version_string(self) -> str:
        return self.server_version

    def log(self, type: str, message: str, *args: Any) -> None:
        _log.debug("dashboard: " + message, *args)


def _as_local(app: Dashboard) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """Return the app such that it knows that only this machine can connect."""

    def local(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ[LOCAL] = True
        return app(environ, start_response)

    return local


def bind(app: Dashboard, host: str = "127.0.0.1", port: int = PORT) -> BaseWSGIServer:
    """Return a server for a dashboard that is bound to an address and does not serve yet.

    Its ``serve_forever()`` serves, with a thread for each connection; its ``shutdown()`` ends that, and
    ``server_close()`` closes the socket. Its ``server_port`` is the port; with ``port=0`` a free one.

    Raises:
        ConfigurationError: other machines could connect, and the dashboard asks for no password.
        OSError: the address cannot be bound.
    """
    local = is_loopback(host)
    if not local and not app.gate.asks_for_password:
        raise ConfigurationError(
            f"host {host!r} lets other machines connect, so the dashboard needs users with passwords: "
            "give users={name: password}, or serve it on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Not bound by werkzeug, which prints its own words and ends the program if the port is taken.
    with socket.create_server((host, port), family=family) as listener:
        server = make_server(
            *(host, port),
            _as_local(app) if local else app,
            threaded=True,
            request_handler=_QuietHandler,
            fd=listener.fileno(),
        )
        server.server_port = listener.getsockname()[1]  # werkzeug sets it only if it binds itself
    server.daemon_threads = True  # type: ignore[attr-defined]
    return server


def serve(
    queue: Queue,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    users: Mapping[str, str] | None = None,
    permissions: Check | Iterable[str] | None = None,
    read_only: bool = False,
    title: str = "TaskX",
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the dashboard of a queue until Ctrl-C.

    Args:
        queue: the queue, started or not.
        host: the address. Every other one than a loopback address requires ``users``.
        port: the port; 0 for any free one.
        users, permissions, read_only, title: as for :class:`Dashboard`.
        ready: called with the URL as soon as the dashboard can be reached.

    Raises:
        ConfigurationError: an option is not valid, or other machines could connect without a password.
        OSError: the address cannot be bound.
    """
    app = Dashboard(queue, users=users, permissions=permissions, read_only=read_only, title=title)
    server = bind(app, host, port)
    name = f"[{host}]" if ":" in host else host
    try:
        ready(f"http://{name}:{server.server_port}/")
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
