"""The screens of types, nodes, flows and the system."""

from __future__ import annotations

import re
from html import unescape

import pytest
from helpers import eventually

from taskx import Task, chain, group
from taskx.programs.dashboard.layout import MOST_BOXES
from taskx.programs.dashboard.screens import system

HOSTILE = """<script>alert('"&')</script>"""


def text_of(response):
    """Return the text of a page, without its elements."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", response.text)).split())


def act(browser, path, **data):
    """Send a form; check that it was accepted, and return the next page."""
    response = browser.post(path, data={"back": "/system", "confirmed": "1", **data})
    assert (response.status_code, response.location) == (303, "/system"), text_of(response)
    return browser.get("/system")


@pytest.fixture
def queue(make_queue, gate):
    """A started queue with a type that waits for the gate, and a type with limits."""
    queue = make_queue(worker_num=3)

    @queue.executor("hold")
    def hold() -> None:
        gate()

    @queue.executor("limited", max_concurrency=2, rate="30/m", burst=4)
    def limited() -> None:
        return None

    @queue.executor(HOSTILE)
    def hostile() -> None:
        raise LookupError(HOSTILE)

    queue.start()
    return queue


def run(queue):
    """Run a task of the type with limits; return when it is counted."""
    queue.submit("limited").result(60)
    eventually(lambda: queue.stats().types["limited"].completed)


class TestTypes:
    def test_types_have_their_numbers_and_limits(self, look, queue, gate):
        queue.submit("hold")
        gate.wait_for(1)
        run(queue)
        page = look(queue).get("/types")
        assert HOSTILE not in page.text
        words = text_of(page)
        assert "3 types" in words
        assert re.search(r" hold 0 0 0 1 – – 0 0 – 1 Pause", words)
        assert re.search(r" limited 0 0 0 0 / 2 30/m – 1 0 ", words)

    def test_the_page_of_types_shows_the_shares_of_keys(self, look, queue):
        queue.limit("tenant:", share=3)
        assert "tenant: – – 3 – –" in text_of(look(queue).get("/types"))

    def test_a_type_has_charts_and_its_limits(self, look, queue):
        run(queue)
        page = look(queue).get("/types/one?type=limited")
        words = text_of(page)
        assert "1 completed, 0 failed" in words
        assert "Run times of the last 24 hours" in words
        assert "Most at once 2 – 2" in words
        assert "Rate of starts 30/m – 30/m" in words
        assert "Burst 4 – 4" in words

    def test_a_limit_that_is_held_is_shown(self, look, queue):
        queue.limit("api", concurrency=2)
        browser = look(queue)
        assert "Release" not in text_of(browser.get("/types"))
        queue.hold("api", 3600)
        held = r" api 0 / 2 – – – until [-\d:TZ ]+ by hand Release"
        assert re.search(held, text_of(browser.get("/types")))
        overview = text_of(browser.get("/"))
        assert re.search(r"Limit api is held for another \S+ (min|h), until ", overview)
        act(browser, "/types/release", limit="api")
        assert "Release" not in text_of(browser.get("/types"))
        assert "was not held" in act(browser, "/types/release", limit="api").text
        assert [change.action for change in queue.changes()] == ["release"]

    def test_an_unknown_type_has_a_page(self, look, queue):
        page = look(queue).get("/types/one", query_string={"type": HOSTILE + "?"})
        assert "No live node has an executor for this type." in text_of(page)

    def test_a_type_is_paused_and_resumed(self, look, queue):
        browser = look(queue)
        assert "Type hold is paused." in act(browser, "/types/pause", type="hold").text
        assert "hold" in queue.paused
        assert re.search(r"hold paused .* Resume hold", text_of(browser.get("/types")))
        act(browser, "/types/resume", type="hold")
        assert not queue.paused

    def test_all_types_are_paused_and_resumed(self, look, queue):
        browser = look(queue)
        act(browser, "/types/pause", type="")
        assert queue.paused.everything
        assert "All types are paused." in text_of(browser.get("/types"))
        act(browser, "/types/resume")
        assert not queue.paused

    def test_limits_are_tuned_and_untuned(self, look, queue):
        browser = look(queue)
        act(browser, "/types/tune", type="limited", max_concurrency="5", rate="9/s")
        assert queue.tuned().types["limited"].limits == {"max_concurrency": 5, "rate": "9/s"}
        one = "/types/one?type=limited"
        eventually(lambda: "Most at once 5 5 2" in text_of(browser.get(one)))
        act(browser, "/types/tune", type="limited", max_concurrency="6")
        assert queue.tuned().types["limited"].limits == {"max_concurrency": 6}
        act(browser, "/types/untune", type="limited")
        assert not queue.tuned()

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ({}, "no limit was entered"),
            ({"max_concurrency": "many"}, "max_concurrency must be a whole number"),
            ({"max_concurrency": "0"}, "max_concurrency"),
            ({"rate": "fast"}, "rate"),
        ],
    )
    def test_wrong_limits_are_refused(self, look, queue, data, words):
        response = look(queue).post("/types/tune", data={"type": "limited", **data})
        assert response.status_code == 400
        assert words in text_of(response)
        assert not queue.tuned()

    def test_types_are_searched(self, look, queue):
        page = look(queue).get("/types?q=LIM")
        assert ">limited<" in page.text
        assert ">hold<" not in page.text


class TestNodes:
    def test_a_node_is_shown_with_its_tasks(self, look, queue, gate):
        handle = queue.submit("hold")
        gate.wait_for(1)
        page = look(queue).get("/nodes")
        words = text_of(page)
        assert "1 node " in words
        assert re.search(r"this process .* alive 1 / 3 ", words)
        assert f'title="{handle.id}"' in page.text
        assert HOSTILE not in page.text

    def test_its_threads_are_shown_on_demand(self, look, queue, gate):
        handle = queue.submit("hold")
        gate.wait_for(1)
        [node] = queue.nodes()
        page = look(queue).post("/nodes/stacks", data={"id": node.id})
        assert handle.id in page.text
        assert "in hold" in text_of(page)
        assert look(queue).post("/nodes/stacks", data={"id": "unknown"}).status_code == 404
        assert look(queue).get("/nodes/stacks", query_string={"id": node.id}).status_code == 405

    @pytest.mark.parametrize("number", ["-1", "x", "9" * 5000])
    def test_wrong_numbers_of_workers_are_refused(self, look, queue, number):
        assert look(queue).post("/nodes/workers", data={"workers": number}).status_code == 400

    def test_a_node_is_stopped_after_a_question(self, look, queue):
        [node] = queue.nodes()
        browser = look(queue)
        question = browser.post("/nodes/stop", data={"id": node.id})
        assert f"Stop the node {node.name}?" in text_of(question)
        assert not queue.stopped
        act(browser, "/nodes/stop", id=node.id)
        assert [change.action for change in queue.changes()] == ["stop node"]

    def test_workers_are_tuned(self, look, queue):
        browser = look(queue)
        [node] = queue.nodes()
        act(browser, "/nodes/workers", workers="7")
        act(browser, "/nodes/workers", id=node.id, workers="9")
        assert (queue.tuned().workers, queue.tuned().nodes) == (7, {node.id: 9})
        eventually(lambda: "the program says 3" in text_of(browser.get("/nodes")))
        act(browser, "/nodes/workers", workers="")
        act(browser, "/nodes/workers", id=node.id)
        assert not queue.tuned()
        wrong = browser.post("/nodes/workers", data={"workers": "-1"})
        assert wrong.status_code == 400

    def test_without_a_node_the_page_says_so(self, look, make_queue):
        assert "No node runs" in look(make_queue()).get("/nodes").text


class TestFlows:
    @pytest.mark.every_store
    def test_flows_are_listed_with_their_counts(self, look, queue):
        queue.pause()
        flow = queue.submit_flow(chain(task_of(), task_of()))
        page = look(queue).get("/flows")
        assert flow.id in page.text
        assert "tasks: pending 2" in page.text

    def test_a_flow_is_drawn(self, look, queue):
        queue.pause()
        flow = queue.submit_flow(chain(task_of(), group(task_of(), task_of())))
        page = look(queue).get("/flows/one", query_string={"id": flow.id})
        assert page.text.count('aria-label="limited: pending"') == 3
        assert page.text.count("<path ") == 2
        assert f"/task?id={next(queue.iter_tasks(flow=flow.id)).id}" in page.text

    def test_tasks_of_a_large_flow_share_boxes(self, look, queue):
        queue.pause()
        many = group(*(task_of() for _ in range(MOST_BOXES + 1)))
        flow = queue.submit_flow(chain(task_of(), many))
        page = look(queue).get("/flows/one", query_string={"id": flow.id})
        assert f"{MOST_BOXES + 1} × limited" in page.text

    @pytest.mark.every_store
    def test_the_failed_part_runs_again(self, look, queue):
        flow = queue.submit_flow(chain(task_of(HOSTILE), task_of()))
        eventually(lambda: queue.count_tasks(flow=flow.id, status="cancelled"))
        browser = look(queue)
        page = browser.get("/flows/one", query_string={"id": flow.id})
        assert "Run the failed part again" in page.text
        assert HOSTILE not in page.text
        queue.pause()
        question = browser.post("/flows/requeue", data={"id": flow.id})
        assert "Run the failed tasks of this flow again?" in question.text
        act(browser, "/flows/requeue", id=flow.id)
        assert queue.count_tasks(flow=flow.id, status="pending") == 2

    def test_an_unknown_flow_is_not_found(self, look, queue):
        assert look(queue).get("/flows/one?id=none").status_code == 404
        assert look(queue).get("/flows/one").status_code == 404


def task_of(type="limited"):
    """Return a task for a flow."""
    return Task(type=type)


class TestSystem:
    def test_it_shows_files_counts_settings_and_changes(self, look, queue):
        queue.submit("limited").result(60)
        queue.note_change("ann", "cancel", HOSTILE, {"n": 7})
        page = look(queue).get("/system")
        words = text_of(page)
        assert "1 completed" in words
        assert "worker_num 3" in words
        assert f"ann cancel {HOSTILE} {{'n': 7}}" in words
        assert HOSTILE not in page.text
        for path in queue.repository.house.file_sizes():
            assert path in words

    def test_the_tasks_of_a_status_are_counted_up_to_a_limit(self, look, queue, monkeypatch):
        monkeypatch.setattr(system, "MOST_COUNTED", 2)
        for _ in range(3):
            queue.submit("limited").result(60)
        assert "2+ completed" in text_of(look(queue).get("/system"))

    def test_details_of_changes_are_for_those_who_may_see_params(self, look, queue):
        queue.note_change("ann", "cancel", "x", "the detail")
        assert "the detail" not in look(queue, permissions={"read"}).get("/system").text


@pytest.mark.parametrize(
    "action",
    [
        *("types/pause", "types/resume", "types/tune", "types/untune", "types/release"),
        *("nodes/stop", "nodes/workers", "flows/requeue"),
    ],
)
def test_changes_need_their_permissions(look, queue, action):
    browser = look(queue, permissions={"read", "see_params"})
    for page in ("/types", "/types/one?type=hold", "/nodes", "/flows"):
        assert f"/{action}" not in browser.get(page).text
    assert browser.post(f"/{action}", data={"type": "hold", "workers": "9"}).status_code == 403
    assert not queue.paused
    assert not queue.tuned()
    assert queue.changes() == []
