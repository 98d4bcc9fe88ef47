"""Executors as functions and classes: their params, their options and their results."""

from __future__ import annotations

import functools
import re

import attrs
import pytest
from helpers import PATIENCE, frequent_checks

import taskx
from taskx import (
    ConfigurationError,
    Context,
    PayloadError,
    Queue,
    Task,
    TaskExecutor,
    TaskFailed,
    TaskStatus,
)
from taskx.tasks.options import ExecutorOptions, Options

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture
def started(queue):
    queue.start()
    return queue


def run(queue: Queue, type: str, **params):
    return queue.submit(type, params).result(PATIENCE)


# Functions


def test_params_arrive_as_keywords(started):
    @started.executor("add")
    def add(a, b=2, *, c=3):
        return [a, b, c]

    assert run(started, "add", a=1) == [1, 2, 3]
    assert run(started, "add", c=9, a=1) == [1, 2, 9]


def test_keyword_arguments_take_the_rest(started):
    @started.executor("rest")
    def rest(a, **more):
        return more

    assert run(started, "rest", a=1, b=2, c=3) == {"b": 2, "c": 3}


def test_a_first_parameter_named_ctx_gets_the_context(started):
    @started.executor("named")
    def named(ctx, a):
        return [type(ctx).__name__, ctx.task.id, a]

    handle = started.submit("named", {"a": 1})
    assert handle.result(PATIENCE) == ["Context", handle.id, 1]


def test_a_first_parameter_annotated_as_context_gets_the_context(started):
    @started.executor("annotated")
    def annotated(context: Context, a):
        return [context.task.type, a]

    @started.executor("quoted")
    def quoted(context: taskx.Context, a):  # a string, by this file's __future__ import
        return [context.task.type, a]

    assert run(started, "annotated", a=1) == ["annotated", 1]
    assert run(started, "quoted", a=1) == ["quoted", 1]


def keyword_only(*, ctx, a):
    pass


def all_keywords(**ctx):
    pass


@pytest.mark.parametrize("function", [keyword_only, all_keywords])
def test_a_context_that_cannot_be_passed_first_is_refused(queue, function):
    with pytest.raises(ConfigurationError, match="ctx cannot take a positional argument"):
        queue.executor()(function)


def test_a_decorated_function_can_still_be_called(queue):
    @queue.executor("add")
    def add(a, b=2):
        """Add."""
        return a + b

    @queue.executor("named")
    def named(ctx, a):
        return [ctx, a]

    assert add(1) == 3
    assert add(1, b=5) == 6
    assert named("a context", 1) == ["a context", 1]
    assert (add.__name__, add.__doc__, add.type) == ("add", "Add.", "add")


def test_an_executor_has_the_functions_attributes_except_its_own(started):
    def add(a, b=2):
        return a + b

    add.tags, add.type, add.options, add._signature, add._known = ["x"], "no", {}, None, ()
    add.submit = add.task = None
    executor = started.executor("add", priority=3)(add)
    assert (executor.tags, executor.type, executor.options.priority) == (["x"], "add", 3)
    assert executor.submit(1).result(PATIENCE) == 3
    with pytest.raises(PayloadError, match="does not take 'c'"):
        started.submit("add", {"a": 1, "c": 2})


def test_the_default_type_is_the_functions_name(queue):
    @queue.executor()
    def fetch():
        pass

    assert fetch.type == "fetch"
    assert queue.submit("fetch").task().type == "fetch"


def test_an_executor_can_submit_and_make_tasks(started):
    @started.executor("add")
    def add(ctx, a, b=2):
        return a + b

    assert add.submit(1).result(PATIENCE) == 3
    assert add.submit(1, b=5).result(PATIENCE) == 6
    task = add.task(7)
    assert (task.type, task.params, task.status) == ("add", {"a": 7}, TaskStatus.PENDING)
    for wrong in (lambda: add.submit(), lambda: add.task(1, c=2), lambda: add.task(1, 2, 3)):
        with pytest.raises(PayloadError, match="add"):
            wrong()


def test_an_executor_made_without_a_queue_can_be_registered_later(started):
    @taskx.executor("later", priority=3)
    def later(a):
        return a

    with pytest.raises(ConfigurationError, match="register"):
        later.submit(1)
    started.register_executor(later)
    handle = later.submit(1)
    assert handle.result(PATIENCE) == 1
    assert handle.task().priority == 3


def test_the_params_of_a_wrapped_function_are_checked(started):
    def twice(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        return wrapper

    @started.executor("number")
    @twice
    def number(ctx, a):
        return a

    assert run(started, "number", a=4) == 8
    with pytest.raises(PayloadError):
        started.submit("number", {"b": 1})


def test_bound_methods_and_partials_can_be_executors(started):
    class Service:
        def fetch(self, ctx, url):
            return [ctx.task.type, url]

    started.executor("method")(Service().fetch)
    started.executor("partial")(functools.partial(lambda a, b: a + b, b=1))
    assert run(started, "method", url="x") == ["method", "x"]
    assert run(started, "partial", a=1) == 2


def generator():
    yield 1


def spread(*args):
    pass


def positional(a, /):
    pass


def test_a_call_without_a_context_says_where_to_get_one():
    @taskx.executor("invoice")
    def invoice(ctx, number):
        return ctx.step("send", lambda: number) if number else ctx is None

    assert invoice(None, 0)  # it does not need one
    with pytest.raises(ConfigurationError, match=r"'invoice' uses ctx.step.* run_executor"):
        invoice(None, 1)


def test_an_error_of_the_function_itself_stays_as_it_is():
    @taskx.executor("broken")
    def broken(ctx, values):
        return values.step

    with pytest.raises(AttributeError):
        broken("a context", None)
    with pytest.raises(AttributeError, match="'int' object"):
        broken(None, 1)


def ctx_second(a, ctx):
    pass


def ctx_keyword(a, *, ctx):
    pass


REFUSED = [generator, spread, positional, ctx_second, ctx_keyword, "text", None]


@pytest.mark.parametrize("function", REFUSED)
def test_a_function_that_cannot_be_an_executor_is_refused(queue, function):
    with pytest.raises(ConfigurationError):
        queue.executor("refused")(function)
    with pytest.raises(ConfigurationError):
        taskx.executor("refused")(function)
    with pytest.raises(LookupError):
        queue.submit("refused")


@pytest.mark.parametrize("function", [max, dict])
@pytest.mark.parametrize("options", [{}, {"batch": 2}])
def test_a_function_that_does_not_tell_its_parameters_is_refused(queue, function, options):
    with pytest.raises(ConfigurationError, match="wrap it in a function"):
        queue.executor("refused", **options)(function)


def test_a_decorator_without_parentheses_is_refused(queue):
    for decorator in (queue.executor, taskx.executor):
        with pytest.raises(ConfigurationError, match="parentheses"):
            decorator(positional)


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0},
        {"max_crashes": True},
        {"timeout": 0},
        {"timeout": -1},
        {"priority": 0.5},
        {"replace": "yes"},
    ],
)
def test_invalid_options_are_refused(queue, options):
    for decorator in (queue.executor, taskx.executor):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            decorator("x", **options)


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("max_retries", "max_attempts=…, one more"),
        ("time_limit", "timeout=…"),
        ("soft_time_limit", "timeout=…"),
        ("rate_limit", "rate=…"),
        ("countdown", "delay=… of submit"),
        ("eta", "run_at=… of submit"),
        ("task_id", "id=… of submit"),
        ("default_retry_delay", "retry=RetryPolicy(…)"),
        ("autoretry_for", "retry=RetryPolicy(…)"),
        ("bind", "a first parameter ctx"),
        ("concurrency", "max_concurrency=…"),
    ],
)
def test_the_option_of_another_library_gets_the_word_for_it_here(queue, word, ours):
    text = f"executor() has no option {word} (for {word} write {ours})"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        queue.executor("x", **{word: 3})


def test_the_settings_of_a_queue_have_words_for_those_of_other_libraries():
    with pytest.raises(TypeError, match=r"no option workers \(for workers write worker_num=…\)$"):
        taskx.Config(workers=3)


def test_words_of_other_libraries_and_misspelt_ones_are_told_together(queue):
    text = "(for rate_limit write rate=… of the decorator; did you mean 'priority'?)"
    with pytest.raises(TypeError, match=re.escape(text)):
        queue.submit("x", {}, rate_limit="1/s", prioritty=3)


def test_misspelt_options_are_refused_by_name(queue):
    @taskx.executor("mine")
    def mine():
        pass

    meant = r"no option graze, limt_scope \(did you mean 'grace', 'limit_scope'\?\)$"
    for call in (
        lambda **options: queue.executor("x", **options),
        lambda **options: taskx.executor("x", **options),
        lambda **options: queue.register_executor(mine, **options),
    ):
        with pytest.raises(TypeError, match=meant):
            call(limt_scope="global", graze=1, timeout=5)
    queue.register_executor(mine)


@pytest.mark.parametrize("type", ["", 5, "x" * 256, "a\0b"])
def test_the_type_must_be_a_valid_name(queue, type):
    with pytest.raises(ConfigurationError, match="type"):
        queue.executor(type)(lambda: None)


def test_a_type_cannot_have_two_executors(queue):
    queue.executor("x")(lambda: None)
    with pytest.raises(ConfigurationError, match="'x' already has an executor; give replace=True"):
        queue.executor("x")(lambda: None)
    with pytest.raises(ConfigurationError, match="'x' already has an executor"):
        queue.executor("x", replace=False)(lambda: None)


# Replacing executors


def test_a_replaced_executors_running_task_ends_with_the_old_code(make_queue, gate):
    queue = make_queue(worker_num=2)

    def cell(answer):
        @queue.executor("ask", replace=True, max_attempts=2 if answer == "new" else 1)
        def ask(wait=False):
            if wait:
                gate()
            return answer

        return ask

    old = cell("old")
    queue.start()
    running = old.submit(wait=True)
    gate.wait_for(1)
    new = cell("new")
    later = [old.submit(), new.submit()]
    assert [handle.result(PATIENCE) for handle in later] == ["new", "new"]
    assert later[0].task().max_attempts == 2
    gate.open()
    assert running.result(PATIENCE) == "old"


def test_a_waiting_task_runs_with_the_replacing_code_and_its_params(queue):
    queue.executor("x")(lambda a: a)
    waiting = queue.submit("x", {"a": 1})
    queue.register_executor(taskx.executor("x")(lambda a, b=5: a + b), replace=True)
    with pytest.raises(PayloadError, match="'c'"):
        queue.submit("x", {"a": 1, "c": 2})
    queue.start()
    assert waiting.result(PATIENCE) == 6


def test_replace_also_registers_a_new_type(queue):
    queue.executor("x", replace=True)(lambda: 1)
    queue.start()
    assert run(queue, "x") == 1


@pytest.mark.parametrize(
    "options", [{"max_concurrency": 2}, {"rate": "9/s"}, {"isolation": "process"}]
)
def test_a_replacing_executor_must_have_the_same_isolation_and_limits(queue, options):
    queue.executor("x", rate="5/s")(lambda: 1)
    with pytest.raises(ConfigurationError, match="must have the isolation and the limits"):
        queue.executor("x", replace=True, **{"rate": "5/s", **options})(lambda: 1)
    queue.executor("x", replace=True, rate=(5, 1))(lambda: 2)
    queue.start()
    assert run(queue, "x") == 2


# Classes


class Sync(TaskExecutor):
    type = "sync"

    def execute(self, ctx, task):
        task.progress = 3
        task.error = "not to be seen"
        task.status = TaskStatus.FAILED
        task.id = "another"
        task.created_by = "somebody else"
        task.started_at = task.timeout = None
        task.starts = task.errors = task.max_attempts = 99
        task.params["grown"] = True
        task.result = {"by": "attribute", "params": len(task.params)}
        return task.params.get("returns")


def test_a_class_executor_can_set_only_the_result(started):
    started.register_executor(Sync())
    task = started.submit("sync", {"a": 1}, created_by="me")
    assert task.result(PATIENCE) == {"by": "attribute", "params": 2}
    record = task.task()
    assert record.status is TaskStatus.COMPLETED
    assert (record.progress, record.error, record.created_by) == (100, "", "me")
    assert (record.starts, record.errors, record.max_attempts) == (1, 0, 1)
    assert record.created_at <= record.started_at <= record.completed_at
    assert record.params == {"a": 1}


@pytest.mark.parametrize("value", [False, 0, "", [], {"x": 1}])
def test_a_returned_value_wins_over_task_result(started, value):
    started.register_executor(Sync())
    assert run(started, "sync", returns=value) == value


def test_a_class_with_type_and_execute_works_as_an_executor(started):
    class Duck:
        type = "duck"

        def execute(self, ctx, task):
            return [ctx.task.id == task.id, task.params["n"]]

    started.register_executor(Duck(), max_attempts=2)
    handle = started.submit("duck", {"n": 1})
    assert handle.result(PATIENCE) == [True, 1]
    assert handle.task().max_attempts == 2


def test_an_object_that_is_not_an_executor_is_refused(queue):
    class Nameless(TaskExecutor):
        def execute(self, ctx, task):
            pass

    for thing in (Sync, Nameless(), object(), None, lambda: None, "sync"):
        with pytest.raises(ConfigurationError):
            queue.register_executor(thing)
    with pytest.raises(TypeError, match="abstract"):
        TaskExecutor()


@frequent_checks
@pytest.mark.every_store
def test_an_executor_registered_on_a_started_queue_runs_waiting_tasks(started, make_queue):
    other = make_queue()
    other.declare("late")
    handle = other.submit("late")
    started.executor("late")(lambda: "at last")
    assert handle.result(PATIENCE) == "at last"


# Results


@pytest.mark.parametrize(
    "value", [None, True, 0, -(2**63), 1.5, "ü\0", [1, [2, {"a": None}]], {}, {"a": [1]}]
)
def test_a_result_can_be_any_json_value(started, value):
    started.executor("give")(lambda: value)
    assert run(started, "give") == value


def test_tuples_come_back_as_lists(started):
    started.executor("give")(lambda: {"pair": (1, 2)})
    assert run(started, "give") == {"pair": [1, 2]}


def cycle():
    value: list = []
    value.append({"again": value})
    return value


def deep():
    value: list = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: {"when": object()}, "PayloadError: result.when: object is not JSON"),
        (lambda: [1, float("inf")], "PayloadError: result[1]: inf is not valid JSON: leave it out"),
        (
            lambda: {"x": float("nan")},
            "PayloadError: result.x: nan is not valid JSON: leave it out",
        ),
        (lambda: {1, 2}, "PayloadError: result: set is not JSON"),
        (lambda: b"x", "PayloadError: result: bytes is not JSON"),
        (lambda: "\udfff", "PayloadError: result: contains a lone surrogate"),
        (lambda: "x" * (1 << 20), "PayloadError: result: 1,048,578 bytes as JSON"),
        (deep, "PayloadError: result["),
        (cycle, "PayloadError: result[0].again[0].again"),
    ],
)
def test_a_result_that_is_not_json_fails_the_task(started, make, text):
    started.executor("give")(make)
    handle = started.submit("give")
    with pytest.raises(TaskFailed):
        handle.result(PATIENCE)
    assert handle.task().error.startswith(text[:60])
    assert started.submit("give").exception(PATIENCE)  # and the workers go on


def test_each_attempt_gets_its_own_copy_of_the_task(started):
    seen = []

    @started.executor("twice", max_attempts=2)
    def twice(ctx, items):
        seen.append(list(items))
        items.append("changed")
        ctx.task.params["more"] = 1
        if len(seen) == 1:
            raise ValueError

    started.submit(Task(type="twice", params={"items": []})).result(PATIENCE)
    assert seen == [[], []]


def test_type_checkers_know_all_options():
    seen = {name: hint.__forward_arg__ for name, hint in ExecutorOptions.__annotations__.items()}
    # A timedelta or a text that is given is kept as seconds.
    for name in ("timeout", "grace", "stall", "expires", "wait"):
        seen[name] = seen[name].replace("Duration", "float")
    # The name of one limit is kept as a tuple, and the number of a version as a text.
    seen.update(limit="tuple[str, ...] | None", version="str | None")
    assert seen == {field.name: field.type for field in attrs.fields(Options)}
