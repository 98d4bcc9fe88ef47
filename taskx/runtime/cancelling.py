"""Many tasks cancelled together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from taskx.core import lifecycle
from taskx.core.writes import Update
from taskx.runtime.starter import Services

#: Tasks that are cancelled in one transaction.
BATCH = 200


class Cancelled(NamedTuple):
    """What became of tasks that were to be cancelled; those that had ended are in neither.

    Attributes:
        never_run: the writes of those that were pending.
        asked: the ids of those that run, and were asked to stop now.
    """

    never_run: Sequence[Update]
    asked: Sequence[str]


def cancel_all(services: Services, task_ids: Iterable[str]) -> Cancelled:
    """Cancel tasks, in this order.

    Raises:
        RepositoryError: the repository failed; some may have been cancelled.
    """
    ids = list(task_ids)
    never_run: list[Update] = []
    asked: list[str] = []
    for start in range(0, len(ids), BATCH):
        now = services.clock.now_ms()
        pairs = [lifecycle.cancel(task_id, now) for task_id in ids[start : start + BATCH]]
        results = services.ledger.commit([write for pair in pairs for write in pair])
        for pair, (gone, told) in zip(
            pairs, zip(results[::2], results[1::2], strict=True), strict=True
        ):
            if gone:
                never_run.append(pair[0])
            elif told:
                asked.append(pair[1].id)
    return Cancelled(never_run, asked)
