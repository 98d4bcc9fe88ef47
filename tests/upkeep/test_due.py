"""Tasks whose time has come, while another process changes them."""

from taskx.testing import ManualQueue


def test_a_task_that_is_put_off_between_the_read_and_the_release_goes_on_waiting(monkeypatch):
    queue = ManualQueue()
    queue.executor("mail")(lambda: None)
    task = queue.submit("mail", unique_key="u", delay=1)
    queue.run_all()
    other = ManualQueue(queue.repository, clock=queue.clock)
    other.declare("mail")
    read = queue.repository.due

    def due(before, *more):
        found = read(before, *more)
        if found and before is not None:
            monkeypatch.undo()
            other.submit("mail", unique_key="u", on_conflict="replace", delay=60)
        return found

    monkeypatch.setattr(queue.repository, "due", due)
    queue.clock.advance(1)
    assert queue.run_all() == []
    assert task.task().status == "pending"
