"""Ids sort by time, errors form one tree."""

import inspect
import os
import pickle
import re
import sys
import threading
import traceback
import uuid

import pytest
from strikes import every_strike

import taskx
from taskx import CancelReason, TaskCancelled, TaskxError
from taskx.tasks import errors, ids, retry, token
from taskx.tasks.ids import new_id


class TestIds:
    def test_ids_are_uuids_of_version_7(self):
        value = uuid.UUID(new_id())
        assert (value.version, value.variant) == (7, uuid.RFC_4122)

    def test_ids_sort_by_the_time_of_their_creation(self):
        made = [new_id() for _ in range(5000)]
        assert made == sorted(made)
        assert len(set(made)) == len(made)

    def test_ids_keep_their_order_when_the_clock_goes_back_a_little(self):
        now = 1_700_000_000_000
        made = [new_id(now), new_id(now - 1), new_id(now - ids.KEPT_ORDER + 1), new_id(now)]
        assert made == sorted(made)

    def test_ids_sort_where_the_clock_says_when_it_goes_back_far(self):
        now = 1_700_000_000_000
        later, earlier = new_id(now), new_id(now - ids.KEPT_ORDER)
        assert earlier < later
        assert ids.made_at(earlier) == now - ids.KEPT_ORDER

    def test_ids_keep_their_order_if_a_moment_has_more_than_its_counter_can_count(self):
        made = [new_id(1_700_000_000_000) for _ in range(600_000)]
        assert made == sorted(made)
        assert len(set(made)) == len(made)

    @pytest.mark.parametrize("now", [0, 1, 1_700_000_000_000, 7_258_118_400_000])
    def test_the_key_in_an_id_begins_with_the_time_until_the_year_2200(self, now):
        made = new_id(now)
        key = ids.key_of(made)
        assert ids.key_at(now) <= key < ids.key_at(now + 1)
        assert key < 2**63
        assert ids.made_at(made) == now

    def test_a_new_key_is_the_one_that_others_read_in_the_id(self):
        moments = (0, 5, 5, 4, 70_000, 69_999, 1_700_000_000_000, 2**60)
        made = [ids.keyed_id(now) for now in moments for _ in range(300)]
        assert all(ids._read_key(one) == key for one, key in made)

    def test_a_key_is_known_also_after_many_others_and_few_are_kept(self):
        made = [ids.keyed_id(now) for now in range(3 * ids._MOST_KEYS)]
        assert all(ids.key_of(one) == key for one, key in made)
        assert len(ids._keys) <= ids._MOST_KEYS

    def test_a_new_key_is_the_one_in_the_id_after_an_interrupt_at_any_point(self):
        now = 1_700_000_000_000
        ids.keyed_id(now)
        struck = 0
        for _ in every_strike(lambda point: ids.keyed_id(now + point + 1)):  # each begins a moment
            struck += 1
            made, key = ids.keyed_id(now)  # the clock is set back to the moment before it
            assert ids._read_key(made) == key
        assert struck > 3

    def test_keys_sort_as_their_ids(self):
        made = [new_id(now) for now in (5, 5, 6, 70_000, 1_700_000_000_000) for _ in range(50)]
        keys = [ids.key_of(one) for one in made]
        assert keys == sorted(set(keys))

    def test_a_key_for_a_chosen_id_is_in_no_id(self):
        assert not any(ids.key_of(new_id(5)) & 1 for _ in range(100))
        made = [ids.new_key(5) for _ in range(100)]
        assert all(key & 1 for key in made)
        assert all(ids.key_at(5) < key < ids.key_at(6) for key in made)
        assert len(set(made)) == 100

    @pytest.mark.parametrize("now", [-1, 2**43, 2**60])
    def test_a_time_that_no_key_can_hold_has_the_nearest_key(self, now):
        assert 0 <= ids.key_of(new_id(now)) < 2**63
        assert 0 <= ids.new_key(now) < 2**63

    @pytest.mark.parametrize(
        "text", ["", "a", "x" * 36, "018cc251-f400-4851-a960-fbefa5d418a5", "\0" * 14 + "7" * 22]
    )
    def test_other_ids_have_no_key(self, text):
        assert ids.key_of(text) is None

    def test_ids_are_unique_across_threads(self):
        made = [[] for _ in range(8)]
        barrier = threading.Barrier(8)

        def work(out):
            barrier.wait()
            out += [new_id() for _ in range(1000)]

        threads = [threading.Thread(target=work, args=(out,)) for out in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({task_id for out in made for task_id in out}) == 8000
        assert all(out == sorted(out) for out in made)

    @pytest.mark.process
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_parent_and_child_process_make_different_ids(self):
        new_id()
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write, " ".join(new_id() for _ in range(100)).encode())
            os._exit(0)
        os.close(write)
        ours = {new_id() for _ in range(100)}
        with os.fdopen(read) as pipe:
            theirs = set(pipe.read().split())
        os.waitpid(child, 0)
        assert len(theirs) == 100
        assert not ours & theirs


def error_classes():
    return [
        value
        for module in (errors, retry, token)
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, BaseException)
        and value.__module__ == module.__name__
    ]


class TestErrors:
    def test_the_tree_in_the_docstring_is_the_real_tree(self):
        drawn = {}
        path = []
        for line in errors.__doc__.splitlines():
            found = re.match(r"    ([│├└─ ]*)(\w+)(?: \((\w+)\))?", line)
            if not found or not found[2][0].isupper():
                continue
            del path[len(found[1]) // 4 :]
            bases = {path[-1]} if path else set()
            drawn[found[2]] = bases | ({found[3]} if found[3] else set())
            path.append(found[2])
        real = {
            error.__name__: {base.__name__ for base in error.__bases__} - {"Exception"}
            for error in error_classes()
        }
        assert drawn == real

    def test_all_error_classes_are_public(self):
        assert {error.__name__ for error in error_classes()} <= set(taskx.__all__)

    @pytest.mark.parametrize(
        "error",
        [
            *(
                error("what went wrong")
                for error in error_classes()
                if error.__init__ in (Exception.__init__, ValueError.__init__)
                or "__init__" not in vars(error)
            ),
            errors.PayloadError("params.x", "too large"),
            errors.TaskNotFound("a"),
            errors.DuplicateTask("a"),
            errors.TaskFailed("a", "ValueError: broke", 2, "Traceback …", "ValueError"),
            TaskCancelled(CancelReason.TIMEOUT),
            retry.Retry(5, "busy"),
            retry.Retry(5),
            retry.Snooze(60),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_errors_survive_pickling(self, error):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (str(copy), vars(copy)) == (str(error), vars(error))

    def test_error_texts_name_the_problem(self):
        assert str(errors.PayloadError("params.x", "is not JSON")) == "params.x: is not JSON"
        assert "'a b'" in str(errors.TaskNotFound("a b"))
        assert "'a b'" in str(errors.DuplicateTask("a b"))
        assert str(TaskCancelled(CancelReason.STOP)) == "the task was told to stop: stop"

    @pytest.mark.parametrize(
        ("error", "shown"),
        [("ValueError: broke", "ValueError: broke"), ("E: two\nlines\n", "E: two …"), ("", "")],
    )
    def test_a_failed_task_is_told_in_one_line(self, error, shown):
        failed = errors.TaskFailed("a", error, 2)
        assert str(failed) == f"task a failed in attempt 2: {shown}"
        assert repr(failed) == f"<TaskFailed: {failed}>"

    def test_an_uncaught_failure_shows_the_traceback_of_the_task(self):
        """Before Python 3.11 exceptions have no notes: the text then says where it is."""
        failed = errors.TaskFailed("a", "ValueError: broke", 2, "Traceback …\nline", "ValueError")
        shown = "".join(traceback.format_exception(failed))
        assert failed.traceback == failed.remote_traceback == "Traceback …\nline"
        assert "task a failed in attempt 2: ValueError: broke" in shown
        if sys.version_info >= (3, 11):
            assert shown.endswith("\nThe task's traceback:\n\nTraceback …\nline\n")
        else:
            assert str(failed).endswith("broke (see the error's attribute traceback)")
        assert "\n" not in f"{failed}{failed!r}"

    def test_except_exception_does_not_catch_a_cancellation(self):
        assert not issubclass(TaskCancelled, (Exception, TaskxError))


def test_the_stored_name_of_a_cancellation_never_changes():
    """Records contain the full name of its class in ``error_type``."""
    assert (
        f"{TaskCancelled.__module__}.{TaskCancelled.__qualname__}"
        == "taskx.tasks.errors.TaskCancelled"
    )
