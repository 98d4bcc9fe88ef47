"""The tasks that a node has in flight, each with how far it is."""

from __future__ import annotations

from taskx.executing.runner import Run


class Runs(dict[str, Run]):
    """Every run, by the id of its task, from before its start until its outcome is committed.

    How far it is, is the ``state`` of the run; the audit goes by that. In structures of their own are the
    pending tasks before (the buffer: a heap, and slots, which are known by name so that their number is
    right wherever a submit is cut short), the order of those that were started ahead, and, after their
    outcome, attempts that were given up (their task may be in flight again, elsewhere).
    """

    @property
    def executing(self) -> list[Run]:
        """Those whose executors are being called."""
        return [run for run in list(self.values()) if run.state == "executing"]

    def forget(self, run: Run) -> bool:
        """Forget a run; False if it was forgotten before."""
        return self.get(run.task.id) is run and self.pop(run.task.id, None) is not None

    def claim(self, run: Run) -> bool:
        """Forget a run that no thread is at; False if one has just begun to execute it.

        A thread that begins says so first, and then looks whether it was forgotten.
        """
        if not self.forget(run):
            return False
        if run.state == "executing":
            self[run.task.id] = run
            return False
        return True
