"""The storing of the progress that runs report."""

from __future__ import annotations

from collections.abc import Sequence

from taskx.attempt.runner import Run
from taskx.node.moving import Services
from taskx.tasks import lifecycle
from taskx.tasks.record import changed_task


def store_progress(services: Services, runs: Sequence[Run]) -> None:
    """Store the progress of those runs that have reported some since the last time.

    Raises:
        RepositoryError: it could not be stored; the next call tries again.
    """
    tasks, writes = {}, []
    stored = False
    try:
        for run in runs:
            if (new := run.context._new_progress()) is not None:
                tasks[run.task.id] = run.task
                if services.hooks.progressed:  # they see the checkpoints that it has stored, too
                    tasks[run.task.id] = changed_task(run.task, run.context._shown({}))
                writes.append(lifecycle.progress(run.task.id, run.task.starts, *new))
        if writes:
            services.moves.commit(writes, tasks)
            stored = True
    finally:
        for run in runs:
            run.context._progress_written(stored=stored)
