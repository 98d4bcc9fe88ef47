"""Access to the dashboard: users, permissions, the origin and the host of a request, and the headers."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from werkzeug.datastructures import Headers
from werkzeug.exceptions import Forbidden, TooManyRequests, Unauthorized

from taskx.programs.dashboard.bodies import kept_body, largest_body
from taskx.programs.dashboard.braking import Brake
from taskx.tasks.clock import Clock
from taskx.tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from taskx.programs.dashboard.request import Request

#: The permissions, and what each of them allows.
PERMISSIONS: Mapping[str, str] = {
    "read": "see all pages, without params, results, checkpoints and logs",
    "see_params": "see params, results, checkpoints and logs, and search in params",
    "cancel": "cancel tasks",
    "requeue": "run tasks again",
    "delete": "delete tasks",
    "edit": "run tasks again with other params",
    "answer": "give answers that tasks wait for",
    "pause": "pause and resume types",
    "tune": "change limits and workers, stop nodes",
    "schedules": "pause, resume, trigger and remove schedules",
}
#: All permissions: for an app that does its own check before the dashboard is called.
ALL = frozenset(PERMISSIONS)
#: The permissions that change nothing.
READING = frozenset({"read", "see_params"})

#: The WSGI key by which :func:`taskx.dashboard.serve` says that only this machine can connect.
LOCAL = "taskx.programs.dashboard.local"
#: The WSGI key with the further names to which the server answers.
HOSTS = "taskx.programs.dashboard.hosts"

#: The name of the cookie and of the form field with the token for browsers that send no origin.
TOKEN = "taskx_token"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_HOST = re.compile(r"[\w:][\w.:-]*")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

#: The function that tells the permissions of a request; it gets the WSGI environment.
Check = Callable[[Mapping[str, Any]], "Iterable[str] | None"]

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with "no-referrer", forms would be sent with the origin "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add_headers(headers: Headers) -> None:
    """Add the security headers to those of a response."""
    for name, value in _HEADERS.items():
        headers[name] = value


def check_permissions(names: Iterable[str]) -> frozenset[str]:
    """Return permissions as a set. Raises ConfigurationError for one that does not exist."""
    if isinstance(names, str):
        raise ConfigurationError(f"permissions must be a set of names, not the text {names!r}")
    found = frozenset(names)
    if unknown := found - ALL:
        raise ConfigurationError(
            f"unknown permission {min(map(repr, unknown))}; the known ones are: {', '.join(PERMISSIONS)}"
        )
    return found


class Gate:
    """Decides for each request who asks, and what that user may do.

    Args:
        users: passwords by user name, for HTTP basic authentication; None: no users.
        permissions: a set of permissions for everybody who gets as far as the dashboard, or a function
            that returns one for a request.
        clock: the source of the time that an address waits after wrong passwords.
        read_only: True: nothing can be changed, whatever the permissions are.
    """

    def __init__(
        self,
        users: Mapping[str, str] | None,
        permissions: Check | Iterable[str] | None,
        clock: Clock,
        *,
        read_only: bool,
    ) -> None:
        self._users = None if users is None else _check_users(users)
        self._check = permissions if callable(permissions) else None
        self._granted = (
            None if permissions is None or callable(permissions) else check_permissions(permissions)
        )
        self._read_only = read_only
        self._brake = Brake(clock)

    @property
    def closed(self) -> bool:
        """True if only a server that this machine alone can reach may let requests in."""
        return self._users is None and self._check is None and self._granted is None

    @property
    def asks_for_password(self) -> bool:
        """True if a request needs a user and a password."""
        return self._users is not None

    def user(self, request: Request) -> str:
        """Return the name of the user who asks; an empty text if it is not known.

        Raises:
            Unauthorized: the user or the password is missing or wrong.
            TooManyRequests: the address of the client waits after wrong passwords.
        """
        users, given = self._users, request.authorization
        if users is None:
            return str(request.environ.get("REMOTE_USER") or "")
        if given is not None and given.type == "basic":
            name, password = given.username or "", _digest(given.password or "")

            def right() -> bool:
                known = users.get(name)
                return hmac.compare_digest(password, known or _digest("")) and known is not None

            found, wait = self._brake.check(request.remote_addr or "", right)
            if wait:
                raise TooManyRequests(
                    request.say(
                        "Too many wrong passwords came from this address. Try again in {count} second.|"
                        "Too many wrong passwords came from this address. Try again in {count} seconds.",
                        count=wait,
                    ),
                    retry_after=wait,
                )
            if found:
                request.environ["REMOTE_USER"] = name
                return name
        raise Unauthorized("This page needs a user and a password.")

    def permissions(self, request: Request) -> frozenset[str]:
        """Return the permissions of a request.

        Raises:
            Forbidden: the dashboard was mounted without any check.
            ConfigurationError: the function returned a permission that does not exist.
        """
        if self._check is not None:
            with kept_body(request.environ, largest_body(request.queue)):
                granted = check_permissions(self._check(request.environ) or ())
        elif self._granted is not None:
            granted = self._granted
        elif self._users is not None or request.environ.get(LOCAL):
            granted = ALL
        else:
            raise Forbidden(
                "The dashboard is closed: it was mounted without users and without permissions. Give "
                "Dashboard(queue, permissions=...) a function that returns the permissions of a request, "
                "or users={name: password}."
            )
        return granted & READING if self._read_only else granted


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _check_users(users: Mapping[str, str]) -> dict[str, bytes]:
    if not isinstance(users, Mapping) or not users:
        raise ConfigurationError("users must map at least one user name to a password")
    for name, password in users.items():
        if not isinstance(name, str) or not name or ":" in name:
            raise ConfigurationError(f"{name!r} is not a user name: it must be a text without ':'")
        if not isinstance(password, str) or not password:
            raise ConfigurationError(
                f"user {name!r} has no password: give a text that is not empty"
            )
    return {name: _digest(password) for name, password in users.items()}


# --- the origin of a request


def check_origin(request: Request) -> None:
    """Check that a request that changes something comes from a page of the dashboard.

    Browsers of today say so in ``Sec-Fetch-Site``, older ones in ``Origin``. For those that send neither,
    the page carries a token that is also in a cookie. A body in JSON needs no token: other sites cannot
    make a browser send it.

    Raises:
        Forbidden: it does not.
    """
    if request.method in _SAFE:
        return
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        same = site == "same-origin"
    elif origin is not None:
        same = origin.partition("://")[2] == request.headers.get("Host")
    else:
        same = request.mimetype == "application/json" or _token_matches(request)
    if not same:
        raise Forbidden(
            "This request did not come from a page of this dashboard. Nothing was done."
        )


def _token_matches(request: Request) -> bool:
    kept, sent = request.cookies.get(TOKEN, ""), request.form.get(TOKEN, "")
    return bool(kept) and hmac.compare_digest(kept.encode(), sent.encode())


def new_token() -> str:
    """Return a new random token for the cookie and the forms."""
    return secrets.token_urlsafe(18)


def check_host(request: Request) -> None:
    """Check that a request to a server on the loopback address asks for a name of this server.

    A page of another site can let its name resolve to 127.0.0.1 and then read what the server answers.
    Such a request carries the other site's name.

    Raises:
        Forbidden: it asks for another name.
    """
    hosts = request.environ.get(HOSTS, ())
    if not hosts and not request.environ.get(LOCAL):
        return
    name = _name_of(request.headers.get("Host", ""))
    if name not in _LOOPBACK and name not in hosts:
        raise Forbidden(
            f"This server does not answer to the name {name!r:.80}, only to localhost, 127.0.0.1, [::1] "
            "and the names that `taskx dashboard --allowed-host` adds. Nothing was done."
        )


def check_hosts(names: Iterable[str]) -> frozenset[str]:
    """Return names of hosts as :func:`check_host` compares them.

    Raises:
        ConfigurationError: one is not a name or an address.
    """
    if isinstance(names, str):
        raise ConfigurationError(f"allowed_hosts must be a list of names, not the text {names!r}")
    found = {name: _name_of(name) for name in names}
    for name, known in found.items():
        if not _HOST.fullmatch(known) or name.strip("[]").lower() != known:
            raise ConfigurationError(
                f"{name!r} is not the name of a host: write it as in a URL, without scheme and port, such "
                "as 'dash.example.org'"
            )
    return frozenset(found.values())


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets that do not match
        return ""


def is_loopback(address: str) -> bool:
    """Return True if only this machine can connect to an address."""
    return address in _LOOPBACK
