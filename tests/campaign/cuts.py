"""Power cuts: what SQLite writes and syncs is recorded, and everything is tried that a cut may leave of it.

    python -m tests.campaign.cuts --mixtures 1000

Each recorded program makes calls of all kinds, with each ``durability``: in a file of its own, in that of
an application, and in Django's database. It is cut

- just before each sync takes effect: with all lost that is not synced, with all kept, and with each single
  piece of it lost, torn, or alone kept;
- after each thing that a caller was told, with all lost;
- at any of these moments, with random mixtures.

What is left must be whole, and have what was promised (:class:`Promised`). Then a queue is started on it,
as after the boot: all its tasks must end, and what must not be done twice is not (:func:`recover`).

With ``--planted``, TaskX is broken in one way at a time, such as that one kind of write is not synced. The
proof must find each of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import attrs

from taskx.tasks.codec import Codecs
from taskx.tasks.streams import STREAM, Piece, content_of, last_in

from . import cuts_worker, disk
from .cuts_worker import PREFIX, SPOKEN, in_application, in_django
from .disk import Disk, Event, Fate

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parent.parent
# The package is tests.campaign or campaign; a child must import it under the same name.
_BASE = _FOLDER.parents[__package__.count(".")]
#: The files, and the values of ``durability`` that each can have.
FILES = {
    "tasks.db": ("accepted", "full", "process"),
    "app.db": ("accepted", "full", "process"),
    "django.db": ("accepted", "full"),
}
_PATIENCE = 300.0
_FEW = 20
#: The types whose tasks nobody runs.
_NEVER = ("later",)


class Recording(NamedTuple):
    """What a program has written, synced and told.

    Attributes:
        file: the name of its database.
        durability: the setting of its repository.
        root: the folder in which it ran.
        events: what happened there.
    """

    file: str
    durability: str
    root: str
    events: Sequence[Event]


def record(file: str, durability: str, folder: Path, planted: str = "") -> Recording:
    """Run the program in a folder and record it. ``planted`` is the move that it does not sync."""
    root, told, trace = folder / "root", folder / "told", folder / "trace"
    root.mkdir()
    program = (sys.executable, "-m", f"{__package__}.cuts_worker")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(_BASE), str(_ROOT), str(_ROOT / "tests"))),
    }
    env["TASKX_PLANTED"] = planted
    disk.record([*program, root / file, told, durability], trace, env)
    return Recording(file, durability, str(root), disk.read(trace, root, told))


# --- what was promised


@attrs.define
class Promised:
    """What a power cut must not undo, by what was told before it, and what it may undo.

    Attributes:
        durability: the setting that makes the promises.
        told: for each thing that can be told the ids of the tasks, or other names.
    """

    durability: str
    told: defaultdict[str, set[Any]] = attrs.field(factory=lambda: defaultdict(set))

    def hear(self, data: bytes) -> None:
        """Take account of what was told."""
        what, *words = json.loads(data)
        if what == "accepted":
            self.told[what].update(words)
        else:
            self.told[what].add(words[0] if len(words) == 1 else tuple(words))

    def broken(self, left: Left) -> Iterator[str]:
        """Yield what is broken in what a cut has left."""
        yield from self._torn(left)
        tasks, told = left.tasks, self.told
        deleting, deleted = told["deleting"], told["deleted"]
        # What an application commits over its own connection has that connection's setting.
        accepted = told["ordered"] | (told["accepted"] if self.durability != "process" else set())
        yield from (f"{id} was accepted, and is gone" for id in accepted - deleting - tasks.keys())
        yield from (f"{id} was ordered, and is not" for id in told["ordered"] - left.orders)
        if self.durability == "process":
            return
        yield from (f"{id} was deleted, and is back" for id in deleted & tasks.keys())
        yield from (f"{name} was told, and is gone" for name in told["noted"] - left.notes.keys())
        yield from (f"{id} was paid, and is not" for id in told["paid"] - left.payments)
        there = {id: row for id, row in tasks.items() if id not in deleting}
        for what, holds in _HOLDS.items():
            for words in told[what]:
                id = words if isinstance(words, str) else words[0]
                if id in there and not holds(there[id], words):
                    yield f"{id} was {what}, and is {there[id]}"
        if self.durability == "full":
            yield from self._undone(there)

    def _torn(self, left: Left) -> Iterator[str]:
        """Yield what is stored in part, with any setting."""
        ordered = {id for id, row in left.tasks.items() if row["created_by"] == "order"}
        yield from (f"{id} has no order, or only that" for id in ordered ^ left.orders)
        paid = {
            id
            for id, row in left.tasks.items()
            if row["type"] == "payer" and row["status"] == "completed"
        }
        yield from (f"{id} is paid and not completed, or so" for id in paid ^ left.payments)
        for id, row in left.tasks.items():
            spoken = row["type"] == "speaker" and row["status"] == "completed"
            if spoken and (chunks := _emitted(id, left.notes)) != SPOKEN:
                yield f"{id} is completed, and has emitted {chunks}"

    def _undone(self, tasks: dict[str, dict[str, Any]]) -> Iterator[str]:
        for id, starts in self.told["began"]:
            if id in tasks and tasks[id]["starts"] < starts:
                yield f"{id} had begun {starts} times, and is {tasks[id]}"
        for what in ("completed", "failed"):
            gone_on = self.told["requeueing"] if what == "failed" else set()
            for id in (self.told[what] - gone_on) & tasks.keys():
                if tasks[id]["status"] != what:
                    yield f"{id} had {what}, and is {tasks[id]}"


def _steps(row: dict[str, Any]) -> dict[str, Any]:
    steps: dict[str, Any] = json.loads(row["checkpoints"] or "{}").get("steps", {})
    return steps


def _emitted(id: str, notes: dict[str, str]) -> list[Any]:
    """Return what the last call of a task's executor has emitted, with what it took over."""
    chunks: defaultdict[int, dict[int, Any]] = defaultdict(dict)  # by start, and number
    newest = 0
    for name in sorted(name for name in notes if name.startswith(f"{STREAM}{id}/")):
        (newest, last), content = last_in(name), content_of(name, notes[name], Codecs())
        if isinstance(content, Piece):
            earlier, first = chunks[content.start], content.first
            content = [earlier.get(number) for number in range(first, first + content.length)]
        chunks[newest].update(enumerate(content, last - len(content) + 1))
    return [chunk for _, chunk in sorted(chunks[newest].items())]


#: What must be true of the record of a task after something was told of it.
_HOLDS: dict[str, Callable[[dict[str, Any], Any], bool]] = {
    "cancelled": lambda row, _: row["status"] == "cancelled",
    "woken": lambda row, _: row["held"] == 0,
    "requeued": lambda row, _: row["status"] != "failed",
    "answered": lambda row, told: row["result"] == json.dumps(told[1]),
    "step": lambda row, told: told[1] in _steps(row),
    "charged": lambda row, _: "charge" in _steps(row),
    "bought": lambda row, _: _steps(row).get("charge") == "receipt",
    # It fails at its first crash, so it must not be started again.
    "single": lambda row, _: row["status"] != "pending",
}


# --- what a cut has left


class Left(NamedTuple):
    """The content of a database after a cut.

    Attributes:
        tasks: the records, by id.
        notes: the texts of the notes, by name.
        orders: the ids of the tasks that belong to rows of the application.
        payments: those whose executors have stored a row.
        digest: differs if something else is left.
    """

    tasks: dict[str, dict[str, Any]]
    notes: dict[str, str]
    orders: set[str]
    payments: set[str]
    digest: str


class _Tables(NamedTuple):
    tasks: str
    notes: str


def _tables(file: str) -> _Tables:
    if in_django(file):
        return _Tables("taskx_task", "taskx_note")
    prefix = PREFIX if in_application(file) else ""
    return _Tables(f"{prefix}tasks", f"{prefix}notes")


def look(folder: Path, file: str) -> Left:
    """Return what is left in a folder. Raise an error of SQLite if the database is damaged."""
    path = folder / file
    tables = _tables(file)
    tasks: list[dict[str, Any]] = []
    found: list[list[Any]] = [[], [], []]  # notes, orders, payments
    if path.exists():
        with closing(sqlite3.connect(path)) as connection:
            connection.row_factory = sqlite3.Row
            ((said,),) = connection.execute("PRAGMA integrity_check").fetchall()
            if said != "ok":
                raise sqlite3.DatabaseError(said)
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            if tables.tasks in names:
                tasks = [dict(row) for row in connection.execute(f"SELECT * FROM {tables.tasks}")]
            others = ((tables.notes, "name, text"), ("orders", "task"), ("payments", "task"))
            for rows, (table, columns) in zip(found, others, strict=True):
                if table in names:
                    rows += map(tuple, connection.execute(f"SELECT {columns} FROM {table}"))
    files = sorted(map(str, folder.rglob("*.lock")))
    whole = repr((tasks, found, [name.removeprefix(str(folder)) for name in files]))
    return Left(
        {task["id"]: task for task in tasks},
        dict(found[0]),
        {task for (task,) in found[1]},
        {task for (task,) in found[2]},
        hashlib.sha256(whole.encode()).hexdigest(),
    )


def recover(folder: Path, promised: Promised, file: str) -> list[str]:
    """Run all tasks that a cut has left, as after the boot. Return what is broken then."""
    before = look(folder, file)
    if in_application(file):
        cuts_worker.make_application(str(folder / file))
    _boot(folder, file)
    done: defaultdict[str, Counter[Any]] = defaultdict(Counter)

    def tell(what: str, *words: Any) -> None:
        done[what][words if len(words) > 1 else words[0]] += 1

    queue = cuts_worker.queue_on(str(folder / file), promised.durability, tell)
    query = (
        f"SELECT id, type, run_at, status FROM {_tables(file).tasks} "
        "WHERE status IN ('pending', 'running') AND type NOT IN ('later', 'children')"
    )
    ends = time.monotonic() + _PATIENCE
    with queue, closing(sqlite3.connect(folder / file)) as reader:
        while (unfinished := reader.execute(query).fetchall()) and time.monotonic() < ends:
            for id, kind, run_at, status in unfinished:
                if kind == "answer":
                    queue.finish(id, "yes" if id.endswith("approval") else "receipt")
                elif run_at is not None and status == "pending":
                    queue.wake(id)
            time.sleep(0.005)  # blocks on purpose: it polls
    queue.close()
    broken = [f"{id} ({kind}) is {status} for ever" for id, kind, _, status in unfinished]
    return [*broken, *_done_wrong(before, look(folder, file), promised, done)]


def _boot(folder: Path, file: str) -> None:
    """Make the nodes those of an earlier boot. The files have other inodes than the recorded ones."""
    path, notes = folder / file, _tables(file).notes
    if not path.exists():
        return
    locks = folder / f"{file}-{PREFIX if in_application(file) else ''}nodes"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if (notes,) not in connection.execute("SELECT name FROM sqlite_master").fetchall():
            return
        nodes = f"SELECT name FROM {notes} WHERE name LIKE 'node/%'"
        for (name,) in connection.execute(nodes).fetchall():
            lock = locks / f"{name.removeprefix('node/')}.lock"
            connection.execute(
                f"UPDATE {notes} SET text = json_replace(text, '$.file', ?, '$.lock', ?, '$.boot', 1) "
                "WHERE name = ?",
                (path.stat().st_ino, lock.stat().st_ino if lock.exists() else 0, name),
            )


def _done_wrong(
    before: Left, after: Left, promised: Promised, done: dict[str, Counter[Any]]
) -> Iterator[str]:
    yield from (f"{id} is gone" for id in before.tasks.keys() - after.tasks.keys())
    yield from Promised("process", promised.told).broken(after)
    told = promised.told
    for id, row in after.tasks.items():
        kind, status = row["type"], row["status"]
        fails = {"single": row["crashes"] > 0, "failing": row["starts"] < 2}.get(kind, False)
        if kind not in (*_NEVER, "children") and status != "completed" and not fails:
            yield f"{id} ({kind}) is {status}: {row['error']}"
    if promised.durability == "process":
        return
    for what in ("single", "charged"):
        yield from (f"{id} was {what} again" for id in done[what].keys() & told[what])
        yield from (f"{id} was {what} twice" for id, n in done[what].items() if n > 1)
    for call in done["call"].keys() & told["step"]:
        yield f"{call[0]} did step {call[1]} again"


# --- the cuts


class Cut(NamedTuple):
    """A cut: the files that it leaves, and what was promised before."""

    where: str
    left: dict[str, bytes | None]
    promised: Promised


def cuts(
    recording: Recording,
    mixtures: int,
    rng: random.Random,
    *,
    every: int = 1,
    each: bool = True,
) -> Iterator[Cut]:
    """Yield what each cut may leave.

    One of ``every`` so many moments is tried, and all those in which the file is made. Without ``each``,
    everything is lost that is not synced.
    """
    kinds = [event.what for event in recording.events]
    moments = [n for n, kind in enumerate(kinds) if kind in ("sync", "told")]
    making = moments[: moments.index(kinds.index("told"))]
    chosen = {*making, *moments[rng.randrange(every) :: every], moments[-1]}
    mixed = Counter(rng.choices(sorted(chosen), k=mixtures))
    now, promised = Disk(recording.root), Promised(recording.durability)
    for number, event in enumerate(recording.events):
        if event.what == "told":
            promised.hear(event.data)
        else:
            now.hear(event)
        if number in chosen:
            for how, fates in _fates(
                now.units(), each and event.what == "sync", mixed[number], rng
            ):
                where = f"{recording.durability} {recording.file} at event {number}, {how}"
                yield Cut(where, now.leave(fates, rng), promised)


def _fates(
    units: Sequence[bool], each: bool, mixtures: int, rng: random.Random
) -> Iterator[tuple[str, list[Fate]]]:
    """Yield what may become of what is not synced: ``units`` tells of each thing if it can be torn.

    With ``each``, all is kept except for each single one, too, and all is lost except for it.
    """
    lost: list[Fate] = ["lost"] * len(units)
    kept: list[Fate] = ["kept"] * len(units)
    yield "all lost", lost
    if each:
        yield "all kept", kept
    for n, torn in enumerate(units if each else ()):
        yield f"{n} lost", [*kept[:n], "lost", *kept[n + 1 :]]
        if len(units) > 1:
            yield f"{n} kept", [*lost[:n], "kept", *lost[n + 1 :]]
        if torn:
            yield f"{n} torn", [*kept[:n], "torn", *kept[n + 1 :]]
    for number in range(mixtures):
        chance = rng.choice((0.1, 0.5, 0.9))
        fates: list[Fate] = [
            "kept" if rng.random() < chance else rng.choice(("lost", "torn")) for _ in units
        ]
        yield f"mixture {number}", fates


@attrs.define
class Found:
    """What was found.

    Attributes:
        tried: how many states were looked at.
        different: how many contents they had.
        recovered: how many of these a queue was started on.
        broken: what was broken, as sentences.
    """

    tried: int = 0
    different: int = 0
    recovered: int = 0
    broken: list[str] = attrs.field(factory=list)


def judge(
    all_cuts: Iterable[Cut], file: str, folder: Path, recoveries: int | None, rng: random.Random
) -> Found:
    """Look at what each cut leaves, and start a queue on so many of the different ones; None: on all."""
    found, kept = Found(), list[tuple[Path, Promised, str]]()
    seen: set[str] = set()
    known: dict[int, Left] = {}  # what the last files had
    for cut in all_cuts:
        found.tried += 1
        place = folder / f"state{found.tried}"
        files = hash(tuple(sorted(cut.left.items())))
        if (left := known.get(files)) is None:
            place.mkdir()
            disk.write(cut.left, place)
            if len(known) > _FEW:
                known.clear()
            try:
                left = known[files] = look(place, file)
            except sqlite3.Error as error:
                found.broken.append(f"{cut.where}: damaged: {error}")
                continue
        found.broken += [f"{cut.where}: {what}" for what in cut.promised.broken(left)]
        if left.digest in seen:
            shutil.rmtree(place, ignore_errors=True)
            continue
        seen.add(left.digest)
        told = defaultdict(set, {what: {*ids} for what, ids in cut.promised.told.items()})
        state = place, Promised(cut.promised.durability, told), cut.where
        # Of all that come, each is kept with the same chance.
        if recoveries is None or len(kept) < recoveries:
            kept.append(state)
        elif (n := rng.randrange(len(seen))) < recoveries:
            kept[n], state = state, kept[n]
            shutil.rmtree(state[0])
        else:
            shutil.rmtree(place)
    found.different, found.recovered = len(seen), len(kept)

    def run(state: tuple[Path, Promised, str]) -> list[str]:
        place, promised, where = state
        broken = [f"{where}, after the boot: {what}" for what in recover(place, promised, file)]
        if not broken:
            shutil.rmtree(place)
        return broken

    with ThreadPoolExecutor(8) as threads:
        for broken in threads.map(run, kept):
            found.broken += broken
    return found


#: What is broken, with a file and a ``durability`` with which that shows: moves of which a caller is told,
#: and that are not synced; and chunks that are stored after the end of their task.
PLANTED = {
    "create": ("tasks.db", "accepted"),
    "cancel,request cancel": ("tasks.db", "accepted"),
    "delete": ("tasks.db", "accepted"),
    "requeue": ("tasks.db", "accepted"),
    "finish": ("tasks.db", "accepted"),
    "wake": ("tasks.db", "accepted"),
    "start": ("tasks.db", "accepted"),  # of a task that fails at its first crash
    "checkpoint": ("tasks.db", "accepted"),
    "complete": ("app.db", "accepted"),  # in a transaction of an executor
    "notes": ("tasks.db", "accepted"),
    "chunks": ("tasks.db", "full"),
    "all": ("tasks.db", "accepted"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Cut the power at each write, and prove the promises."
    )
    parser.add_argument("--mixtures", type=int, default=1000, help="in all")
    parser.add_argument("--recoveries", type=int, default=None, help="for each program; else all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--planted", action="store_true", help="find the planted faults")
    parser.add_argument("--file", choices=FILES, help="only with this file")
    parser.add_argument("--every", type=int, default=1, help="try one of so many moments")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    print(f"seed {given.seed}")
    wrong = 0
    if given.planted:
        parts = [(*where, move) for move, where in PLANTED.items()]
    else:
        parts = [(file, durability, "") for file, each in FILES.items() for durability in each]
    if given.file:
        parts = [part for part in parts if part[0] == given.file]
    for file, durability, planted in parts:
        with tempfile.TemporaryDirectory(prefix="taskx-cuts-") as name:
            folder = Path(name)
            recording = record(file, durability, folder, planted)
            kinds = Counter(event.what for event in recording.events)
            # In Django's database, nodes of an earlier boot are dead after half a minute: too slow.
            recoveries = 0 if planted or in_django(file) else given.recoveries
            mixtures = 0 if planted else given.mixtures // len(parts)
            tried = cuts(recording, mixtures, rng, every=given.every, each=not planted)
            found = judge(tried, file, folder, recoveries, rng)
        print(
            f"{planted or file} {durability}: {kinds['write']} writes, {kinds['sync']} syncs, "
            f"{kinds['told']} told; {found.tried} states, {found.different} different, "
            f"{found.recovered} recovered, {len(found.broken)} broken",
            flush=True,
        )
        for sentence in found.broken[: 1 if planted else 10]:
            print(f"  BROKEN {sentence:.300}", flush=True)
        wrong += bool(found.broken) is not bool(planted)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
