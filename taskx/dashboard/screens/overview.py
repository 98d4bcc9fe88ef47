"""The first screen: what is wrong, and what there is to do."""

from __future__ import annotations

from taskx.dashboard.pages import Page, Screen
from taskx.dashboard.request import Request


def show(request: Request) -> Page:
    """Show what is wrong, the numbers of tasks, and the types."""
    queue = request.queue
    stats = queue.stats()
    return Page("overview.html", {"health": queue.health(), "stats": stats})


SCREEN = Screen(name="overview", label="Overview", letter="o", path="/", show=show)
