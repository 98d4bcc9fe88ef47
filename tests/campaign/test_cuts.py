"""A power cut breaks no promise. The model of a disk loses what is not synced, and the proof finds that."""

from __future__ import annotations

import random
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from storage.kept import kept

from . import disk
from .cuts import Recording, cuts, judge, record
from .disk import Disk, Event

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to see syncs")

ROOT = "/r"
ADD = Event("add", ROOT, "f")
FILE = f"{ROOT}/f"


def written(text: bytes, offset: int = 0) -> Event:
    return Event("write", FILE, data=text, offset=offset)


def synced(path: str, number: int = 1) -> list[Event]:
    return [Event("sync", path, number=number), Event("synced", path, number=number)]


def left(events: list[Event], *, lost: bool = True) -> dict[str, bytes | None]:
    """Return what is left if everything is lost that may be lost, or if nothing is."""
    now = Disk(ROOT)
    for event in events:
        now.hear(event)
    fate: disk.Fate = "lost" if lost else "kept"
    return now.leave([fate] * len(now.units()), random.Random(1))


class TestTheModel:
    """What is not synced may be lost."""

    def test_a_file_is_there_when_it_and_its_folder_are_synced(self):
        assert left([ADD, written(b"a"), *synced(FILE), *synced(ROOT)]) == {"/f": b"a"}
        assert left([ADD, written(b"a"), *synced(FILE)]) == {}, "its entry is lost"
        assert left([ADD, written(b"a"), *synced(ROOT)]) == {"/f": b""}, "its content is lost"
        assert left([ADD, written(b"a")], lost=False) == {"/f": b"a"}

    def test_a_sync_covers_what_was_written_before_it_began(self):
        before, after = written(b"a"), written(b"b", 1)
        begin, end = synced(FILE)
        made = [ADD, *synced(ROOT, 2)]
        assert left([*made, before, begin, after, end]) == {"/f": b"a"}
        assert left([*made, before, begin, after]) == {"/f": b""}, "the power fails in the sync"

    def test_two_syncs_at_once_cover_nothing_twice(self):
        first, second = synced(FILE, 1), synced(FILE, 2)
        made = [ADD, *synced(ROOT, 3), written(b"a"), first[0], written(b"b", 1), second[0]]
        assert left([*made, second[1], first[1], written(b"c", 2)]) == {"/f": b"ab"}

    def test_a_removed_file_may_come_back_and_a_new_one_in_its_place_be_lost(self):
        made = [ADD, written(b"old"), *synced(FILE), *synced(ROOT)]
        again = [Event("remove", ROOT, "f"), ADD, written(b"new"), *synced(FILE)]
        assert left([*made, *again]) == {"/f": b"old"}
        assert left([*made, *again, *synced(ROOT)]) == {"/f": b"new"}

    def test_a_length_is_lost_like_a_write(self):
        made = [ADD, written(b"abc"), *synced(FILE), *synced(ROOT), Event("cut", FILE, offset=1)]
        assert left(made) == {"/f": b"abc"}
        assert left(made, lost=False) == {"/f": b"a"}

    def test_a_torn_write_has_whole_sectors(self):
        now = Disk(ROOT)
        for event in [ADD, *synced(ROOT), written(b"x" * 4096 + b"y")]:
            now.hear(event)
        assert now.units() == [True, False], "a piece of the disk's size, and the rest"
        found = {now.leave(["torn", "lost"], random.Random(n))["/f"] for n in range(50)}
        sectors = {text[at : at + 512] for text in found for at in range(0, len(text), 512)}
        assert len(found) > 5
        assert sectors == {b"x" * 512, bytes(512)}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """The record of a program on the file of an application."""
    return record("app.db", "accepted", tmp_path_factory.mktemp("cuts"))


def test_power_cuts_break_no_promise(recording, tmp_path):
    rng = random.Random(1)
    found = judge(cuts(recording, 30, rng, every=25), "app.db", tmp_path, 4, rng)
    assert found.broken == []
    assert found.tried > 100
    assert found.recovered == 4


@pytest.mark.parametrize("what", ["app.db-wal", "root"])
def test_a_missing_sync_is_found(recording, tmp_path, what):
    """Without syncs of the log, or of its folder, accepted tasks are lost."""
    events = [
        event
        for event in recording.events
        if not (event.what in ("sync", "synced") and Path(event.path).name == what)
    ]
    rng, blind = random.Random(1), recording._replace(events=events)
    found = judge(cuts(blind, 0, rng, every=20, each=False), "app.db", tmp_path, 0, rng)
    assert any("was accepted, and is gone" in sentence for sentence in found.broken)


def test_a_new_file_can_be_opened_after_each_cut(tmp_path):
    """Before it has a write-ahead log, what is written last must not undo what it does not know."""
    root = tmp_path / "root"
    root.mkdir()
    program = """if True:
        import sys
        from taskx import SQLiteRepository, Task
        with SQLiteRepository(sys.argv[1]) as repository:
            repository.create(Task(id="a", type="plain"))
        with open(sys.argv[2], "w") as told:
            told.write('["accepted", "a"]')
    """
    told, trace = tmp_path / "told", tmp_path / "trace"
    disk.record([sys.executable, "-c", program, root / "tasks.db", told], trace, {})
    made = Recording("tasks.db", "accepted", str(root), disk.read(trace, root, told))
    rng = random.Random(1)
    found = judge(cuts(made, 20, rng), "tasks.db", tmp_path, 0, rng)
    assert found.broken == []
    assert found.tried > 50


def test_a_copy_of_an_early_file_survives(tmp_path):
    """The old file may be deleted as soon as the copy is told."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(kept(4), tmp_path / "old.db")
    program = (
        "import sys; from taskx.stores.sqlite.copying import copy_tasks; copy_tasks(*sys.argv[1:])"
    )
    paths = str(tmp_path / "old.db"), str(root / "new.db")
    disk.record([sys.executable, "-c", program, *paths], tmp_path / "trace", {})
    now = Disk(str(root))
    for event in disk.read(tmp_path / "trace", root, tmp_path / "told"):
        now.hear(event)
    (tmp_path / "left").mkdir()
    disk.write(now.leave(["lost"] * len(now.units()), random.Random(1)), tmp_path / "left")
    counts = []
    for path in (tmp_path / "old.db", tmp_path / "left" / "new.db"):
        with closing(sqlite3.connect(path)) as connection:
            counts += connection.execute("SELECT count(*) FROM tasks").fetchall()
    assert counts[0] == counts[1] != (0,)
