"""Many tasks cancelled together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def cancel_all(services: Services, task_ids: Sequence[str]) -> Iterator[Cancelled]:
    """Cancel tasks, in this order; tells what became of them after each transaction.

    Raises:
        RepositoryError: the repository failed; what was told before was cancelled.
    """
    for start in range(0, len(task_ids), BATCH):
        yield _cancel_some(services, task_ids[start : start + BATCH])


def _cancel_some(services: Services, task_ids: Sequence[str]) -> Cancelled:
    now = services.clock.now_ms()
    pairs = [lifecycle.cancel(task_id, now) for task_id in task_ids]
    results = services.ledger.commit([write for pair in pairs for write in pair])
    never_run: list[Update] = []
    asked: list[str] = []
    for pair, gone, told in zip(pairs, results[::2], results[1::2], strict=True):
        if gone:
            never_run.append(pair[0])
        elif told:
            asked.append(pair[1].id)
    return Cancelled(never_run, asked)
