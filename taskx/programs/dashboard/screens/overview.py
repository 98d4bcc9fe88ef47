"""The first screen: what is wrong, what there is to do, what was done, and the types."""

from __future__ import annotations

from collections.abc import Iterable

from taskx.insight.stats import Stats
from taskx.programs.dashboard.display import MOST_WAITING
from taskx.programs.dashboard.pages import Page, Screen
from taskx.programs.dashboard.request import Request

_HOUR, _DAY = 3600.0, 86400.0


def show(request: Request) -> Page:
    """Show what is wrong, the numbers of tasks, throughput and failures, and the types."""
    queue = request.queue
    stats = queue.stats(period=_HOUR, waiting_at_most=MOST_WAITING)
    return Page(
        "overview.html",
        {
            "health": queue.health(),
            "stats": stats,
            "total": _totals(stats),
            "more_wait": any(one.waiting >= MOST_WAITING for one in stats.types.values()),
            "hour": queue.history(period=_HOUR, intervals=60),
            "day": queue.history(period=_DAY, intervals=48),
            "paused": queue.paused,
        },
    )


def _totals(stats: Stats) -> dict[str, float | None]:
    """Return the numbers of all types together."""
    types = stats.types.values()
    names = ("waiting", "delayed", "blocked", "running", "stuck", "completed", "failed")
    sums: dict[str, float | None] = {
        name: sum(getattr(one, name) for one in types) for name in names
    }
    latencies = [one.start_latency for one in types if one.start_latency is not None]
    return {
        **sums,
        "oldest_due": _largest(one.oldest_due for one in types),
        "start_p50": _largest(latency.p50 for latency in latencies),
        "start_p95": _largest(latency.p95 for latency in latencies),
    }


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


SCREEN = Screen(name="overview", label="Overview", letter="o", path="/", show=show)
