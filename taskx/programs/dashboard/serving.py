"""The dashboard served alone, for ``taskx dashboard``."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from taskx.programs.dashboard.app import Dashboard
from taskx.programs.dashboard.security import HOSTS, LOCAL, Check, check_hosts, is_loopback
from taskx.queue.queue import Queue
from taskx.tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_log = logging.getLogger("taskx")

#: The port of ``taskx dashboard``, unless another one is given.
PORT = 8642
_PREFIX = re.compile(r"(/[\w.~-]+)*", re.ASCII)


class _QuietHandler(WSGIRequestHandler):
    """Sends no version of Python in its answers, and logs requests at level DEBUG."""

    server_version = "TaskX"
    sys_version = ""
    timeout = 60  # seconds that a client may take to send its request

    def version_string(self) -> str:
        return self.server_version

    def log(self, type: str, message: str, *args: Any) -> None:
        _log.debug("dashboard: " + message, *args)


def _served(
    app: WSGIApplication,
    told: Mapping[str, object],
    prefix: str,
    environ: WSGIEnvironment,
    start_response: StartResponse,
) -> Iterable[bytes]:
    """Call the app as what it is served as: with what it is told, and at a path."""
    path = environ["PATH_INFO"]
    if f"{path}/".startswith(f"{prefix}/"):  # else the proxy has removed it
        path = path.removeprefix(prefix)
    return app({**environ, **told, "SCRIPT_NAME": prefix, "PATH_INFO": path}, start_response)


def bind(
    app: Dashboard,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    allowed_hosts: Iterable[str] = (),
    prefix: str = "",
    behind_proxy: bool = False,
) -> BaseWSGIServer:
    """Return a server for a dashboard that is bound to an address and does not serve yet.

    Its ``serve_forever()`` serves, with a thread for each connection; its ``shutdown()`` ends that, and
    ``server_close()`` closes the socket. Its ``server_port`` is the port; with ``port=0`` a free one.
    The arguments are those of :func:`serve`.

    Raises:
        ConfigurationError: others could connect, and the dashboard asks for no password; or an argument is
            not valid.
        OSError: the address cannot be bound.
    """
    local, hosts, prefix = is_loopback(host), check_hosts(allowed_hosts), _check_prefix(prefix)
    if not app.gate.asks_for_password and (hosts or not local):
        given = f"allowed_hosts={sorted(hosts)}" if hosts else f"host {host!r}"
        raise ConfigurationError(
            f"{given} lets other machines connect, so the dashboard needs users with passwords: "
            "give users={name: password}, or serve it on 127.0.0.1 without other names"
        )
    served: WSGIApplication = partial(_served, app, {LOCAL: local, HOSTS: hosts}, prefix)
    if behind_proxy:
        served = ProxyFix(served, x_for=1, x_proto=1)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Not bound by werkzeug, which prints its own words and ends the program if the port is taken.
    with socket.create_server((host, port), family=family) as listener:
        server = make_server(
            host,
            port,
            served,
            threaded=True,
            request_handler=_QuietHandler,
            fd=listener.fileno(),
        )
        server.server_port = listener.getsockname()[1]  # werkzeug sets it only if it binds itself
    server.daemon_threads = True  # type: ignore[attr-defined]
    return server


def _check_prefix(prefix: str) -> str:
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix.rstrip("/")):
        raise ConfigurationError(f"prefix must be a path such as '/taskx', not {prefix!r}")
    return prefix.rstrip("/")


def serve(
    queue: Queue,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    users: Mapping[str, str] | None = None,
    permissions: Check | Iterable[str] | None = None,
    read_only: bool = False,
    title: str = "TaskX",
    allowed_hosts: Iterable[str] = (),
    prefix: str = "",
    behind_proxy: bool = False,
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the dashboard of a queue until Ctrl-C.

    Args:
        queue: the queue, started or not.
        host: the address. Every other one than a loopback address requires ``users``.
        port: the port; 0 for any free one.
        users, permissions, read_only, title: as for :class:`Dashboard`.
        allowed_hosts: further names that browsers may ask for, such as the name of a proxy that keeps the
            header ``Host``. They require ``users``.
        prefix: the path of the dashboard below these names, such as ``/taskx``.
        behind_proxy: True: trust the last address in ``X-Forwarded-For`` and the scheme in
            ``X-Forwarded-Proto``. Only if all requests come through a proxy that sets them.
        ready: called with the URL as soon as the dashboard can be reached.

    Raises:
        ConfigurationError: an option is not valid, or other machines could connect without a password.
        OSError: the address cannot be bound.
    """
    app = Dashboard(queue, users=users, permissions=permissions, read_only=read_only, title=title)
    server = bind(
        app,
        host,
        port,
        allowed_hosts=allowed_hosts,
        prefix=prefix,
        behind_proxy=behind_proxy,
    )
    name = f"[{host}]" if ":" in host else host
    try:
        ready(f"http://{name}:{server.server_port}{prefix.rstrip('/')}/")
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
