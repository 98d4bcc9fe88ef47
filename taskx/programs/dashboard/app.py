"""The WSGI app: it lets requests in, finds the screen, and answers with a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import Map, Rule
from werkzeug.utils import redirect
from werkzeug.wrappers import Response

from taskx.programs.dashboard import (
    api,
    openapi,
    rendering,
    security,
    static_files,
    streaming,
    words,
)
from taskx.programs.dashboard.failing import status_and_sentence
from taskx.programs.dashboard.freshness import Freshness, etag_of
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import LANGUAGE, Request
from taskx.programs.dashboard.screens import SCREENS
from taskx.queue.queue import Queue
from taskx.tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_YEAR = 365 * 24 * 3600
# Statuses of errors that pass by themselves.
_LATER = (429, 503)


class Dashboard:
    """A dashboard for a queue: a WSGI app.

    Mount it in a program, for example in Flask::

        app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/taskx": Dashboard(queue, users=users)})

    It is closed by default: without ``users`` and ``permissions`` every request is refused. Only
    ``taskx.dashboard.serve(queue)``, which this machine alone can reach, needs neither. The queue need not
    be started.

    Args:
        queue: the queue to show.
        users: passwords by user name; browsers ask for them (HTTP basic authentication).
        permissions: a function that gets the WSGI environment and returns the permissions of that request,
            a set of names of ``PERMISSIONS``; an empty set or None refuses it. Or the set itself, such as
            ``ALL``, if your program checks requests before the dashboard is called.
        read_only: True: nothing can be changed, whatever the permissions are.
        title: the name that the pages show.

    Raises:
        ConfigurationError: an argument is not valid.
    """

    def __init__(
        self,
        queue: Queue,
        *,
        users: Mapping[str, str] | None = None,
        permissions: security.Check | Iterable[str] | None = None,
        read_only: bool = False,
        title: str = "TaskX",
    ) -> None:
        if not isinstance(queue, Queue):
            raise ConfigurationError(f"queue must be a Queue, not {type(queue).__name__}")
        self.queue = queue
        self.title = title
        self.gate = security.Gate(users, permissions, queue.clock, read_only=read_only)
        self._freshness = Freshness(queue)
        self._screens = SCREENS
        self._pages: dict[str, tuple[Screen, Any]] = {}
        self._actions: dict[str, Action] = {}
        self._calls: dict[str, api.Call] = {}
        self._map = Map(self._rules(), strict_slashes=False, merge_slashes=False)

    def _rules(self) -> list[Rule]:
        rules = [
            Rule("/static/<name>", endpoint="static", methods=["GET"]),
            Rule("/language", endpoint="language", methods=["POST"]),
            Rule("/tasks/<path:task_id>/stream", endpoint="stream", methods=["GET"]),
            Rule("/api/openapi.json", endpoint="api/openapi", methods=["GET"]),
        ]
        for call in api.CALLS:
            self._calls[f"api/{call.name}"] = call
            rules.append(
                Rule(f"/api/{call.name}", endpoint=f"api/{call.name}", methods=[call.method])
            )
        for screen in self._screens:
            path = screen.path or f"/{screen.name}"
            self._pages[screen.name] = (screen, screen.show)
            rules.append(Rule(path, endpoint=screen.name, methods=["GET"]))
            for name, view in screen.parts.items():
                endpoint = f"{screen.name}/{name}"
                self._pages[endpoint] = (screen, view)
                rules.append(Rule(f"/{endpoint}", endpoint=endpoint, methods=["GET"]))
            for name, action in screen.actions.items():
                endpoint = f"{screen.name}/{name}"
                self._actions[endpoint] = action
                rules.append(Rule(f"/{endpoint}", endpoint=endpoint, methods=["POST"]))
        return rules

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        request = Request(environ, self.queue, self._map)
        response = self._respond(request)
        security.add_headers(response.headers)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        try:
            security.check_host(request)
            request.user = self.gate.user(request)
            request.permissions = self.gate.permissions(request)
            request.require("read")
            security.check_origin(request)
            return self._dispatch(request)
        except Exception as error:  # noqa: BLE001  (each error becomes a page)
            return self._fail(request, error)

    def _dispatch(self, request: Request) -> Response:
        endpoint, values = request.match()
        if endpoint == "static":
            return static_files.send(request, **values)
        if endpoint == "api/openapi":
            api.check_parameters(request, ())
            return api.as_json(openapi.document(request.link("overview").rstrip("/") + "/api"))
        if endpoint == "stream":
            return streaming.send(request, **values)
        if endpoint in self._calls:
            return api.answer(request, self._calls[endpoint])
        if "Sec-Fetch-Site" not in request.headers:
            request.token = request.cookies.get(security.TOKEN) or security.new_token()
        if endpoint == "language":
            return self._choose_language(request)
        if endpoint in self._actions:
            return self._act(request, self._actions[endpoint])
        return self._show(request, *self._pages[endpoint])

    # --- pages

    def _show(self, request: Request, screen: Screen, view: Any) -> Response:
        request.screen = screen.name
        etag = self._etag(request) if screen.fresh else None
        if etag is not None and request.if_none_match.contains(etag):
            response = Response(status=304)
        else:
            made = view(request)
            if isinstance(made, Response):
                return made
            response = rendering.render(request, made, self._screens, self.title)
            if response.status_code != 200 or rendering.has_notice(request):
                etag = None
            elif etag is None:
                etag = etag_of(response.get_data())
        response.cache_control.private = True
        response.cache_control.no_cache = True
        response.vary.update(("Cookie", "Accept-Language", "Authorization"))
        if etag is None:
            response.cache_control.no_store = True
        else:
            response.set_etag(etag)
        return response.make_conditional(request)

    def _etag(self, request: Request) -> str | None:
        if rendering.has_notice(request):
            return None
        return self._freshness.etag(
            request.full_path,
            request.root_path,
            request.language,
            request.token,
            request.user,
            sorted(request.permissions),
        )

    # --- changes

    def _act(self, request: Request, action: Action) -> Response:
        request.require(action.permission)
        done = action.run(request)
        if isinstance(done, Done):
            response = redirect(done.to or request.back, 303)
            rendering.keep_notice(request, response, done.notice)
        elif isinstance(done, Page):
            response = rendering.render(request, done, self._screens, self.title)
        else:
            response = done
        response.cache_control.no_store = True
        return response

    def _choose_language(self, request: Request) -> Response:
        response = redirect(request.back, 303)
        chosen = words.language(request.form.get("to"), "")
        rendering.set_cookie(request, response, LANGUAGE, chosen, max_age=_YEAR)
        return response

    # --- errors

    def _fail(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.response is not None:
            return Response.force_type(error.get_response(request.environ))
        status, sentence = status_and_sentence(error)
        if request.path.startswith("/api/"):
            given = {"error": sentence, "type": type(error).__name__, "status": status}
            response = api.as_json(given, status)
        else:
            values = {"status": status, "sentence": sentence, "refreshing": status in _LATER}
            page = Page("error.html", values, status)
            response = rendering.render(request, page, self._screens, self.title)
        response.cache_control.no_store = True
        if status == 401:
            response.headers["WWW-Authenticate"] = 'Basic realm="TaskX", charset="UTF-8"'
        elif status in _LATER:
            response.headers["Retry-After"] = str(getattr(error, "retry_after", None) or 5)
        elif isinstance(error, MethodNotAllowed):
            response.allow.update(sorted(error.valid_methods or ()))
        return response
