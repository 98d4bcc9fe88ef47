"""A request to the dashboard, with everything that a screen needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from werkzeug import wrappers
from werkzeug.exceptions import Forbidden
from werkzeug.routing import Map

from taskx.programs.dashboard import words
from taskx.programs.dashboard.bodies import largest_body
from taskx.programs.dashboard.charts import Charts
from taskx.programs.dashboard.display import Display
from taskx.queue.queue import Queue
from taskx.tasks.clock import to_datetime
from taskx.tasks.errors import RepositoryError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: The name of the cookie with the chosen language.
LANGUAGE = "taskx_lang"
#: The name of the form field with the page to go back to.
BACK = "back"
# Characters of a detail in the audit log.
_LONGEST_DETAIL = 1_000


class Request(wrappers.Request):
    """A request to the dashboard.

    Attributes:
        queue: the queue that the dashboard shows.
        user: the name of the user who asks; empty if it is not known.
        permissions: the permissions of that user.
        language: the language of the page.
    """

    queue: Queue
    user: str
    permissions: frozenset[str]
    language: str
    #: The name of the screen that is shown.
    screen: str
    token: str

    def __init__(self, environ: WSGIEnvironment, queue: Queue, urls: Map) -> None:
        super().__init__(environ)
        self.queue = queue
        self.user = ""
        self.permissions = frozenset()
        self.language = words.language(
            self.cookies.get(LANGUAGE), self.headers.get("Accept-Language", "")
        )
        self.screen = ""
        self.token = ""
        # All URLs are relative, so the name of the host, which may be damaged, does not matter.
        self._urls = urls.bind(
            "dashboard",
            script_name=self.root_path,
            path_info=self.path,
            default_method=self.method,
        )
        self.max_content_length = self.max_form_memory_size = largest_body(queue)
        self.max_form_parts = 10_000

    def say(self, text: str, **values: Any) -> str:
        """Return an English text in the language of the page, with these values."""
        return words.translate(self.language, text, **values)

    def link(self, page: str, /, **values: Any) -> str:
        """Return the URL of a screen, of an action (``"types/pause"``) or of another page.

        The values become its query; those that are None or empty are left out.
        """
        given = {key: value for key, value in values.items() if value not in (None, "")}
        return self._urls.build(page, given)

    @cached_property
    def now(self) -> datetime:
        """The time of the page."""
        return to_datetime(self.queue.clock.now_ms())

    @cached_property
    def display(self) -> Display:
        """Shows times, durations and numbers in the language of the page."""
        return Display(self.language, self.now)

    @cached_property
    def charts(self) -> Charts:
        """Draws the charts of the page."""
        return Charts(self.display)

    def match(self) -> tuple[str, Mapping[str, Any]]:
        """Return the name of the page or action that the request asks for, and the values in its path.

        Raises:
            HTTPException: there is none.
        """
        return self._urls.match()

    @property
    def here(self) -> str:
        """The path and query of this page; of the page before, if a form led to this one."""
        if self.method == "POST":  # a body that was refused is not read either
            return self.back if "form" in self.__dict__ else self.link("overview")
        return self._within(self.full_path.rstrip("?"))

    @property
    def back(self) -> str:
        """The page to go to after an action: the one that the form was on, or the overview."""
        given = urlsplit(self.form.get(BACK, ""))
        root = self.link("overview")
        local = not given.scheme and not given.netloc and given.path.startswith(root)
        if not local or "\\" in given.path or given.path.startswith("//"):
            return root
        return given.geturl()

    def _within(self, path: str) -> str:
        return f"{self.root_path.rstrip('/')}{path}"

    def may(self, permission: str) -> bool:
        """Return True if the user has a permission."""
        return permission in self.permissions

    def require(self, permission: str) -> None:
        """Raise Forbidden if the user does not have a permission."""
        if not self.may(permission):
            self.refuse(
                self.say("This needs the permission “{permission}”.", permission=permission)
            )

    def refuse(self, sentence: str) -> NoReturn:
        """Raise Forbidden with a sentence."""
        raise Forbidden(sentence)

    def note(self, action: str, target: str, detail: str = "") -> None:
        """Note in the audit log what the user has changed. A change that was made is not undone by it."""
        if self.queue.repository.shortcoming:  # it has no place for a log
            return
        with suppress(RepositoryError):
            self.queue.note_change(
                self.user or "dashboard", action, target, detail[:_LONGEST_DETAIL] or None
            )

    def chosen(self, name: str = "id") -> Iterable[str]:
        """Return the values of a form field that can be given several times."""
        return dict.fromkeys(self.form.getlist(name))
