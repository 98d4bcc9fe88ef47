"""The system: the files, the numbers of tasks by status, the settings, and who changed what."""

from __future__ import annotations

import platform

import attrs

import taskx
from taskx.insight.query import query_of
from taskx.programs.dashboard.pages import Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.tasks.model import TaskFilter, TaskStatus

#: The largest number that is counted.
MOST_COUNTED = 10_000
#: Changes of the audit log that are shown.
CHANGES = 200


def show(request: Request) -> Page:
    """Show the system."""
    queue = request.queue
    filters = {status: TaskFilter(status=status) for status in TaskStatus}
    return Page(
        "system.html",
        {
            "repository": repr(queue.repository),
            "files": queue.repository.house.file_sizes(),
            "counts": [
                (status.value, query_of(wanted), queue.count_tasks(wanted, at_most=MOST_COUNTED))
                for status, wanted in filters.items()
            ],
            "settings": attrs.asdict(queue.config, recurse=False),
            "changes": [] if queue.repository.shortcoming else queue.changes(CHANGES),
            "versions": {"TaskX": taskx.__version__, "Python": platform.python_version()},
        },
    )


SCREEN = Screen(name="system", label="System", letter="m", show=show)
