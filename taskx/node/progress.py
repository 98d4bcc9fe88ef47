"""The storing of the progress that runs report, and of what they emit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from taskx.attempt.runner import Run
from taskx.node.hooks import Hooks
from taskx.node.moving import Moves
from taskx.stores.base import Repository
from taskx.tasks import lifecycle
from taskx.tasks.clock import Clock
from taskx.tasks.errors import PayloadError
from taskx.tasks.record import changed_task


def store_progress(runs: Sequence[Run], moves: Moves, hooks: Hooks, clock: Clock) -> None:
    """Store what runs have told since the last time: their progress, and the log that is kept of them.

    Raises:
        RepositoryError: it could not be stored; the next call tries again.
    """
    tasks, writes, logs, told = {}, [], [], []
    now, stored = clock.monotonic(), False
    try:
        for run in runs:
            context, capture = run.context, run.capture
            if (new := context._new_progress()) is not None:
                tasks[run.task.id] = run.task
                told.append(run)
                if hooks.progressed:  # they see the checkpoints that it has stored, too
                    tasks[run.task.id] = changed_task(run.task, context._shown({}))
                writes.append(lifecycle.progress(run.task.id, run.task.starts, *new))
            if (
                capture is not None
                and context._may_write()
                and (lines := capture.new(now)) is not None
            ):
                logs.append(capture)
                writes.append(lifecycle.log_so_far(run.task, lines))
        if writes:
            moves.commit(writes, tasks)
            stored = True
    finally:
        for run in runs:
            run.context._progress_written(stored=stored or run not in told)
        for capture in () if stored else logs:
            capture.not_stored()


def store_emitted(runs: Sequence[Run], repository: Repository) -> None:
    """Store what runs have emitted since the last time, all of it at once.

    Raises:
        RepositoryError: it could not be stored; the next call tries again.
    """
    saved, changes = [], []
    for run in runs:
        if (emitted := run.context._emitted) is not None:
            with suppress(PayloadError):  # of the codec: the end of the run tells it
                texts, notes = run.context._shared.keeper.notes_of(run.task, emitted)
                saved.append((emitted, texts))
                changes += notes
    if changes:
        repository.put_notes(changes)
        for emitted, texts in saved:
            emitted.saved(texts)
