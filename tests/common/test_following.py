"""Following tasks: ``handle.follow``, ``queue.follow`` and ``await handle``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

import pytest
from helpers import PATIENCE, eventually

from taskx import TaskFailed, TaskNotFound, TaskStatus

#: Makes a display write each state.
every_state = pytest.mark.timing(line_every=0.0)


@pytest.fixture
def halfway(make_queue, gate):
    """A started queue whose ``half`` tasks report 50 % and wait for the gate."""
    queue = make_queue(worker_num=1)

    @queue.executor("half")
    def half(ctx, fails=False):
        ctx.progress(50, "half of it")
        gate()
        if fails:
            raise ValueError("the other half")
        return "whole"

    queue.executor("quick")(lambda: "quick")
    queue.start()
    return queue


class TestFollowHandle:
    @pytest.mark.every_store
    @every_state
    def test_follow_shows_the_progress_and_returns_the_result(self, halfway, gate, capsys):
        handle = halfway.submit("half")
        follower = concurrent.futures.ThreadPoolExecutor(1).submit(handle.follow)
        seen = []
        eventually(lambda: seen.append(capsys.readouterr().err) or "half of it" in "".join(seen))
        gate.open()
        assert follower.result(PATIENCE) == "whole"
        assert f"half {handle.id}: 50 of 100 (50%), half of it\n" in "".join(seen)
        assert "100 of 100 (100%), half of it\n" in capsys.readouterr().err

    @every_state
    def test_follow_shows_the_beginning_of_a_long_message(self, queue, capsys):
        queue.executor("tell")(lambda ctx: ctx.progress(50, "x" * 5000))
        queue.start()
        queue.submit("tell").follow(PATIENCE)
        *_, last = capsys.readouterr().err.splitlines()
        assert last.endswith(f", {'x' * 199}…")

    def test_follow_shows_the_last_state_if_the_task_ends_between_two_reads(
        self, halfway, gate, capsys
    ):
        handle = halfway.submit("half")
        read = handle.task

        def task():
            record = read()
            gate.open()
            assert halfway.drain(PATIENCE)
            return record

        handle.task = task
        assert handle.follow() == "whole"
        assert capsys.readouterr().err == f"half {handle.id}: 100 of 100 (100%), half of it\n"

    def test_follow_raises_the_errors_of_result(self, halfway, gate, capsys):
        gate.open()
        with pytest.raises(TaskFailed, match="the other half"):
            halfway.submit("half", {"fails": True}).follow()

    def test_follow_returns_a_known_result_of_a_deleted_task(self, halfway):
        handle = halfway.submit("quick")
        assert handle.result(PATIENCE) == "quick"
        assert halfway.drain(PATIENCE)  # else a new handle may still be told how the run has ended
        halfway.delete(handle.id)
        assert handle.follow() == "quick"
        with pytest.raises(TaskNotFound):
            halfway.handle(handle.id).follow()

    def test_follow_waits_for_the_outcome_of_a_task_that_was_deleted_before_it_was_told(
        self, halfway, gate
    ):
        handle = halfway.submit("half")
        sleep = handle._sleep

        def gone():
            raise TaskNotFound(handle.id)

        def let_it_end(seconds):
            gate.open()
            sleep(seconds)

        handle.task, handle._sleep = gone, let_it_end
        assert handle.follow() == "whole"

    def test_follow_raises_timeout_error_after_its_timeout(self, halfway, gate, capsys):
        handle = halfway.submit("half")
        with pytest.raises(concurrent.futures.TimeoutError):
            handle.follow(timeout=0.01)
        gate.open()
        assert handle.result(PATIENCE) == "whole"


class TestFollowQueue:
    @every_state
    def test_follow_shows_waiting_running_and_failed_tasks(self, halfway, gate, capsys):
        halfway.submit("quick").result(PATIENCE)
        halfway.submit("half", {"fails": True})
        gate.wait_for(1)
        halfway.submit("quick")
        follower = concurrent.futures.ThreadPoolExecutor(1).submit(halfway.follow)
        line, seen = "tasks: 0 of 2 (0%), 1 waiting, 1 running, 0 failed\n", []
        eventually(lambda: seen.append(capsys.readouterr().err) or line in "".join(seen))
        gate.open()
        assert follower.result(PATIENCE) is True
        last = "tasks: 2 of 2 (100%), 0 waiting, 0 running, 1 failed\n"
        assert capsys.readouterr().err.endswith(last)

    def test_follow_returns_false_after_its_timeout(self, halfway, gate, capsys):
        halfway.submit("half")
        assert halfway.follow(timeout=0.01) is False
        gate.open()

    @pytest.mark.every_store
    def test_a_queue_that_is_not_started_follows_other_queues_tasks(
        self, halfway, make_queue, gate, capsys
    ):
        watcher = make_queue()
        halfway.submit("half")
        gate.wait_for(1)
        assert watcher.follow(timeout=0.01) is False
        gate.open()
        assert halfway.drain(PATIENCE)
        assert watcher.follow(timeout=PATIENCE) is True


class TestAwait:
    def test_await_returns_the_result(self, halfway):
        async def main():
            return await halfway.submit("quick")

        assert asyncio.run(main()) == "quick"

    def test_many_handles_can_be_awaited_at_once(self, halfway):
        async def main():
            return await asyncio.gather(*(halfway.submit("quick") for _ in range(20)))

        assert asyncio.run(main()) == ["quick"] * 20

    def test_await_raises_the_errors_of_result(self, halfway, gate):
        async def main():
            await halfway.submit("half", {"fails": True})

        gate.open()
        with pytest.raises(TaskFailed, match="the other half"):
            asyncio.run(main())

    def test_awaiting_a_cancelled_task_raises_the_futures_cancelled_error(self, queue):
        queue.declare("later")
        handle = queue.submit("later")
        handle.cancel()

        async def main():
            await handle

        with pytest.raises(concurrent.futures.CancelledError):
            asyncio.run(main())

    def test_a_time_out_leaves_the_task_alone(self, halfway, gate):
        async def main():
            handle = halfway.submit("half")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(handle, 0.01)
            assert not handle.cancelled()
            gate.open()
            return await handle

        assert asyncio.run(main()) == "whole"

    def test_a_cancelled_caller_leaves_the_task_alone(self, halfway, gate):
        async def main():
            handle = halfway.submit("half")

            async def wait():
                return await handle

            caller = asyncio.create_task(wait())
            await asyncio.sleep(0)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            gate.open()
            return await handle

        assert asyncio.run(main()) == "whole"

    def test_await_does_not_block_the_event_loop(self, halfway, gate):
        async def main():
            waiting = asyncio.create_task(asyncio.wait_for(halfway.submit("half"), PATIENCE))
            while not waiting.done():
                gate.open()
                await asyncio.sleep(0)
            return waiting.result()

        assert asyncio.run(main()) == "whole"

    def test_a_task_can_end_after_its_event_loop_was_closed(self, halfway, gate):
        handle = halfway.submit("half")

        async def main():
            caller = asyncio.ensure_future(asyncio.wait_for(handle, 0.01))
            await asyncio.wait([caller], timeout=PATIENCE)
            return caller.exception()

        assert isinstance(asyncio.run(main()), asyncio.TimeoutError)
        told = threading.Event()
        handle.add_done_callback(lambda _: told.set())
        gate.open()
        assert told.wait(PATIENCE)
        assert handle.task().status is TaskStatus.COMPLETED
