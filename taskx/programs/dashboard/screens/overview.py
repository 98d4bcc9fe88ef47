"""The first screen: what is wrong, what there is to do, what was done, and the types."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from taskx.insight.stats import Stats, TypeStats
from taskx.programs.dashboard.display import MOST_WAITING
from taskx.programs.dashboard.findings import findings
from taskx.programs.dashboard.pages import Page, Screen
from taskx.programs.dashboard.request import Request

#: The periods of the charts: their names in URLs, their texts, their seconds, and their intervals.
PERIODS = (("hour", "The last hour", 3600.0, 60), ("day", "The last day", 86400.0, 48))
#: Groups of failures that are shown, and most failed tasks that are read for them.
GROUPS, MOST_FAILED = 6, 200
#: Types that are shown: those with trouble or work first.
TYPES = 15


def show(request: Request) -> Page:
    """Show what is wrong, the numbers of tasks, throughput and failures, and the types."""
    queue, (name, _, period, intervals) = request.queue, _period(request)
    stats = queue.stats(period=PERIODS[0][2], waiting_at_most=MOST_WAITING)
    hour = queue.history(period=PERIODS[0][2], intervals=PERIODS[0][3])
    paused = queue.paused
    since = request.now - timedelta(seconds=period)
    return Page(
        "overview.html",
        {
            "findings": [*findings(request, queue.health(), stats, paused)],
            "stats": stats,
            "types": _busiest(stats),
            "total": _totals(stats),
            "more_wait": any(one.waiting >= MOST_WAITING for one in stats.types.values()),
            "hour": hour,
            "latency": [one and one.p95 for one in hour.start_latency],
            "shown": hour if name == "hour" else queue.history(period=period, intervals=intervals),
            "periods": [(one, text) for one, text, *_ in PERIODS],
            "period": name,
            "failures": [*queue.failures(since=since, at_most=MOST_FAILED)][:GROUPS],
            "paused": paused,
        },
    )


def _period(request: Request) -> tuple[str, str, float, int]:
    wanted = request.args.get("period")
    return next((one for one in PERIODS if one[0] == wanted), PERIODS[0])


def _busiest(stats: Stats) -> dict[str, TypeStats]:
    """Return the types that need a look, or have most to do; sorted by name."""

    def rank(name: str) -> tuple[float, ...]:
        of = stats.types[name]
        return -of.stuck, -of.failed, -(of.waiting + of.running), -of.completed

    return {name: stats.types[name] for name in sorted(sorted(stats.types, key=rank)[:TYPES])}


def _totals(stats: Stats) -> dict[str, float | None]:
    """Return the numbers of all types together."""
    types = stats.types.values()
    names = ("waiting", "delayed", "blocked", "running", "stuck", "completed", "failed")
    sums: dict[str, float | None] = {
        name: sum(getattr(one, name) for one in types) for name in names
    }
    latencies = [one.start_latency for one in types if one.start_latency is not None]
    ended = sum(one.completed + one.failed for one in types)
    return {
        **sums,
        "error_share": sum(one.failed for one in types) / ended if ended else None,
        "oldest_due": _largest(one.oldest_due for one in types),
        "start_p50": _largest(latency.p50 for latency in latencies),
        "start_p95": _largest(latency.p95 for latency in latencies),
    }


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


SCREEN = Screen(name="overview", label="Overview", letter="o", path="/", show=show)
