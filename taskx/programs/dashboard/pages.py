"""The forms in which a screen is written: its page, its actions, its place in the navigation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from werkzeug.wrappers import Response

if TYPE_CHECKING:
    from taskx.programs.dashboard.request import Request


@attrs.frozen
class Page:
    """A page to show.

    Attributes:
        template: the name of its template.
        values: the names that the template uses.
        status: the HTTP status.
    """

    template: str
    values: Mapping[str, Any] = attrs.field(factory=dict)
    status: int = 200


@attrs.frozen
class Done:
    """The end of an action: the browser goes to a page that shows the notice.

    Attributes:
        notice: one sentence, translated: see :meth:`Request.say`.
        to: the URL to go to; empty: the page that the form was on.
    """

    notice: str
    to: str = ""


#: A page for GET requests.
View = Callable[["Request"], "Page | Response"]
#: A change for POST requests. It may also show a page, such as a question.
Run = Callable[["Request"], "Done | Page | Response"]


@attrs.frozen
class Action:
    """Something that a screen can change.

    Attributes:
        permission: the permission that it needs.
        run: does it.
    """

    permission: str
    run: Run


@attrs.frozen(kw_only=True)
class Screen:
    """One screen of the dashboard. Its page is at ``/name``, its actions are at ``/name/action``.

    Attributes:
        name: its name in URLs: ``request.link(name)``, and ``request.link("name/action")``.
        label: the text in the navigation, in English.
        show: makes its page; needs the permission ``read``.
        letter: ``g`` and this letter go to it; empty: it is not in the navigation.
        path: its path, if it is not ``/name``.
        actions: its actions for POST requests, by name.
        parts: further pages, by name, which are at ``/name/part``.
        fresh: True if its page only depends on what is stored, on the user and on the time in steps of
            five seconds. Then an unchanged page is not made again.
    """

    name: str
    label: str
    show: View
    letter: str = ""
    path: str = ""
    actions: Mapping[str, Action] = attrs.field(factory=dict)
    parts: Mapping[str, View] = attrs.field(factory=dict)
    fresh: bool = True
