"""The conductor: starts processes on one store, kills them, drains the rest and checks the outcome.

    python -m tests.campaign.campaign --kills 1000 [--mongo | --postgres]

It prints its seed. ``--seed`` repeats the plan of a campaign; the timing of the machine differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from taskx import SQLiteRepository, Task, TaskFilter, TaskStatus
from taskx.stores.base import Repository

from . import hooks
from .sidelog import Event, SideLog, read
from .verify import NEVER, History, verify
from .worker import HANGS, MANY, Options

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parent.parent
# The package is tests.campaign or campaign; a child must import it under the same name.
_BASE = _FOLDER.parents[__package__.count(".")]

#: Lines that a worker logs only if something is wrong, or if the campaign raised an error on purpose.
_ALARMING = re.compile(
    r"^(ERROR|CRITICAL) (?!\S+ task \S+ (\(\w+\) failed|was running on \S+, which died): )"
    r"|^Exception in thread|^Fatal Python error",
    re.MULTILINE,
)
#: Seconds after which a wait gives up: longer than anything takes on a loaded machine.
LONGEST = 240.0
_never = threading.Event()


def until(condition: Callable[[], Any], what: str, seconds: float = LONGEST) -> Any:
    """Call ``condition`` until it returns something true, and return that.

    Raises:
        TimeoutError: it did not become true within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        _never.wait(0.002)
    return answer


class Child:
    """A worker process; this object writes its death to the side log, in its name.

    Args:
        folder: the folder for its output.
        options: its options.
        command: the beginning of its command line, such as that of a host.
    """

    def __init__(self, folder: Path, options: Options, command: Sequence[str] = ()) -> None:
        self.options = options
        self.who = options.who
        self._log = SideLog(options.side_log, options.who)
        self._output = folder / f"{options.who}.log"
        given = json.dumps(attrs.asdict(options))
        self._log.tell("spawned", note=given)
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, sys.executable, "-m", f"{__package__}.worker", given],
                env={**os.environ, "PYTHONPATH": os.pathsep.join((str(_BASE), str(_ROOT)))},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
        self._told = False

    def kill(self) -> None:
        """Kill the process; the moment just before is the last one at which it certainly lived."""
        self._log.tell("killed")
        self.process.send_signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def tell(self) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def finish(self, seconds: float = LONGEST) -> int:
        """Close its standard input and wait for its end; return its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.wait(seconds)

    def ended(self) -> bool:
        """Return True if it has ended."""
        if self.process.poll() is None:
            return False
        if not self._told:
            self._told = True
            self._tell_death(self.process.returncode)
            self._log.close()
            assert self.process.stdin is not None
            self.process.stdin.close()
        return True

    def wait(self, seconds: float = LONGEST) -> int:
        """Wait for its end; return its exit code."""
        self.process.wait(seconds)
        self.ended()
        return self.process.returncode

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def _tell_death(self, code: int) -> None:
        killed = code == -signal.SIGKILL
        output = self.output
        trouble = ""
        if code != 0 and not killed:
            trouble = f"it ended with {code}: {output[-2000:]}"
        elif (found := _ALARMING.search(output)) and not self.options.interrupt:
            trouble = f"its log says: {output[found.start() :][:2000]}"
        self._log.tell("dead", outcome="killed" if killed else "ended", note=trouble)


@attrs.define
class Outcome:
    """The result of a campaign."""

    violations: list[str]
    records: dict[str, Task]
    events: list[Event]

    def record(self, task_id: str) -> Task:
        return self.records[task_id]


class Campaign:
    """Processes that share one file in ``folder``."""

    points = hooks.KILL_POINTS
    pause = 0.25  # the longest pause between two strikes, in seconds

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.database = str(folder / "tasks.db")
        self.side_log = str(folder / "side.log")
        self.children: list[Child] = []
        self.log = SideLog(self.side_log, "conductor")
        self._number = 0

    def spawn(self, command: Sequence[str] = (), **options: Any) -> Child:
        self._number += 1
        given = {"database": self.database, "side_log": self.side_log, **options}
        child = Child(self.folder, Options(who=f"p{self._number}", **given), command)
        self.children.append(child)
        return child

    def open(self) -> Repository:
        """Open the store that the processes share."""
        return SQLiteRepository(self.database)

    def events(self) -> list[Event]:
        return read(self.side_log)

    def hold(self) -> dict[str, Any]:
        """Return params for ``held`` tasks, which run until :meth:`let_go`."""
        return {"until": str(self.folder / "let go")}

    def let_go(self) -> None:
        """End the ``held`` tasks."""
        Path(self.hold()["until"]).touch()

    def wait_for(self, what: str, seconds: float = LONGEST, **like: Any) -> Event:
        """Wait for an event and return the first one with these values."""

        def find() -> Event | None:
            for event in self.events():
                if event.what == what and all(getattr(event, k) == v for k, v in like.items()):
                    return event
            return None

        found: Event = until(find, f"{what} {like}", seconds)
        return found

    # --- the random part

    def storm(
        self, kills: int, processes: int = 3, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Start random processes and kill them at random, until ``kills`` of them were killed."""
        killed, alive = 0, []
        while killed < kills:
            for child in [child for child in alive if child.ended()]:
                alive.remove(child)
                killed += child.process.returncode == -signal.SIGKILL
                if killed % 50 == 0 and child.process.returncode:
                    say(f"{killed} kills, {self._number} processes")
            while len(alive) < processes:
                alive.append(self.spawn(**self._random_options()))
            _never.wait(self.rng.uniform(0.0, self.pause))
            self._strike(self.rng.choice(alive))
        until(lambda: all(child.ended() for child in alive if child.options.interrupts), "end")
        for child in alive:
            if not child.ended():
                child.kill()

    def mix_until(self, condition: Callable[[], Any], what: str, **options: Any) -> Child:
        """Let a process take random steps until ``condition`` holds; return the process.

        It is replaced when it ends: one of its tasks may kill it.
        """
        wanted = {"role": "mix", "seconds": HANGS / 4, "workers": 4, **options}
        child = self.spawn(**wanted)

        def holds() -> bool:
            nonlocal child
            if child.ended():
                child = self.spawn(**wanted)
            return bool(condition())

        until(holds, what)
        return child

    def _strike(self, child: Child) -> None:
        chance = self.rng.random()
        if child.options.interrupts:
            return  # it must end by itself
        if chance < 0.6 and not child.ended():
            child.kill()
        elif chance < 0.68 and not child.ended():  # a stopped process is not dead
            child.signal(signal.SIGSTOP)
            _never.wait(self.rng.uniform(0.1, 0.9))
            child.signal(signal.SIGCONT)

    def _random_options(self) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {
            "seed": rng.randrange(1 << 30),
            "seconds": rng.uniform(0.1, 1.5),
            "workers": rng.randint(1, 4),
            "buffer": rng.choice((3, 10, 50)),
            "overflow": rng.choice(("reject", "block", "spill", "caller_runs")),
            "durability": rng.choice(("accepted", "process")),
            "dawdle": rng.choice((0.0, 0.0, 0.003, 0.02)),
            "alone": rng.random() < 0.2,
            "burst": rng.random() < 0.15,
        }
        chance = rng.random()
        if chance < 0.45:
            options["point"] = rng.choice(sorted(self.points))
            once = options["point"] in ("while stopping", "before leaving")
            options["passings"] = 1 if once else rng.randint(1, 60)
            if options["point"] == "started ahead":
                options.update(burst=True, passings=rng.randint(1, 10))
        elif chance < 0.5:
            options["interrupts"] = rng.choice((0.01, 0.1))
            options["overflow"] = rng.choice(("reject", "spill"))
        elif chance < 0.65:
            options["interrupt"] = rng.choice(hooks.INTERRUPTS)
            options["error"] = rng.choice(("KeyboardInterrupt", "MemoryError"))
            options["passings"] = rng.randint(1, 60)
        return options

    # --- the end

    def drain(self, seconds: float = LONGEST, processes: int = 2, **options: Any) -> None:
        """Run the remaining tasks in new processes; replace those that a task kills.

        The proof finds tasks that are not finished in time, and processes that do not end.
        """
        deadline = time.monotonic() + seconds
        wanted = {"role": "drain", "workers": 4, **options}
        alive = [self.spawn(**wanted) for _ in range(processes)]
        while alive and time.monotonic() < deadline:
            for child in [child for child in alive if child.ended()]:
                alive.remove(child)
                if child.process.returncode == -signal.SIGKILL:
                    alive.append(self.spawn(**wanted))
            _never.wait(0.01)
        for child in alive:
            child.kill()

    def verdict(self) -> Outcome:
        """End all processes, and return the broken promises."""
        self.end()
        with self.open() as repository:
            found = repository.list(TaskFilter(limit=MANY))
            nodes = [node.name for node in repository.liveness.nodes()]
        records = {task.id: task for task in found}
        events = self.events()
        violations = verify(records, events)
        violations += [f"node {name} was left behind" for name in nodes]
        return Outcome(violations, records, events)

    def end(self) -> None:
        """End the processes that still run."""
        for child in self.children:
            if not child.ended():
                child.kill()

    def close(self) -> None:
        """End the processes that still run, and what they run on."""
        self.end()


# The soak


def soak(campaign: Campaign, kills: int, processes: int) -> Outcome:
    """Run a large campaign and print its progress."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    try:
        campaign.storm(kills, processes, say)
        say("draining")
        campaign.drain()
        outcome = campaign.verdict()
    finally:
        campaign.close()
    for line in summary(outcome):
        say(line)
    return outcome


def summary(outcome: Outcome) -> list[str]:
    """Return a summary of the campaign in a few lines."""
    history = History(outcome.events)
    runs = [run for story in history.stories.values() for run in story.runs]
    told = Counter(event.what for event in outcome.events)
    points = Counter(event.note for event in outcome.events if event.what == "dying")
    statuses = Counter(str(task.status) for task in outcome.records.values())
    killed = sum(process.killed for process in history.processes.values())
    by_themselves = ", ".join(f"{count} {point}" for point, count in sorted(points.items()))
    cut_short = sum(run.ended == NEVER for run in runs)
    submitted = f"{told['accepted']} tasks accepted, {told['rejected']} rejected"
    return [
        f"{killed} of {len(history.processes)} processes killed, {told['interrupt']} interrupted",
        f"killed themselves: {by_themselves}",
        f"{submitted}, {len(runs)} runs began, {cut_short} were cut short",
        ", ".join(f"{statuses[status]} {status}" for status in TaskStatus),
        f"{told['cancel told']} cancels answered, {told['closed']} tasks closed by hand",
        f"{len(outcome.violations)} violations",
    ]


@contextmanager
def _campaign(args: argparse.Namespace, folder: Path, seed: int) -> Iterator[Campaign]:
    sys.path.insert(0, str(_FOLDER.parent))  # the modules that start the tests' servers are there
    if args.mongo:
        from .mongo_campaign import on_own_server

        yield on_own_server(folder, seed)
    elif args.postgres:
        from .postgres_campaign import on_own_server as on_own_postgres

        with on_own_postgres(folder, seed) as made:
            yield made
    else:
        yield Campaign(folder, seed)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="campaign", description="Kill processes at random and check that no promise is broken."
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="keep all files in this folder")
    parser.add_argument("--mongo", action="store_true", help="run on a new MongoDB server")
    parser.add_argument("--postgres", action="store_true", help="run on a new PostgreSQL server")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if args.seed is None else args.seed
    print(f"{args.kills} kills, {args.processes} processes at a time, --seed {seed}", flush=True)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="taskx-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    with _campaign(args, folder, seed) as campaign:
        outcome = soak(campaign, args.kills, args.processes)
    for violation in outcome.violations[:50]:
        print(f"VIOLATION {violation}")
    if outcome.violations:
        print(f"the database, the side log and the logs of the processes are in {folder}")
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
