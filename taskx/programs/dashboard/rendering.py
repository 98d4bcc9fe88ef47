"""Templates: every value is escaped, and no page has a script or a style of its own."""

from __future__ import annotations

import base64
from functools import lru_cache, partial
from typing import Any

import jinja2
from markupsafe import Markup
from werkzeug.wrappers import Response

from taskx.programs.dashboard import display, static_files
from taskx.programs.dashboard.pages import Page, Screen
from taskx.programs.dashboard.request import BACK, Request
from taskx.programs.dashboard.security import TOKEN
from taskx.programs.dashboard.terms import term

#: The name of the cookie with the sentence that the next page shows.
NOTICE = "taskx_notice"
_LONGEST_NOTICE = 500


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Return the templates of the dashboard."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("taskx.programs.dashboard"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(display.FILTERS)
    return made


def render(request: Request, page: Page, screens: tuple[Screen, ...], title: str) -> Response:
    """Return the response with a page."""
    template = environment().get_template(page.template)
    text = template.render(
        request=request,
        _=request.say,
        lang=request.language,
        url=request.link,
        asset=partial(_asset_url, request),
        may=request.may,
        term=term,
        screens=[screen for screen in screens if screen.letter],
        site=title,
        here=request.here,
        hidden=_hidden_fields(request, request.here),
        carry=partial(_hidden_fields, request),
        notice=read_notice(request),
        **page.values,
    )
    response = Response(text, status=page.status, mimetype="text/html")
    if has_notice(request):
        response.delete_cookie(NOTICE, path=cookie_path(request))
    if request.token and request.cookies.get(TOKEN) != request.token:
        set_cookie(request, response, TOKEN, request.token)
    return response


def _asset_url(request: Request, name: str) -> str:
    return request.link("static", name=name, v=static_files.version(name))


def _hidden_fields(request: Request, back: str) -> Markup:
    """Return the fields that every form with ``method="post"`` carries; it leads back to a page."""
    field = Markup('<input type="hidden" name="{}" value="{}">')
    token = field.format(TOKEN, request.token) if request.token else Markup("")
    return token + field.format(BACK, back)


# --- cookies


def cookie_path(request: Request) -> str:
    """Return the path for which the dashboard sets its cookies."""
    return request.root_path or "/"


def set_cookie(request: Request, response: Response, name: str, value: str, **options: Any) -> None:
    """Set a cookie that scripts cannot read and other sites' requests do not carry."""
    response.set_cookie(
        name,
        value,
        path=cookie_path(request),
        secure=request.is_secure,
        httponly=True,
        samesite="Strict",
        **options,
    )


def keep_notice(request: Request, response: Response, notice: str) -> None:
    """Let the next page show a sentence."""
    short = notice[:_LONGEST_NOTICE].encode("utf-8", "replace")
    set_cookie(request, response, NOTICE, base64.urlsafe_b64encode(short).decode(), max_age=60)


def has_notice(request: Request) -> bool:
    """Return True if the action before has left a sentence for this page.

    A page that refreshes itself leaves it to the next one: it may be that of before the action.
    """
    return NOTICE in request.cookies and "Taskx-Refresh" not in request.headers


def read_notice(request: Request) -> str:
    """Return the sentence that the action before has left; empty if there is none."""
    if not has_notice(request):
        return ""
    try:
        return base64.urlsafe_b64decode(request.cookies[NOTICE]).decode()
    except ValueError:  # somebody else has set the cookie
        return ""
