"""The base of all pages of the admin: their queue, and the log of changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import django
from django.contrib import admin, messages

from taskx.contrib.django.queues import load_queue
from taskx.contrib.django.repository import DjangoRepository
from taskx.contrib.django.settings import ours
from taskx.queue.queue import Queue
from taskx.tasks.errors import RepositoryError, TaskxError


def queue_of_site() -> Queue | None:
    """Return the first queue of ``TASKS`` whose tasks are in a database of the site; None if none is."""
    for alias in ours() or ["default"]:
        queue = load_queue(alias)
        if isinstance(queue.repository, DjangoRepository):
            return queue
    return None


class QueueAdmin(admin.ModelAdmin):
    """Pages about what a queue stores. Their changes are part of Django's transactions around them."""

    actions_on_bottom = True
    list_per_page = 100
    if django.VERSION >= (5, 0):
        show_facets = admin.ShowFacets.NEVER  # they count all rows

    def get_urls(self) -> list[Any]:
        """Return the URLs of the pages."""
        return [*self.own_urls(), *super().get_urls()]

    def own_urls(self) -> list[Any]:
        """Return the URLs of further pages."""
        return []

    def changelist_view(self, request: Any, extra_context: Any = None) -> Any:
        """Show the list; say so if the tasks are somewhere else."""
        if queue_of_site() is None:
            places = "; ".join(f"{alias}: {load_queue(alias).repository!r}" for alias in ours())
            messages.warning(
                request,
                f"The tasks are not in a database of this site ({places}): the dashboard shows them. "
                "This list would be of tasks in Django's database.",
            )
        return super().changelist_view(request, extra_context)

    def get_queryset(self, request: Any) -> Any:
        """Return the rows in the database of the queue; none if there is no such queue."""
        queue = queue_of_site()
        if queue is None:
            return super().get_queryset(request).none()
        assert isinstance(queue.repository, DjangoRepository)
        return super().get_queryset(request).using(queue.repository.using)

    def lookup_allowed(self, lookup: str, value: Any, request: Any = None) -> bool:
        """Return True for the filters of the list only.

        A lookup of a column could find out, letter by letter, a value that is redacted.
        """
        return lookup in {filter.parameter_name for filter in self.list_filter}

    def may(self, request: Any, action: str) -> bool:
        """Return True if the user has a permission for the model, such as ``change``."""
        name = self.opts.model_name
        allowed: bool = request.user.has_perm(f"{self.opts.app_label}.{action}_{name}")
        return allowed

    def has_steer_permission(self, request: Any) -> bool:
        """Return True if the user may take actions on objects."""
        return self.may(request, "change")

    def act(
        self, request: Any, name: str, ids: Sequence[str], change: Callable[[Queue], str]
    ) -> None:
        """Change something by the queue; tell the user what was done, and note it in the log of changes.

        Args:
            name: the name of the action, such as ``"cancel"``.
            ids: what is changed.
            change: makes the change, and returns a sentence about it.
        """
        queue = queue_of_site()
        if queue is None:
            return
        try:
            sentence = change(queue)
        except TaskxError as error:
            self.message_user(request, str(error), messages.ERROR)
            return
        self.message_user(request, sentence, messages.SUCCESS)
        note(request, queue, name, ids)


def note(request: Any, queue: Queue, action: str, ids: Sequence[str]) -> None:
    """Note a change in the log of changes, which ``queue.changes()`` reads."""
    target = ids[0] if len(ids) == 1 else f"{len(ids)} in the admin"
    try:
        queue.note_change(request.user.get_username(), action, target)
    except RepositoryError as error:  # the change is made
        messages.warning(request, f"The change is not in the log of changes: {error}")
