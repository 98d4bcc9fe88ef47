"""The command that serves the dashboard."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from taskx.programs.cli.errors import FAILED, Failure, Usage
from taskx.programs.cli.opening import Session, command

#: The environment variable with the password of ``--user``.
PASSWORD = "TASKX_DASHBOARD_PASSWORD"
# The port of `taskx.dashboard.serve`, which is imported at the first use.
_PORT = 8642


@command(
    "dashboard",
    f"""Serve the dashboard: pages about the queue in a browser, until Ctrl-C.

It listens on this machine only, and answers to the names of this machine. Another --host and each
--allowed-host need a --user; the password is in {PASSWORD}, or is asked for. Put a proxy with TLS before
it: it speaks plain HTTP.""",
    f"""
taskx dashboard
taskx dashboard --port 9000 --read-only
{PASSWORD}=… taskx dashboard --host 0.0.0.0 --user ops
{PASSWORD}=… taskx dashboard --user ops --allowed-host dash.example.org --prefix /taskx --behind-proxy
""",
    click.option(
        "--host", default="127.0.0.1", show_default=True, help="The address to listen on."
    ),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=_PORT,
        show_default=True,
        help="The port to listen on; 0 for any free one.",
    ),
    click.option("--user", help="Ask for this name and a password."),
    click.option("--read-only", is_flag=True, help="Refuse all changes."),
    click.option(
        "--allow",
        metavar="PERMISSION",
        multiple=True,
        help="Allow only this, such as read, see_params or requeue; may be given several times.",
    ),
    click.option(
        "--allowed-host",
        metavar="NAME",
        multiple=True,
        help="Answer to this name, too, such as that of a proxy; may be given several times.",
    ),
    click.option(
        "--prefix", metavar="PATH", default="", help="Serve below this path, such as /taskx."
    ),
    click.option(
        "--behind-proxy",
        is_flag=True,
        help="Trust X-Forwarded-For and X-Forwarded-Proto: a proxy sets them in all requests.",
    ),
    click.option("--title", default="TaskX", show_default=True, help="The name in the pages."),
)
def dashboard(
    session: Session,
    host: str,
    port: int,
    user: str | None,
    read_only: bool,
    allow: Sequence[str],
    allowed_host: Sequence[str],
    prefix: str,
    behind_proxy: bool,
    title: str,
) -> None:
    """Serve the dashboard."""
    try:
        from taskx.programs.dashboard import serve
        from taskx.programs.dashboard.security import is_loopback
    except ImportError as error:
        raise Usage(str(error)) from error
    if user is None and not is_loopback(host):
        raise Usage(f"--host {host} lets other machines connect: give --user, too, or leave it out")
    try:
        serve(
            session.queue,
            host,
            port,
            ready=lambda url: _ready(session, url),
            users=None if user is None else {user: _password(user)},
            permissions=allow or None,
            read_only=read_only,
            title=title,
            allowed_hosts=allowed_host,
            prefix=prefix,
            behind_proxy=behind_proxy,
        )
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[
            0
        ]  # Python names the address again
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why += "; --port chooses another one"
        raise Failure(f"cannot listen on {host}, port {port}: {why}", FAILED) from error


def _ready(session: Session, url: str) -> None:
    if session.json:
        session.out.json({"url": url})
    else:
        session.out.line(f"Ctrl-C ends the dashboard at {url}")
    sys.stdout.flush()


def _password(user: str) -> str:
    if password := os.environ.get(PASSWORD):
        return password
    if not sys.stdin.isatty():
        raise Usage(f"--user {user} needs a password: set {PASSWORD}")
    given: str = click.prompt(f"Password of {user}", hide_input=True, err=True)
    return given


COMMANDS = (dashboard,)
