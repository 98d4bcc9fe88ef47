"""Codecs of the params, results and checkpoints of tasks, on every repository."""

from __future__ import annotations

import base64
import json
import sqlite3
import zlib
from contextlib import closing

import mongomock
import pytest

from taskx import (
    Codec,
    ConfigurationError,
    MemoryRepository,
    PayloadError,
    RetryPolicy,
    SQLiteRepository,
    Task,
    TaskFilter,
    TaskStatus,
    ZlibCodec,
    open_repository,
)
from taskx.stores.queries import shown
from taskx.tasks import lifecycle
from taskx.tasks.codec import Codecs, Unreadable
from taskx.tasks.lifecycle import Ending

from .repositories import OnMongo, Scramble

SECRET = {"password": "hunter2", "n": [1, None, {"ä": 2.5}]}
COLUMNS = ("params", "result", "checkpoints")


class Shelf:
    """A store that repositories with different codecs share, and whose stored values a test can read."""

    def __init__(self, kind, folder, clock):
        self.kind, self.folder, self.clock = kind, folder, clock
        self.database = mongomock.MongoClient().db
        self.opened = []

    def open(self, codec=None):
        if self.kind == "sqlite":
            made = SQLiteRepository(self.folder / "tasks.db", clock=self.clock, codec=codec)
        elif self.kind == "mongomock":
            made = OnMongo(self.database, self.folder, self.clock, codec)
        else:
            made = MemoryRepository(self.clock, codec)
            if self.opened:  # the same memory, read by another codec
                own = {"codecs": made.codecs, "reads": made.reads}
                vars(made).update(vars(self.opened[0]) | own)
        self.opened.append(made)
        return made

    def stored(self, task_id="a"):
        """Return the stored values, decoded from JSON."""
        if self.kind == "mongomock":
            document = self.database.tasks.find_one({"_id": task_id})
            kept = document["taskx"].get("checkpoints")
            return document["params"], document["result"], kept and json.loads(kept)
        if self.kind == "memory":
            texts = [self.opened[0]._rows[task_id][name] for name in COLUMNS]
        else:
            with closing(sqlite3.connect(self.folder / "tasks.db")) as connection:
                sql = f"SELECT {', '.join(COLUMNS)} FROM tasks WHERE id = ?"
                texts = connection.execute(sql, (task_id,)).fetchone()
        return tuple(None if text is None else json.loads(text) for text in texts)

    def change(self, params, task_id="a"):
        """Replace the stored params."""
        if self.kind == "mongomock":
            self.database.tasks.update_one({"_id": task_id}, {"$set": {"params": params}})
        elif self.kind == "memory":
            self.opened[0]._rows[task_id]["params"] = json.dumps(params)
        else:
            with closing(sqlite3.connect(self.folder / "tasks.db")) as connection, connection:
                sql = "UPDATE tasks SET params = ? WHERE id = ?"
                connection.execute(sql, (json.dumps(params), task_id))


@pytest.fixture(params=["memory", "sqlite", "mongomock"])
def shelf(request, tmp_path, clock):
    made = Shelf(request.param, tmp_path, clock)
    yield made
    for store in made.opened:
        store.close()


def write(
    store,
    params,
    task_id="a",
    result='{"token": "xyzzy"}',
    checkpoints='{"cursor": "c"}',
    **fields,
):
    """Store a task, run it with a checkpoint, and complete it."""
    store.create(Task(id=task_id, type="t", params=params, **fields))
    start = lifecycle.start(store.get_by_id(task_id), store.clock.now_ms(), "node")
    assert list(store.apply([start])) == [True]
    task = store.get_by_id(task_id)
    assert list(store.apply([lifecycle.checkpoint(task, checkpoints, durable=True)])) == [True]
    ending = Ending(returned=True, result=result)
    assert list(store.apply(lifecycle.conclude(task, ending, store.clock.now_ms()))) == [True]
    return store.get_by_id(task_id)


class TestStored:
    def test_params_result_and_checkpoints_name_their_codec(self, shelf):
        task = write(shelf.open(Scramble()), SECRET)
        assert (task.params, task.result) == (SECRET, {"token": "xyzzy"})
        assert (task.checkpoints, task.damage) == ({"cursor": "c"}, "")
        for value in shelf.stored():
            assert sorted(value) == ["data", "taskx:codec"]
            assert value["taskx:codec"] == "scramble"
            assert type(json.loads(Scramble().decode(base64.b64decode(value["data"])))) is dict

    def test_no_plain_value_is_left_in_the_file(self, tmp_path, clock):
        """Its log holds none, either."""
        with SQLiteRepository(tmp_path / "tasks.db", clock=clock, codec=Scramble()) as store:
            write(store, SECRET)
            stored = b"".join((tmp_path / f"tasks.db{end}").read_bytes() for end in ("", "-wal"))
        assert b"scramble" in stored
        assert not any(word in stored for word in (b"hunter2", b"xyzzy", b"password"))

    @pytest.mark.parametrize("result", ["[1,2]", '"text"', "7", "false", '{"a":{}}'])
    def test_a_result_may_be_any_value(self, shelf, result):
        store = shelf.open(Scramble())
        assert write(store, SECRET, result=result).result == json.loads(result)
        assert store.list(TaskFilter())[0].result == json.loads(result)

    def test_empty_values_are_not_coded(self, shelf):
        task = write(shelf.open(Scramble()), {}, result=None, checkpoints="{}")
        assert (task.params, task.result, task.checkpoints) == ({}, None, {})
        assert shelf.stored() == ({}, None, {})

    def test_values_are_coded_by_every_way_to_write(self, shelf):
        """The ways are: a single task, a batch, and an update."""
        store = shelf.open(Scramble())
        store.create(Task(id="a", type="t", params=SECRET))
        inserts = [
            lifecycle.create(task_id=i, type="t", params='{"x":1}', created_by="", now=1)
            for i in "bc"
        ]
        assert list(store.apply(inserts, all_or_nothing=True)) == [True, True]
        assert inserts[0].row["params"] == '{"x":1}'  # the caller's write is unchanged
        task = store.get_by_id("b")
        task.params, task.result = SECRET, "by hand"
        store.update(task)
        assert [store.get_by_id(i).params for i in "abc"] == [SECRET, SECRET, {"x": 1}]
        assert store.get_by_id("b").result == "by hand"
        assert all("taskx:codec" in shelf.stored(i)[0] for i in "abc")
        assert "taskx:codec" in shelf.stored("b")[1]

    @pytest.mark.parametrize("codec", [Scramble(), ZlibCodec()])
    def test_an_interrupted_write_is_recognised(self, shelf, codec):
        """It is recognised even if the codec would now encode it differently or not at all."""
        store = shelf.open(codec)
        insert = lifecycle.create(task_id="a", type="t", params='{"x":1}', created_by="", now=5)
        store.apply([insert])
        start = lifecycle.start(store.get_by_id("a"), 6, "node")
        store.apply([start])
        task = store.get_by_id("a")
        kept = lifecycle.checkpoint(task, '{"cursor":1}', durable=True)
        other = lifecycle.checkpoint(task, '{"cursor":2}', durable=True)
        store.apply([kept])
        assert list(shown(store, [insert, kept, other])) == [True, True, False]
        done = lifecycle.conclude(task, Ending(returned=True, result="[5]"), 7)
        other = lifecycle.conclude(task, Ending(returned=True, result="[6]"), 7)
        store.apply(done)
        assert list(shown(store, [*done, *other])) == [True, False]

    def test_without_a_codec_values_are_stored_plain(self, shelf):
        task = write(shelf.open(), SECRET)
        assert task.params == SECRET
        assert shelf.stored() == (SECRET, {"token": "xyzzy"}, {"cursor": "c"})


class TestRead:
    def test_values_stored_before_the_codec_are_read(self, shelf):
        write(shelf.open(), SECRET)
        task = shelf.open(Scramble()).get_by_id("a")
        assert (task.params, task.result, task.damage) == (SECRET, {"token": "xyzzy"}, "")

    def test_of_several_codecs_the_first_writes_and_all_read(self, shelf):
        write(shelf.open(Scramble("old")), SECRET, "a")
        store = shelf.open([Scramble("new"), Scramble("old")])
        write(store, SECRET, "b")
        found = store.get_many(["a", "b"])
        assert [found[i].params for i in "ab"] == [SECRET, SECRET]
        assert [shelf.stored(i)[0]["taskx:codec"] for i in "ab"] == ["old", "new"]

    @pytest.mark.parametrize("codec", [None, Scramble("other")])
    def test_an_unknown_codec_damages_only_that_task(self, shelf, codec):
        write(shelf.open(Scramble()), SECRET, "a", retry=RetryPolicy(7))
        store = shelf.open(codec)
        write(store, {"fine": 1}, "b")
        for task in (
            store.get_by_id("a"),
            next(task for task in store.list(TaskFilter()) if task.id == "a"),
            store.get_many(["a"])["a"],
        ):
            assert (task.params, task.result, task.checkpoints) == ({}, None, None)
            assert "stored with codec 'scramble'; give that codec" in task.damage
            # The other fields are intact.
            assert (task.id, task.status, task.starts) == ("a", TaskStatus.COMPLETED, 1)
            assert ([a.outcome for a in task.attempts], task.retry.max_attempts) == (
                ["completed"],
                7,
            )
        assert store.get_by_id("b").damage == ""

    @pytest.mark.parametrize(
        "damaged",
        [
            {"taskx:codec": "zlib", "data": "AAAA"},
            {"taskx:codec": "zlib", "data": "no base64!"},
            {"taskx:codec": "zlib", "data": 5},
            {"taskx:codec": "zlib"},
            {"taskx:codec": 5, "data": "AAAA"},
            {"taskx:codec": "zlib", "data": base64.b64encode(zlib.compress(b"no JSON")).decode()},
            {"taskx:codec": "zlib", "data": base64.b64encode(zlib.compress(b"[1]")).decode()},
            {"taskx:codec": "zlib", "data": base64.b64encode(zlib.compress(b"\xff")).decode()},
        ],
    )
    def test_damaged_data_damages_only_that_task(self, shelf, damaged):
        store = shelf.open(ZlibCodec())
        for task_id in "ab":
            store.create(Task(id=task_id, type="t", params={"n": 1}))
        shelf.change(damaged)
        tasks = {task.id: task for task in store.list(TaskFilter())}
        assert tasks["a"].damage.startswith("the stored record is damaged: ")
        assert (tasks["a"].params, tasks["a"].status) == ({}, TaskStatus.PENDING)
        assert (tasks["b"].damage, tasks["b"].params) == ("", {"n": 1})

    def test_an_update_keeps_values_that_cannot_be_read(self, shelf):
        """Another process may be able to read it."""
        write(shelf.open(Scramble()), SECRET)
        store = shelf.open()
        task = store.get_by_id("a")
        task.priority = 7
        store.update(task)
        task = shelf.open(Scramble()).get_by_id("a")
        assert (task.params, task.result, task.priority) == (SECRET, {"token": "xyzzy"}, 7)
        task = store.get_by_id("a")
        task.params = {"mended": True}
        store.update(task)
        assert shelf.stored()[0] == {"mended": True}
        assert shelf.open(Scramble()).get_by_id("a").result == {"token": "xyzzy"}


class TestFailure:
    class Broken(Codec):
        name = "broken"

        def encode(self, data):
            if b"odd" in data:
                raise KeyError("no key")
            return "no bytes" if b"text" in data else data

        def decode(self, data):
            return data

    @pytest.mark.parametrize(("word", "why"), [("odd", "KeyError"), ("text", "TypeError")])
    def test_if_encoding_fails_nothing_is_stored(self, shelf, word, why):
        store = shelf.open(self.Broken())
        with pytest.raises(PayloadError, match=f"params: codec 'broken' failed: {why}"):
            store.create(Task(id="a", type="t", params={"x": word}))
        assert store.count(TaskFilter()) == 0
        write(store, {"x": "fine"})
        task = store.get_by_id("a")
        task.params = {"x": word}
        with pytest.raises(PayloadError):
            store.update(task)
        assert store.get_by_id("a").params == {"x": "fine"}


class TestReserved:
    @pytest.mark.parametrize("codec", [None, Scramble()])
    def test_the_codecs_key_is_reserved(self, shelf, codec):
        store = shelf.open(codec)
        with pytest.raises(PayloadError, match=r"params\.taskx:codec: is a reserved key"):
            store.create(Task(id="a", type="t", params={"taskx:codec": "zlib", "data": ""}))
        write(store, {"x": {"taskx:codec": "further down it means nothing"}})
        task = store.get_by_id("a")
        task.result = {"taskx:codec": 1}
        with pytest.raises(PayloadError, match=r"result\.taskx:codec"):
            store.update(task)


class TestZlib:
    def test_zlib_compresses_large_values(self, shelf):
        store = shelf.open(ZlibCodec())
        task = write(store, {"text": "again and " * 1000}, result='"small"')
        assert (task.params, task.result) == ({"text": "again and " * 1000}, "small")
        params, result, _ = shelf.stored()
        assert params["taskx:codec"] == "zlib"
        assert len(params["data"]) < 300
        # It is not compressed; MongoDB wraps it in an object.
        assert result in ("small", {"value": "small"})

    @pytest.mark.parametrize(("min_size", "level"), [(0, 9), (5000, 1)])
    def test_min_size_sets_the_size_from_which_zlib_compresses(self, min_size, level):
        codec = ZlibCodec(min_size, level)
        for data in (b"a" * 4999, b"a" * 5000):
            packed = codec.encode(data)
            assert (packed is None) == (len(data) < min_size)
            assert packed is None or codec.decode(packed) == data

    def test_zlib_leaves_values_that_would_not_shrink(self):
        data = bytes(range(256)) * 8
        assert ZlibCodec(0).encode(data[:200]) is None
        assert ZlibCodec(0).encode(data) is not None
        # It is stored as base64, which would be larger.
        nearly = next(data[:n] for n in range(250, 400) if len(zlib.compress(data[:n])) < n)
        assert ZlibCodec(0).encode(nearly) is None

    @pytest.mark.parametrize("options", [{"min_size": -1}, {"level": 0}, {"level": 10}])
    def test_invalid_zlib_settings_are_refused(self, options):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            ZlibCodec(**options)


class Nameless(Scramble):
    def __init__(self):
        pass


class TestGiven:
    @pytest.mark.parametrize(
        ("codec", "why"),
        [
            (ZlibCodec, "must be an instance of Codec"),
            ([ZlibCodec], "must be an instance of Codec"),
            ("zlib", "must be an instance of Codec"),
            (5, "must be an instance of Codec"),
            (Nameless(), "name of a codec must be a str"),
            (Scramble(""), "must have a name"),
            (Scramble("x" * 256), "more than 255"),
            ([Scramble(), Scramble()], "two codecs have the same name"),
        ],
    )
    def test_an_invalid_codec_is_refused(self, tmp_path, codec, why):
        for make in (
            lambda: MemoryRepository(codec=codec),
            lambda: SQLiteRepository(tmp_path / "tasks.db", codec=codec),
            lambda: OnMongo(mongomock.MongoClient().db, tmp_path, codec=codec),
            lambda: open_repository("memory://", codec),
        ):
            with pytest.raises(ConfigurationError, match=why):
                make()

    @pytest.mark.parametrize("url", ["memory://", "sqlite:///x.db", "mongodb://localhost/x"])
    def test_open_repository_takes_a_codec(self, url):
        with pytest.raises(Unreadable):
            open_repository(url).codecs.value({"taskx:codec": "scramble"})
        codecs = open_repository(url, Scramble()).codecs
        coded = json.loads(codecs.columns({"params": '{"x":1}'})["params"])
        assert codecs.value(coded) == {"x": 1}

    def test_no_codec_costs_nothing(self):
        """The writes are not even read."""
        writes = [object()]
        assert Codecs().coded(writes) is writes
        columns = {"params": "secret"}
        assert Codecs().columns(columns) is columns
