"""A question before a change that is large or cannot be undone."""

from __future__ import annotations

from collections.abc import Callable

from taskx.programs.dashboard.pages import Page
from taskx.programs.dashboard.request import BACK, Request
from taskx.programs.dashboard.security import TOKEN

#: The name of the form field that says yes.
YES = "confirmed"


def question(request: Request, text: str | Callable[[], str]) -> Page | None:
    """Return the page that asks a question; None if the form has answered it already.

    Args:
        request: the request.
        text: the question, or a function that returns it if it must be asked.
    """
    if request.form.get(YES):
        return None
    given = request.form.items(multi=True)
    fields = [(name, value) for name, value in given if name not in (TOKEN, BACK)]
    action = f"{request.root_path.rstrip('/')}{request.path}"
    words = text if isinstance(text, str) else text()
    values = {"question": words, "action": action, "fields": fields, "back": request.back}
    return Page("question.html", {**values, "refreshing": False})
