"""The proof of a soak: it follows the side log while the soak runs, and keeps only what is unfinished."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .sidelog import Event

#: Ended tasks that are remembered, to notice one that runs again.
_REMEMBERED = 100_000
#: The outcomes of a run after which its task has ended. After the others it runs again.
_FINAL = ("returned", "cancel")
#: The most tasks of the type "limited" that may run at once.
LIMIT = 2


class Run(NamedTuple):
    """A run of a task that has begun and not ended."""

    who: str
    kind: str
    key: str


class Audit:
    """Follows the events of a side log, and collects broken promises.

    Attributes:
        violations: the broken promises, as sentences.
        unfinished: the tasks that were accepted, or have begun, and have not ended yet.
        counts: how many events of each kind there were.
        at_work: the processes that have begun a task.
        waits: the nanoseconds from the submit to the start of the tasks since :meth:`take_waits`.
    """

    def __init__(self, log: Path) -> None:
        self._log, self._read = log, 0
        self.violations: list[str] = []
        self.unfinished: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.at_work: set[str] = set()
        self.waits: list[int] = []
        self._submitted: dict[str, int] = {}
        self._running: dict[str, Run] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._steps: dict[tuple[str, str], str] = {}
        self._ticks: dict[str, str] = {}
        self._dead: set[str] = set()
        self._settled: set[str] = set()

    def follow(self) -> None:
        """Read what was written since the last call."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            for line in log:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                self.hear(Event(*json.loads(line)))

    def settle(self, task_ids: Iterable[str]) -> None:
        """Note that these tasks have ended: the database says so. Their processes may not have told it.

        A task that ends in a transaction of its own does so before it can tell.
        """
        for task_id in task_ids:
            self._settled.add(task_id)
            self.unfinished.pop(task_id, None)

    def take_waits(self) -> list[int]:
        """Return the waits since the last call."""
        taken, self.waits = self.waits, []
        return taken

    def hear(self, event: Event) -> None:
        """Take account of an event."""
        self.counts[event.what] += 1
        handler = getattr(self, f"_{event.what}", None)
        if handler is not None:
            handler(event)

    def _killing(self, event: Event) -> None:
        """Its process is about to be killed: what it has begun will not end."""
        self._dead.add(event.note)
        for task_id in [id for id, run in self._running.items() if run.who == event.note]:
            del self._running[task_id]

    def _expect(self, event: Event) -> None:
        if event.id not in self._settled:
            self.unfinished.setdefault(event.id, event.kind)

    def _accepted(self, event: Event) -> None:
        if event.id not in self._ended:
            self._expect(event)
            if event.id not in self._running and event.note == "now":
                self._submitted[event.id] = event.ns

    def _begin(self, event: Event) -> None:
        self.at_work.add(event.who)
        other = self._running.get(event.id)
        if other is not None:
            self._broken(event, f"began while {other.who} was running it")
        ended_by = self._ended.pop(event.id, None)
        if ended_by is not None and ended_by not in self._dead:
            self._broken(event, f"ran again, although {ended_by} had ended it")
        self._expect(event)
        self._running[event.id] = Run(event.who, event.kind, event.note)
        self._check_limits(event)
        submitted = self._submitted.pop(event.id, None)
        if submitted is not None:
            self.waits.append(event.ns - submitted)

    def _check_limits(self, event: Event) -> None:
        alike = [run for run in self._running.values() if run.kind == event.kind]
        if event.kind == "limited" and len(alike) > LIMIT:
            self._broken(event, f"is one of {len(alike)} at once; the limit is {LIMIT}")
        if event.kind == "keyed" and sum(run.key == event.note for run in alike) > 1:
            self._broken(event, f"runs beside another one of the key {event.note}")

    def _end(self, event: Event) -> None:
        self._running.pop(event.id, None)
        if event.outcome in _FINAL:
            self._close(event)

    def _cancelled(self, event: Event) -> None:
        """A cancel was answered. A task that is just being started may still begin, and then ends."""
        if event.id not in self._running:
            self.unfinished.pop(event.id, None)
            self._submitted.pop(event.id, None)

    def _close(self, event: Event) -> None:
        self.unfinished.pop(event.id, None)
        self._submitted.pop(event.id, None)
        self._ended[event.id] = event.who
        for key in [key for key in self._steps if key[0] == event.id]:
            del self._steps[key]
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def _step(self, event: Event) -> None:
        done_by = self._steps.get((event.id, event.note))
        if done_by is not None and done_by not in self._dead:
            self._broken(event, f"ran step {event.note} again, which {done_by} had done")
        self._steps[event.id, event.note] = event.who

    def _tick(self, event: Event) -> None:
        task_id = self._ticks.setdefault(event.note, event.id)
        if task_id != event.id:
            self._broken(event, f"was made for the tick {event.note}, as {task_id} was")

    def _streamed(self, event: Event) -> None:
        """A stream was read to its end. The note has the chunks if they are not all, each once."""
        if event.note:
            self._broken(event, f"has emitted {event.note}")

    def _broken(self, event: Event, what: str) -> None:
        self.violations.append(f"{event.kind or 'task'} {event.id} {what} (in {event.who})")
