"""Which of the tasks that may start is started first."""

from __future__ import annotations


def rank(priority: int, created_at: int, run_at: int | None, ageing: int) -> int:
    """What tasks are sorted by, the smaller the sooner; equal ones go by when they were stored.

    By priority alone or, with ageing, by the moment at which a task of priority 0 would have begun to
    wait that comes at the same time: so the order of two tasks never changes, however long they wait.

    Args:
        priority: higher first.
        created_at: when it was stored, in milliseconds.
        run_at: its time, if it had to wait for one.
        ageing: milliseconds of waiting that count as one priority more; 0 for none.
    """
    if not ageing:
        return -priority
    return max(created_at, run_at or 0) - priority * ageing
