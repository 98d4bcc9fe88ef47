"""The state of a queue: started or not, stopped or not."""

from __future__ import annotations

from taskx.running.pool import WorkerPool


class State:
    """What a queue's parts must know of how far it is. The queue changes it, and nobody else."""

    def __init__(self) -> None:
        #: What runs tasks; None as long as the queue has not been started.
        self.engine: WorkerPool | None = None
        self.stopped = False
