"""The overview, the list of tasks and the page of a task, as people use them."""

from __future__ import annotations

import html
import json
import logging
import re
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone

import pytest
from helpers import eventually

from taskx import ConfigurationError, RepositoryUnavailable, Task, TaskStatus, chain
from taskx.programs.dashboard import ALL, display
from taskx.programs.dashboard.screens import overview, tasks, types
from taskx.stores.liveness.base import Node
from taskx.tasks.timing import DEFAULT_TIMING

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}\u202e\ud800</textarea>"
SAFE = HOSTILE.replace("\ud800", "")


@pytest.fixture
def queue(make_queue):
    queue = make_queue()
    queue.declare("report", "email", "broken")
    return queue


@pytest.fixture
def browser(look, queue):
    return look(queue)


@pytest.fixture
def run(make_queue):
    """Return a function that runs tasks of some types in another queue, until nothing is left to run."""

    def run(**functions):
        other = make_queue()
        for type, function in functions.items():
            other.executor(type, max_attempts=2, capture_log=True)(function)
        other.start()
        other.drain()
        other.stop()

    return run


def rows(answer):
    """Return the ids of the tasks in a list, in order."""
    return [html.unescape(found) for found in re.findall(r'name="id" value="([^"]*)"', answer.text)]


def link(answer, rel):
    """Return the URL of the link to the next or the previous page; None if there is none."""
    found = re.search(rf'<a href="([^"]*)" rel="{rel}"', answer.text)
    return found and html.unescape(found[1])


# --- overview


def test_the_overview_says_first_what_is_wrong(browser, queue):
    queue.submit("report")
    queue.submit("report", delay=1000)
    text = browser.get("/").text
    assert text.index("No worker runs: 1 task waits.") < text.index('<h2 id="numbers"')
    assert re.search(r"<b>1</b><span>due</span>", text)
    assert "1 delayed, 0 blocked" in text


def test_the_overview_counts_failures_of_the_last_hour(browser, queue, run):
    def broken():
        raise ValueError("no")

    queue.submit("broken")
    run(broken=broken)
    text = browser.get("/").text
    assert re.search(r'<b class="bad">1</b><span>failed in the last hour</span>', text)
    assert "/tasks?q=type:broken+status:failed" in text


def test_waiting_tasks_are_counted_up_to_a_limit(browser, queue, monkeypatch):
    for module in (display, overview, types):
        monkeypatch.setattr(module, "MOST_WAITING", 2)
    for _ in range(3):
        queue.submit("report")
    assert "<b>2+</b><span>due</span>" in browser.get("/").text
    assert ">2+<" in browser.get("/types").text


def test_the_overview_names_paused_types(browser, queue):
    queue.pause("report")
    assert "report is paused: 0 tasks wait." in browser.get("/").text
    assert 'action="/types/resume"' in browser.get("/").text
    queue.pause()
    assert "Everything is paused: 0 tasks wait." in browser.get("/").text


def test_stuck_threads_are_shown_with_links_to_what_they_hold_up(browser, make_queue, gate, clock):
    queue = make_queue(worker_num=1, clock=clock)
    queue.executor("hang", timeout=60, grace=0.0, max_attempts=2)(gate)
    queue.start()
    handle = queue.submit("hang")
    gate.wait_for()
    clock.advance(60)
    eventually(lambda: handle.task().stuck_on)
    text = browser.get("/").text
    assert "hang stands still: 1 task waits for stuck threads on " in text
    assert 'action="/nodes/stacks"' in text
    assert '<a href="/types/one?type=hang">Show the type</a>' in text
    assert re.search(r'<b class="bad">1</b><span>stuck threads</span>', text)
    for page in ("/", "/types", "/nodes"):
        assert re.search('class="bad">1 stuck<', browser.get(page).text)
    assert "stuck threads" in browser.get("/types/one?type=hang").text


def test_a_node_that_may_be_dead_shows_the_age_of_its_heartbeat(browser, queue, monkeypatch):
    node = Node(id="n", name="host:1", types=("report",), beat_at=queue.clock.now_ms() - 3_600_000)
    monkeypatch.setattr(queue.repository.liveness, "nodes", lambda: [node])
    text = browser.get("/nodes").text
    assert "may be dead" in text
    assert "a lease is 30 s; if the node lives, the clocks of the hosts differ" in text
    assert '<a href="/nodes">Show the nodes</a>' in browser.get("/").text
    assert "No live node has an executor" in browser.get("/types/one?type=report").text


# --- the list of tasks


def test_a_list_is_read_page_by_page_in_both_directions(browser, queue, monkeypatch):
    monkeypatch.setattr(tasks, "ROWS", 2)
    ids = [queue.submit("report").id for _ in range(7)][::-1]
    page = browser.get("/tasks")
    seen = [rows(page)]
    while url := link(page, "next"):
        page = browser.get(url)
        seen.append(rows(page))
    assert seen == [ids[:2], ids[2:4], ids[4:6], ids[6:]]
    back = []
    while url := link(page, "prev"):
        page = browser.get(url)
        back.append(rows(page))
    assert back == seen[-2::-1]


def test_the_list_leaves_out_the_tag_of_the_trace_and_the_page_of_the_task_has_it(browser, queue):
    trace = f"trace:00-{'a' * 32}-{'b' * 16}-01"
    handle = queue.submit("report", tags=["eu", trace])
    text = browser.get("/tasks").text
    assert '">eu</a>' in text
    assert trace not in text
    assert trace in browser.get(f"/task?id={handle.id}").text


def test_a_total_is_counted_up_to_a_limit(browser, queue, monkeypatch):
    monkeypatch.setattr(tasks, "MOST_COUNTED", 3)
    monkeypatch.setattr(tasks, "ROWS", 2)
    for _ in range(3):
        queue.submit("report")
    assert ">3 tasks<" in browser.get("/tasks").text
    assert "all 3 that match" in browser.get("/tasks").text
    queue.submit("report")
    text = browser.get("/tasks").text
    assert ">more than 3 tasks<" in text
    assert "all that match" in text
    chinese = browser.get("/tasks", headers={"Accept-Language": "zh-CN"})
    assert ">超过 3 个任务<" in chinese.text


def test_a_filter_line_chooses_tasks_and_is_shown_in_other_forms(browser, queue):
    queue.submit("report")
    chosen = queue.submit("email", created_by="ann").id
    answer = browser.get("/tasks", query_string={"q": "type:email by:ann"})
    assert rows(answer) == [chosen]
    assert "taskx list type:email by:ann" in answer.text
    assert html.escape(
        "queue.list_tasks(type='email', created_by='ann')", quote=False
    ) in html.unescape(answer.text)
    assert 'value="type:email by:ann"' in answer.text


def test_completion_adds_terms_to_the_line(browser, queue):
    queue.submit("email", created_by="ann b")
    text = html.unescape(browser.get("/tasks", query_string={"q": "type:email"}).text)
    assert '<option value="type:email status:failed">' in text
    assert '<option value="type:email by:"ann b"">' in text
    assert '<option value="type:email type:' not in text


def test_a_search_without_an_index_looks_at_the_newest_tasks_first(browser, queue, monkeypatch):
    monkeypatch.setattr(tasks, "MOST_SEARCHED", 2)
    old = queue.submit("report", created_by="ann").id
    asked = datetime.now(timezone.utc)
    eventually(lambda: datetime.now(timezone.utc) - asked > timedelta(milliseconds=2))
    new = [queue.submit("report", created_by="ann").id for _ in range(3)]
    newest = browser.get("/tasks?q=by:ann")
    assert "Only tasks since" in newest.text
    assert old not in rows(newest)
    assert rows(newest) == new[::-1]
    assert rows(browser.get("/tasks?q=by:ann&all=1")) == [*new[::-1], old]
    queue.cancel_all(everything=True)
    assert rows(browser.get("/tasks?q=by:ann+status:cancelled")) == [*new[::-1], old]


def test_tabs_ranges_and_chips_lead_to_other_lines(browser, queue):
    for place in range(3):
        queue.submit("report", {"n": place, "token": "hunter2"})
    text = html.unescape(browser.get("/tasks?q=type:report+status:failed+newer:1d").text)
    assert '"/tasks?q=type:report+newer:1d+status:pending">pending <span class="muted">3<' in text
    assert 'href="/tasks?q=type:report+newer:1d+status:failed" aria-current="true"' in text
    assert 'href="/tasks?q=type:report+status:failed+newer:1h"' in text
    assert 'href="/tasks?q=type:report+newer:1d" title="without status:failed"' in text
    listed = html.unescape(browser.get("/tasks?q=type:report").text)
    assert "<b>report</b></a> n=2 token=***" in listed
    assert "hunter2" not in listed
    unindexed = browser.get("/tasks?q=error:x").text
    assert "pending</a>" in unindexed  # not counted


def test_a_wrong_filter_line_is_kept_and_explained(browser):
    answer = browser.get("/tasks", query_string={"q": "tipe:email"})
    assert answer.status_code == 400
    assert 'value="tipe:email"' in answer.text
    assert "did you mean" in answer.text


def test_an_empty_list_says_so(browser):
    assert "No task is stored." in browser.get("/tasks").text
    assert "No task matches." in browser.get("/tasks?q=type:nothing").text


def test_an_export_has_all_tasks_as_json_lines(browser, queue):
    ids = [queue.submit("report", {"n": n}).id for n in range(3)]
    queue.submit("email")
    answer = browser.get("/tasks/export?q=type:report")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="tasks.jsonl"'
    assert [json.loads(line)["id"] for line in answer.text.splitlines()] == ids[::-1]


def test_an_export_is_sent_while_it_is_read(browser, queue):
    for _ in range(3):
        queue.submit("report")
    answer = browser.get("/tasks/export")
    assert answer.is_streamed
    first = next(iter(answer.response))
    assert json.loads(first)["type"] == "report"
    answer.close()


# --- changes of several tasks


def test_selected_tasks_are_changed_after_a_question(browser, queue):
    ids = [queue.submit("report").id for _ in range(3)]
    question = browser.post("/tasks/cancel", data={"id": ids[:2], "back": "/tasks?q=type:report"})
    assert question.status_code == 200
    assert "Cancel 2 tasks?" in question.text
    assert queue.count_tasks(status="pending") == 3
    form = dict(re.findall(r'name="(\w+)" value="([^"]*)"', question.text))
    assert rows(question) == ids[:2]
    done = browser.post("/tasks/cancel", data={**form, "id": rows(question)})
    assert done.location == "/tasks?q=type:report"
    assert "2 tasks were cancelled." in browser.get(done.location).text
    assert "2 tasks were cancelled." not in browser.get(done.location).text
    assert queue.count_tasks(status="pending") == 1


def test_nothing_happens_if_no_task_is_selected(browser, queue):
    queue.submit("report")
    for name in ("cancel", "requeue", "delete"):
        assert browser.post(f"/tasks/{name}", data={"confirmed": "1"}).status_code == 303
    assert queue.count_tasks(status="pending") == 1


def test_all_that_match_are_changed_but_none_that_come_later(browser, queue):
    for _ in range(3):
        queue.submit("report")
    other = queue.submit("email").id
    question = browser.post("/tasks/delete", data={"whole": "1", "q": "type:report"})
    assert "Delete 3 tasks?" in question.text
    form = {
        n: html.unescape(v) for n, v in re.findall(r'name="(\w+)" value="([^"]*)"', question.text)
    }
    asked = datetime.now(timezone.utc)
    eventually(lambda: datetime.now(timezone.utc) - asked > timedelta(milliseconds=2))
    late = queue.submit("report").id
    assert browser.post("/tasks/delete", data=form).status_code == 303
    assert {task.id for task in queue.iter_tasks()} == {other, late}


@pytest.mark.timing(request_within=0)
def test_a_long_change_asks_if_it_shall_go_on(browser, queue):
    for _ in range(DEFAULT_TIMING.batch + 1):
        queue.submit("report")
    form = {"whole": "1", "confirmed": "1", "q": "type:report"}
    answer = browser.post("/tasks/cancel", data=form)
    assert "Go on?" in answer.text
    assert f"{DEFAULT_TIMING.batch} tasks were cancelled." in answer.text
    form = dict(re.findall(r'name="(\w+)" value="([^"]*)"', answer.text))
    browser.post("/tasks/cancel", data=form)
    assert queue.count_tasks(status="pending") == 0


def test_failed_tasks_run_again_at_a_rate(browser, queue, run):
    def broken():
        raise ValueError("no")

    for _ in range(3):
        queue.submit("broken")
    run(broken=broken)
    form = {"whole": "1", "confirmed": "1", "q": "status:failed", "rate": "1/h"}
    assert browser.post("/tasks/requeue", data=form).status_code == 303
    starts = [task.run_at for task in queue.iter_tasks(status="pending")]
    assert max(starts) - min(starts) == timedelta(hours=2)


def test_a_wrong_rate_changes_nothing(browser, queue):
    form = {"whole": "1", "confirmed": "1", "q": "status:failed", "rate": "fast"}
    answer = browser.post("/tasks/requeue", data=form)
    assert answer.status_code == 400
    assert "rate" in answer.text


# --- the page of a task


def test_a_task_that_failed_shows_every_attempt(browser, queue, run):
    def broken(ctx, n):
        logging.getLogger("shop").warning("line of the log")
        ctx.step("first", lambda: {"kept": 1})
        raise ValueError(f"no {n}")

    task_id = queue.submit("broken", {"n": 4711}).id
    run(broken=broken)
    text = browser.get("/task", query_string={"id": task_id}).text
    assert text.count("ValueError: no 4711\n") == 2  # the tracebacks of both attempts
    assert "line of the log" in text
    assert "Run again from here" in text
    assert 'class="status retried"' in text


@pytest.mark.every_store
def test_a_task_runs_again_with_other_params(browser, queue, run):
    def broken(n, password):
        raise ValueError("no")

    task_id = queue.submit("broken", {"n": 1, "password": "hunter2"}).id
    run(broken=broken)
    params = json.dumps({"n": 2, "password": "***"})
    answer = browser.post("/task/edit", data={"id": task_id, "params": params})
    assert answer.status_code == 303
    assert queue.get_task_status(task_id).params == {"n": 2, "password": "hunter2"}
    text = browser.get("/task", query_string={"id": task_id}).text
    assert "Params before" in text
    assert "hunter2" not in text


def test_a_task_runs_again_from_a_step(browser, queue, run):
    def broken(ctx):
        for name in ("one", "two", "three"):
            ctx.step(name, lambda: 1)
        raise ValueError("no")

    task_id = queue.submit("broken").id
    run(broken=broken)
    answer = browser.post("/task/requeue", data={"id": task_id, "from_step": "two"})
    assert answer.status_code == 303
    task = queue.get_task_status(task_id)
    assert [*task.checkpoints["steps"]] == ["one"]
    assert "from step two on" in browser.get(f"/task?id={task_id}").text


def test_wrong_params_change_nothing(browser, queue, run):
    def broken():
        raise ValueError("no")

    task_id = queue.submit("broken").id
    run(broken=broken)
    for params in ("", "{", "[]", "7", "[" * 100_000, '{"a": NaN}'):
        answer = browser.post("/task/edit", data={"id": task_id, "params": params})
        assert answer.status_code == 400
        assert queue.get_task_status(task_id).status is TaskStatus.FAILED


def test_a_task_that_ended_cannot_be_cancelled(browser, queue):
    task_id = queue.submit("report").id
    assert browser.post("/task/cancel", data={"id": task_id, "confirmed": "1"}).status_code == 303
    answer = browser.post("/task/cancel", data={"id": task_id, "confirmed": "1"})
    assert answer.status_code == 409
    assert "This did not work" in answer.text


def test_a_deleted_task_leads_to_the_list(browser, queue):
    task_id = queue.submit("report").id
    assert browser.post("/task/delete", data={"id": task_id, "confirmed": "1"}).location == "/tasks"
    assert browser.get(f"/task?id={task_id}").status_code == 404


def test_a_task_shows_its_parents_and_children(browser, queue):
    handle = queue.submit_flow(chain(Task(type="report"), Task(type="email")))
    first, second = (
        task.id for task in sorted(queue.iter_tasks(), key=lambda t: len(t.depends_on))
    )
    assert handle
    assert second in browser.get(f"/task?id={first}").text
    parents = browser.get(f"/task?id={second}").text
    assert "It waits for" in parents
    assert first in parents


def test_a_running_task_shows_its_progress_and_its_stack(look, busy):
    queue = busy()
    [task] = queue.list_tasks(status="running").tasks
    queue.repository.update_progress(task.id, 40, "nearly half")
    text = look(queue).get(f"/task?id={task.id}").text
    assert '<progress max="100" value="40"' in text
    assert "nearly half" in text
    assert "What its thread does now" in text


@pytest.mark.parametrize("task_id", ["nothing", "", "x" * 300, "\0", "../..", "a\nb"])
def test_an_unknown_id_is_not_found(browser, task_id):
    answer = browser.get("/task", query_string={"id": task_id})
    assert answer.status_code in (400, 404)
    assert answer.text.count("<h1>") == 1


# --- hostile texts


def test_hostile_texts_are_shown_as_texts(browser, queue, run):
    def broken(**params):
        raise ValueError(HOSTILE)

    task_id = SAFE
    queue.submit(
        "broken",
        {SAFE: [SAFE, {SAFE: SAFE}]},
        id=task_id,
        created_by=SAFE,
        unique_key=SAFE,
        concurrency_key=SAFE,
    )
    for path, query in [
        ("/task", {"id": task_id}),
        ("/tasks", {}),
        ("/tasks", {"q": SAFE}),
        ("/tasks", {"after": SAFE}),
        ("/", {SAFE: SAFE}),
        ("/task", {"id": SAFE * 2}),
    ]:
        for _ in "before", "after":
            text = browser.get(path, query_string=query).text
            assert "<script>alert" not in text
            assert '</textarea>"' not in text
            assert "49" not in re.findall(r"alert\(1\).{0,80}", text)
        run(broken=broken)


def test_a_hostile_notice_is_shown_as_a_text(browser):
    browser.set_cookie("taskx_notice", "PHNjcmlwdD4=")  # <script>
    assert "&lt;script&gt;" in browser.get("/").text
    for wrong in ("x", "/w==", "é"):
        browser.set_cookie("taskx_notice", wrong)
        assert browser.get("/").status_code == 200


def test_large_params_are_cut(browser, queue):
    params = {"many": [*range(5_000)], "long": "x" * 50_000, "deep": nested(80)}
    task_id = queue.submit("report", params).id
    text = browser.get(f"/task?id={task_id}").text
    assert "more values" in text
    assert len(text) < 200_000


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


# --- a store that is away


@contextmanager
def away(repository, monkeypatch):
    def fail(*_, **__):
        raise RepositoryUnavailable("the disk is gone")

    with monkeypatch.context() as patch:
        for name in (
            "find",
            "list",
            "get_by_id",
            "count",
            "ready",
            "distinct",
            "due",
        ):
            patch.setattr(repository, name, fail)
        patch.setattr(repository.reads, "list_after", fail)
        patch.setattr(repository.news, "revision", fail)
        yield


@pytest.mark.parametrize("path", ["/", "/tasks", "/task?id=x", "/tasks/export", "/api/tasks"])
def test_a_page_says_that_the_store_is_away(browser, repository, monkeypatch, path):
    with away(repository, monkeypatch):
        answer = browser.get(path)
    assert answer.status_code == 503
    assert "the disk is gone" in answer.text
    assert answer.headers["Retry-After"] == "5"
    assert browser.get(path).status_code in (200, 404)


# --- words


def test_the_language_is_chosen_by_a_form_and_kept(browser):
    assert '<html lang="zh">' in browser.get("/", headers={"Accept-Language": "zh-CN"}).text
    answer = browser.post("/language", data={"to": "zh", "back": "/tasks"})
    assert answer.location == "/tasks"
    assert '<html lang="zh">' in browser.get("/").text


def test_unknown_permissions_are_no_permissions(look, queue):
    with pytest.raises(ConfigurationError):
        look(queue, permissions={*ALL, "everything"})
