"""The log of changes."""

from __future__ import annotations

import json

import pytest
from storage.repositories import TinyRepository

from taskx import Change, ConfigurationError, MemoryRepository, PayloadError, Queue
from taskx.insight import changelog
from taskx.repository.example import ExampleRepository
from taskx.tasks.timing import Timing


def test_the_newest_changes_come_first(make_queue, clock):
    queue = make_queue(clock=clock)
    assert queue.changes() == []
    first = clock.now()
    queue.note_change("ann", "tune", "mail", {"rate": "5/s", "was": None})
    clock.advance(60)
    queue.note_change("bo", "cancel", "task 1")
    newest, oldest = queue.changes()
    assert oldest == Change(
        at=first, by="ann", action="tune", target="mail", detail={"rate": "5/s", "was": None}
    )
    assert (newest.by, newest.detail) == ("bo", None)
    assert (newest.at - oldest.at).total_seconds() == 60
    assert queue.changes(1) == [newest]
    assert json.loads(json.dumps(oldest.to_dict()))["at"] == first.isoformat()


@pytest.mark.timing(most_changes=5)
def test_the_oldest_changes_are_removed_now_and_then(queue, repository):
    known = (queue.clock, queue._timing)
    for n in range(8):
        changelog.note_change(queue.repository, *known, "ann", "cancel", str(n), None, lambda: 1.0)
    assert len(repository.notes("change/")) == 8
    assert [change.target for change in queue.changes()] == ["7", "6", "5", "4", "3"]
    changelog.note_change(queue.repository, *known, "ann", "cancel", "8", None, lambda: 0.0)
    assert len(repository.notes("change/")) == 5
    assert [change.target for change in queue.changes(2)] == ["8", "7"]


def test_one_write_of_fifty_removes_changes():
    repository = MemoryRepository()
    queue = Queue(repository, timing=Timing(most_changes=5))
    for _ in range(2_000):
        queue.note_change("ann", "cancel", "t")
    assert 5 <= len(repository.notes("change/")) < 1_000


def test_a_damaged_entry_is_left_out(queue, repository):
    queue.note_change("ann", "cancel", "t")
    for n, text in enumerate(["", "[]", '{"at": "x"}', '{"at": 0, "by": "b"}', "9" * 5000]):
        repository.put_note(f"change/{n}", text, 0)
    assert [change.target for change in queue.changes()] == ["t"]


def test_wrong_changes_are_refused(queue):
    with pytest.raises(ConfigurationError, match="by must be text"):
        queue.note_change(None, "cancel", "t")
    with pytest.raises(PayloadError, match="detail"):
        queue.note_change("ann", "cancel", "t", object())
    with pytest.raises(PayloadError, match="10,001"):
        queue.note_change("ann", "cancel", "t", "x" * 9_999)
    with pytest.raises(ConfigurationError, match="at_most"):
        queue.changes(0)
    assert queue.changes() == []


def test_long_and_hostile_texts_are_stored_as_text(queue):
    queue.note_change("a\x00\n" + "b" * 5_000, "<script>", "\ud800")
    [change] = queue.changes()
    assert len(change.by) <= 1_000
    json.dumps(change.to_dict()).encode()


def test_repositories_of_eight_methods_refuse_and_those_of_primitives_keep_changes(tmp_path):
    tiny, example = Queue(TinyRepository()), Queue(ExampleRepository(tmp_path / "example"))
    with pytest.raises(ConfigurationError, match="use SQLiteRepository"):
        tiny.note_change("ann", "cancel", "t")
    with pytest.raises(ConfigurationError, match="use SQLiteRepository"):
        tiny.changes()
    example.note_change("ann", "cancel", "t")
    assert [change.by for change in example.changes()] == ["ann"]
    example.close()
