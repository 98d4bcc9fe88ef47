"""The dashboard at a URL: :func:`dashboard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.urls import NoReverseMatch, path, re_path, reverse
from django.views.decorators.csrf import csrf_exempt

from taskx.contrib.django.mounting import answer, environ_of
from taskx.contrib.django.queues import get_queue

if TYPE_CHECKING:
    from taskx.programs.dashboard import Dashboard

_VIEW = frozenset({"read", "see_params"})
#: The permissions of the dashboard that each permission of Django gives. As in the admin, a user who may
#: change tasks, or answer, may view them.
PERMISSIONS: Mapping[str, frozenset[str]] = {
    "taskx.view_task": _VIEW,
    "taskx.change_task": _VIEW | {"cancel", "requeue", "edit", "pause", "tune"},
    "taskx.answer_task": _VIEW | {"answer"},
    "taskx.delete_task": frozenset({"delete"}),
    "taskx.change_schedule": frozenset({"schedules"}),
}
#: The namespace of the URLs: ``reverse("taskx:dashboard")`` is the overview. That of another backend than
#: ``default`` has its name, too: ``taskx-reports:dashboard``.
NAMESPACE = "taskx"

_GRANTED = "taskx.django.granted"

#: A function that returns the permissions of the dashboard for a request.
Check = Callable[[HttpRequest], Iterable[str]]


def permissions_of(request: HttpRequest) -> frozenset[str]:
    """Return what a request's user may do in the dashboard: nothing unless ``is_staff`` is set.

    ``view_task`` gives ``read`` and ``see_params``; ``change_task`` gives these, ``cancel``, ``requeue``,
    ``edit``, ``pause`` and ``tune``; ``answer_task`` gives the first two and ``answer``; ``delete_task``
    gives ``delete``; ``change_schedule`` gives ``schedules``.
    """
    user = request.user
    if not user.is_staff:
        return frozenset()
    given = [granted for name, granted in PERMISSIONS.items() if user.has_perm(name)]
    return frozenset().union(*given)


def dashboard(
    backend: str = "default",
    *,
    permissions: Check = permissions_of,
    read_only: bool = False,
    title: str = "TaskX",
) -> tuple[list[Any], str, str]:
    """Return the URLs of the dashboard, for ``path("tasks/", dashboard())``.

    A visitor who is not logged in is sent to the login page of the admin, or to ``LOGIN_URL`` if there is
    no admin. The user's name is noted with each change.

    Args:
        backend: the alias in ``TASKS`` whose queue is shown.
        permissions: a function that gets the request and returns permissions of the dashboard (see
            ``taskx.dashboard.PERMISSIONS``); by default :func:`permissions_of`.
        read_only: True if the pages change nothing.
        title: the name that the pages show.
    """
    current = _current(backend, read_only=read_only, title=title)

    def view(request: HttpRequest, rest: str, **kwargs: Any) -> HttpResponseBase:
        if not hasattr(request, "user"):
            raise ImproperlyConfigured(
                "the dashboard needs to know the user: add 'django.contrib.auth.middleware."
                "AuthenticationMiddleware' to MIDDLEWARE"
            )
        user = request.user
        if not user.is_authenticated:
            return _to_login(request, rest)
        environ = environ_of(request, rest)  # with the body, which the function may read, too
        environ[_GRANTED] = frozenset(permissions(request))
        environ["REMOTE_USER"] = user.get_username()
        return answer(current(), request, environ)

    # The dashboard has a check of its own, which also holds for its pages in the browser's cache.
    view = csrf_exempt(_not_atomic(view))
    return (
        [
            path("", view, {"rest": ""}, name="dashboard"),
            re_path(r"^(?P<rest>.+)$", view, name="dashboard-page"),
        ],
        NAMESPACE,
        NAMESPACE if backend == "default" else f"{NAMESPACE}-{backend}",
    )


def _current(backend: str, **options: Any) -> Callable[[], Dashboard]:
    """Return a function that returns the dashboard of the queue that the backend has now.

    Tests change settings, and then the backend has another queue.
    """
    made: list[Dashboard] = []

    def current() -> Dashboard:
        from taskx.programs.dashboard import Dashboard

        queue = get_queue(backend)
        if not made or made[0].queue is not queue:
            made[:] = [Dashboard(queue, permissions=lambda environ: environ[_GRANTED], **options)]
        return made[0]

    return current


def _not_atomic(view: Callable[..., Any]) -> Callable[..., Any]:
    """Return the view, which then runs outside of transactions: the queue has its own."""
    for alias in connections:
        view = transaction.non_atomic_requests(alias)(view)
    return view


def _to_login(request: HttpRequest, rest: str) -> HttpResponseBase:
    if rest.startswith("api/"):
        return HttpResponse('{"error": "log in first"}', "application/json", status=401)
    if (
        "Taskx-Refresh" in request.headers
    ):  # its page loads itself again, and is then led to the login
        return HttpResponse(status=401)
    from django.contrib.auth.views import redirect_to_login  # needs the app, which a site may lack

    try:
        login = reverse("admin:login")
    except NoReverseMatch:
        login = None  # LOGIN_URL
    return redirect_to_login(request.get_full_path(), login)
