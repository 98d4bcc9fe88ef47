"""The storing of the progress that runs report."""

from __future__ import annotations

from collections.abc import Sequence

from taskx.core import lifecycle
from taskx.executing.runner import Run
from taskx.moving import Services


def store_progress(services: Services, runs: Sequence[Run]) -> None:
    """Store the progress of those runs that have reported some since the last time.

    Raises:
        RepositoryError: it could not be stored; the next call tries again.
    """
    told, writes = [], []
    stored = False
    try:
        for run in runs:
            if (new := run.context.new_progress()) is not None:
                told.append(run)
                writes.append(lifecycle.progress(run.task.id, run.task.starts, *new))
        if not writes:
            return
        results = services.ledger.commit(writes)
        stored = True
    finally:
        for run in runs:
            run.context.progress_written(stored=stored)
    for run, write, held in zip(told, writes, results, strict=True):
        if held:
            services.consequences.follow([write], {run.task.id: run.task}, run=run)
